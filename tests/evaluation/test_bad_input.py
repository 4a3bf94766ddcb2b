"""What is wrong in a config or on a command line is said in one sentence, before anything is rendered."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from trl import TrlParser

import evaluate
import sample
from data.command_line import errors_as_sentences
from evaluation.config import MOST_STEPS, EvaluationConfig
from evaluation.contenders import extra
from solver import ConsistencySolverScheduler

sys.path.append(str(Path(__file__).parents[1] / "data"))

from tiny_teacher import make_tiny_sd

CONFIGS = Path(__file__).parents[2] / "configs"
CELL = {"guidance_scale": 3.0, "steps": [3], "num_prompts": 4}


def read(tmp_path, **changes):
    """Parses a YAML file, as `--config` does."""
    knobs = {"model": "zoo/none", "output_dir": str(tmp_path / "out"), "columns": [CELL], **changes}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(knobs))
    parser = TrlParser((EvaluationConfig,), allow_abbrev=False)
    return parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml")])[0]


def test_a_good_config_is_read(tmp_path):
    config = read(tmp_path, num_inference_steps=MOST_STEPS, height=64, rewards=["pixels", "dino"], sheet_steps=[3])
    assert config.columns[0].steps == (3,) and config.reward_models == [None, None]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_inference_steps": 1000}, "num_inference_steps=1000: expected 1 to 999"),
        ({"num_inference_steps": 40.5}, "num_inference_steps=40.5: expected a whole number"),
        ({"columns": [CELL | {"steps": [1000]}]}, r"steps=\[1000\]: expected whole numbers from 1 to 999"),
        ({"rewards": [3]}, r"rewards=\[3\]: expected a list of text"),
        ({"columns": 3}, "columns: 3 is no mapping"),
        ({"columns": ["[3]"]}, r"columns: '\[3\]' is no mapping"),
        ({"columns": [CELL | {"guidance_scale": float("nan")}]}, "columns: guidance_scale=nan: expected a number"),
        ({"columns": [CELL | {"guidance_scale": "high"}]}, "columns: guidance_scale='high': expected a number"),
        ({"columns": [CELL | {"num_prompts": "many"}]}, "columns: num_prompts='many': expected a whole number"),
        ({"columns": [CELL | {"finalists": 0}]}, "columns: finalists=0: expected"),
        ({"scheduler_kwargs": "{"}, "scheduler_kwargs: '{' is no mapping"),
        ({"extra": ["{"]}, "extra: '{' is no mapping"),
        ({"dtype": "fp16"}, "dtype='fp16': expected one of float32"),
        ({"batch_size": True}, "batch_size=True: expected a whole number"),
        ({"fid": 3}, "fid=3: expected true or false"),
    ],
)
def test_configs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


def test_a_single_value_is_a_list_of_one(tmp_path):
    columns = CELL | {"steps": 3, "only": "ddim"}
    config = read(tmp_path, solvers="ddim", rewards="pixels", sheet_steps=3, columns=columns)
    assert (config.solvers, config.rewards, config.sheet_steps) == (["ddim"], ["pixels"], [3])
    assert (config.columns[0].steps, config.columns[0].only) == ((3,), ("ddim",))


def test_abbreviated_flags_are_unknown(tmp_path):
    with pytest.raises(ValueError, match="--out"):
        evaluate.main(["--model", "zoo/none", "--output_dir", str(tmp_path), "--out", "elsewhere"])
    with pytest.raises(SystemExit):
        sample.main(["refine", "--model", "zoo/none", "--prompt", "x", "--seed", "1", "--out", "x.png"])


def test_the_device_and_the_prompts_are_named(models, tmp_path):
    knobs = ["--model", str(models / "sd"), "--output_dir", str(tmp_path / "out"), "--columns", json.dumps(CELL)]
    with pytest.raises(ValueError, match="device='gpu0': expected one that torch finds"):
        evaluate.main([*knobs, "--device", "gpu0"])
    (tmp_path / "prompts.txt").write_bytes(b"a red ring\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"prompts=.*prompts\.txt.*UTF-8"):
        evaluate.main([*knobs, "--prompts", str(tmp_path / "prompts.txt")])
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state=.*state\.json' is no trainer_state\.json"):
        evaluate.main([*knobs, "--trainer_state", str(tmp_path / "state.json")])


@pytest.mark.parametrize("steps", ["0", "1000", "5000"])
def test_impossible_steps_of_every_command(tmp_path, steps):
    out = ["--output", str(tmp_path / "out.png")]
    picture = ["--model", "zoo/none", "--prompt", "x", "--seed", "1", *out]
    for command in (["solver", "--solver", "none"], ["refine"], ["preview"], ["hiflow"], ["ralu"]):
        with pytest.raises(ValueError, match=f"--steps {steps}: expected at least 1 and at most 999"):
            sample.main([*command, *picture, "--steps", steps])


@pytest.mark.parametrize("command", [["solver", "--solver", "none"], ["refine"], ["preview"], ["hiflow"], ["ralu"]])
def test_guidance_that_is_no_number(tmp_path, command):
    picture = ["--model", "zoo/none", "--prompt", "x", "--seed", "1", "--output", str(tmp_path / "out.png")]
    with pytest.raises(ValueError, match="--guidance_scale=nan: expected a number of at least 0"):
        sample.main([*command, *picture, "--guidance_scale", "nan"])


@pytest.mark.parametrize("command", ["solver --solver none", "refine", "preview", "hiflow", "ralu", "remake x.png"])
def test_where_no_file_can_be_written(tmp_path, command):
    """Said before the model is opened, and nothing is left behind."""
    (tmp_path / "file").write_text("")
    picture = ["--model", "zoo/none", "--prompt", "x", "--seed", "1"] if "remake" not in command else []
    for output in (tmp_path / "file" / "x.png", tmp_path / "file" / "new" / "x.png"):
        with pytest.raises(OSError, match=f"--output {output}.*: no file can be written there"):
            sample.main([*command.split(), *picture, "--output", str(output)])
    with pytest.raises(OSError):
        sample.main([*command.split(), *picture, "--output", str(tmp_path / "new" / "x.png")])
    if command != "preview":  # which writes a folder
        with pytest.raises(ValueError, match=r"--output x.jpg: pictures are PNG files"):
            sample.main([*command.split(), *picture, "--output", "x.jpg"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "does not fit into memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "does not fit into memory"),
        (MemoryError(), "does not fit into memory"),
        (ValueError("a\n  b"), "x.py: a b$"),
        (ValueError("a\x1b]0;b\x07c"), "x.py: a ]0;b c$"),  # a terminal would take it as its title
        (OSError("x" * 10**5), "x.py: x{2000} ...$"),
    ],
)
def test_errors_that_are_sentences(error, message):
    with pytest.raises(SystemExit, match=message), errors_as_sentences("x.py"):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), errors_as_sentences("x.py"):
        raise RuntimeError("a bug")


def test_a_folder_that_holds_no_previews(tmp_path):
    with pytest.raises(OSError, match=r"there is no previews\.json in it"):
        sample.main(["refine", "--preview", str(tmp_path), "--output", str(tmp_path / "full.png")])
    good = {"model": "x", "dtype": "float32", "prompt": "x", "candidates": [{}]}
    wrong = [json.dumps(good | change) for change in ({"candidates": 3}, {"dtype": "int8"}, {"model": None})]
    for text in ("{", "[]", '{"model": "x"}', *wrong):
        (tmp_path / "previews.json").write_text(text)
        with pytest.raises(ValueError, match=r"previews\.json is not what `sample.py preview` wrote"):
            sample.main(["refine", "--preview", str(tmp_path), "--output", str(tmp_path / "full.png")])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"scheduler": "DDIMScheduler", "scheduler_kwargs": {"spacing": "x"}}, "DDIMScheduler takes no spacing"),
        ({"scheduler_kwargs": [1]}, r"'x': scheduler_kwargs: \[1\] is no mapping"),
        ({"steps": 4}, "'x': steps=4: expected whole numbers"),
        ({"guidance_scale": float("inf")}, "'x': guidance_scale=inf: expected"),
        ({"weight_name": "a.safetensors"}, "weight_name is the file of a lora or unet"),
        ({"lora": "a", "weight_name": "a.bin"}, r"weight_name='a.bin': expected a \.safetensors file"),
        ({"lora": 3}, "'x': lora=3: expected text"),
    ],
)
def test_rows(row, message):
    with pytest.raises(ValueError, match=message):
        extra({"name": "x", **row}, make_tiny_sd())


def test_settings_that_the_own_scheduler_lacks():
    pipe = make_tiny_sd()
    (make,) = extra({"name": "x", "scheduler_kwargs": {"spacing": "x"}}, pipe).grids.values()
    with pytest.raises(ValueError, match="DDIMScheduler takes no spacing"):
        make(pipe.scheduler, 4, 3.0)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("eval_*.yaml")))
def test_the_shipped_configs_are_understood(name):
    path = CONFIGS / f"{name}.yaml"
    parser = TrlParser((EvaluationConfig,), allow_abbrev=False)
    (config,) = parser.parse_args_and_config(["--config", str(path)])
    assert len(path.read_text().splitlines()) <= 30 + len(config.extra)
    assert config.reward_models[0] is None
    paths = (config.model, config.output_dir, config.trainer_state or "")
    assert not any(Path(value).is_absolute() for value in paths)
    rows = {"learned", *config.solvers, *(row["name"] for row in config.extra)}
    assert all(any(columns.measures(name) for columns in config.columns) for name in rows)
    assert all(set(columns.only or ()) <= rows for columns in config.columns)
    pipe = make_tiny_sd()
    for row in config.extra:
        if "solver" not in row:
            assert extra(row, pipe).name == row["name"]


def test_the_main_table_has_the_cells_that_were_promised():
    (config,) = TrlParser((EvaluationConfig,)).parse_args_and_config(["--config", str(CONFIGS / "eval_mini_sd.yaml")])
    prompts = {(c.guidance_scale, k): c.num_prompts for c in config.columns for k in c.steps}
    wanted = {(g, k): 500 if g == 3 else 200 for g in (1.5, 3.0, 5.0, 7.5) for k in (4, 5, 6, 8)}
    assert all(prompts[cell] >= count for cell, count in wanted.items())
    assert config.sheet_steps == [3, 4, 5, 8, 10]
    for steps in config.sheet_steps:  # of every solver on the sheet, whether it would be a finalist or not
        (columns,) = (c for c in config.columns if c.guidance_scale == 3 and steps in c.steps)
        assert columns.finalists is None and all(columns.measures(name) for name in config.sheet_solvers)


@pytest.mark.parametrize(
    "columns, message",
    [
        ([CELL | {"steps": [3, 4]}], "learned, guidance 3, 4 steps: "),
        ([CELL, CELL | {"guidance_scale": 5.0}], "learned, guidance 5, 3 steps: "),
    ],
)
def test_a_baked_solver_without_a_cell_is_found_before_anything_is_rendered(models, tmp_path, columns, message):
    solver = ConsistencySolverScheduler.from_pretrained(models / "solver")
    solver.bake([3], 3.0).save_pretrained(tmp_path / "baked")
    knobs = ["--model", str(models / "sd"), "--output_dir", str(tmp_path / "out"), "--solvers", "ddim"]
    with pytest.raises(ValueError, match=message):
        evaluate.main([*knobs, "--learned", str(tmp_path / "baked"), "--columns", *map(json.dumps, columns)])
    assert not (tmp_path / "out" / "cache").exists()


def test_a_row_that_no_columns_have(models, tmp_path):
    knobs = ["--model", str(models / "sd"), "--output_dir", str(tmp_path / "out"), "--solvers", "ddim", "unipc"]
    with pytest.raises(ValueError, match="rows unipc: no columns have them"):
        evaluate.main([*knobs, "--columns", json.dumps(CELL | {"only": ["ddim"]})])
