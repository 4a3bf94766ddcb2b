"""evaluate.py end to end on tiny random models."""

import json
import math
import shutil
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

from evaluate import main
from evaluation.bootstrap import mean, statistic
from evaluation.budget import Budget, plan
from evaluation.cache import load
from evaluation.cells import Cell
from evaluation.config import EvaluationConfig
from evaluation.contenders import Contender
from evaluation.metrics import InceptionFeatures, frechet_distance
from evaluation.report import paired_differences
from evaluation.targets import reference_images
from solver import ConsistencySolverScheduler

STEPS, PROMPTS, CANDIDATES = [3, 4], 8, 3
COLUMNS = [
    {"guidance_scale": 3.0, "steps": [5], "num_prompts": 6, "only": ["learned", "ddim"]},
    {"guidance_scale": 1.5, "steps": STEPS, "num_prompts": PROMPTS, "finalists": 1},
    {"guidance_scale": 3.0, "steps": STEPS, "num_prompts": PROMPTS, "ranked": 2},
]
ONE_CELL = [{"guidance_scale": 3.0, "steps": [3], "num_prompts": PROMPTS}]
NOTHING_BUT_PIXELS = {
    "columns": ONE_CELL, "solvers": ["ddim"], "learned": None, "rewards": ["pixels"], "reward_models": None,
    "trained_on": None, "frechet": None, "caption_check": None, "scorer": None, "grid_prompts": 2,
}  # fmt: skip


def arguments(models, output_dir, **changes):
    knobs = {
        "model": models / "sd", "output_dir": output_dir, "learned": models / "solver",
        "solvers": ["ddim", "dpm2m", "base"], "columns": COLUMNS,
        "rewards": ["pixels", "dino", "segmentation"],
        "reward_models": ["null", models / "dino", models / "segmentation"], "trained_on": ["dino"],
        "frechet": "dino", "caption_check": models / "segmentation", "scorer": models / "clip",
        "rank_candidates": CANDIDATES, "grid_prompts": 4, "batch_size": 5,
        "num_inference_steps": 8, "resamples": 200, "sheet_steps": STEPS, "sheet_rows": 2,
    }  # fmt: skip
    args = []
    for name, value in (knobs | changes).items():
        if name in ("columns", "extra"):
            value = [json.dumps(entry) for entry in value]
        if value is not None:
            args += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return args


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, main(arguments(models, folder))


def numbers(metrics):
    """What must not depend on how often the evaluation was interrupted: all but the times."""
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds_per_image", "solver_share")} for row in metrics["rows"]
    ]
    return {"rows": rows, "paired": metrics["paired"], "across_steps": metrics["across_steps"]}


def test_schema(evaluated):
    folder, metrics = evaluated
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"model", "dataset", "rows", "paired"} <= metrics.keys()
    for row in metrics["rows"]:
        keys = {"solver", "steps", "guidance_scale", "nfe", "prompts", "metrics", "seconds_per_image"}
        assert keys <= row.keys()
        assert row["nfe"] == row["steps"] and row["seconds_per_image"] > 0
        assert row["prompts"] == (6 if row["steps"] == 5 else PROMPTS)
        for value in row["metrics"].values():
            assert value.keys() == {"mean", "ci95"}
            low, high = value["ci95"]
            assert math.isfinite(value["mean"]) and low <= value["mean"] <= high
    for entry in metrics["paired"]:
        assert entry.keys() == {"a", "b", "steps", "guidance_scale", "metric", "difference", "ci95"}
        assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
    consistency = {"pixels", "dino", "segmentation", "caption_check", "frechet_dino"}
    ranks = {"rank_spearman", "rank_top1"}
    for row in metrics["rows"]:
        if row["solver"] != "full":
            ranked = row["guidance_scale"] == 3 and row["steps"] != 5
            assert set(row["metrics"]) == consistency | (ranks if ranked else set())
    assert [name for name, about in metrics["metrics"].items() if about["trained_on"]] == ["dino"]
    assert [name for name, about in metrics["metrics"].items() if not about["higher_is_better"]] == ["frechet_dino"]


def test_paired_differences_are_those_of_the_rows(evaluated):
    _, metrics = evaluated
    means = {
        (row["solver"], row["steps"], row["guidance_scale"], name): value["mean"]
        for row in metrics["rows"]
        for name, value in row["metrics"].items()
    }
    for entry in metrics["paired"]:
        a, b = (means[entry[s], entry["steps"], entry["guidance_scale"], entry["metric"]] for s in ("a", "b"))
        assert entry["a"] == "learned" and entry["difference"] == pytest.approx(a - b, abs=1e-6)
    steps = [(entry["guidance_scale"], entry["steps"], entry["steps_b"]) for entry in metrics["across_steps"]]
    assert set(steps) == {(1.5, 3, 4), (3.0, 3, 4), (3.0, 4, 5)}
    for entry in metrics["across_steps"]:
        if entry["steps_b"] == 4:  # on the same prompts, so that it is the difference of the means
            a = means["learned", entry["steps"], entry["guidance_scale"], entry["metric"]]
            b = means[entry["b"], entry["steps_b"], entry["guidance_scale"], entry["metric"]]
            assert entry["difference"] == pytest.approx(a - b, abs=1e-6)


def test_the_closest_rival_and_the_full_steps_are_in_the_table(evaluated):
    """Of every metric, the row that is beaten least surely: lower ends count, where low is good upper ones."""
    folder, metrics = evaluated
    line = next(
        line
        for line in (folder / "table.md").read_text().split("closest rival")[1].splitlines()
        if line.startswith("| 3 | 4 |")
    )
    cells = line.strip("| ").split(" | ")[2:]
    here = [e for e in metrics["paired"] if (e["guidance_scale"], e["steps"]) == (3.0, 4)]
    for name, text in zip([*metrics["metrics"], "full steps"], cells, strict=True):
        rivals = [entry for entry in here if entry["metric"] == name]
        if name == "frechet_dino":
            assert text.endswith(" " + max(rivals, key=lambda e: e["ci95"][1])["b"])
        elif rivals:
            assert text.endswith(" " + min(rivals, key=lambda e: e["ci95"][0])["b"])
    (own,) = (e for e in metrics["from_full"] if (e["guidance_scale"], e["steps"]) == (3.0, 4))
    means = {
        row["solver"]: row["metrics"]["caption_check"]["mean"]
        for row in metrics["rows"]
        if row["guidance_scale"] == 3.0 and (row["steps"] == 4 or row["solver"] == "full")
    }
    assert own["difference"] == pytest.approx(means["learned"] - means["full"])
    assert cells[-1].endswith(" full")


def test_cells_of_different_columns_pair_on_the_prompts_they_share():
    def cell(solver, values):
        values = torch.tensor(values)
        cell = Cell(solver, "own", 5, 3.0, {}, {"pixels": values}, {}, None, values)
        return cell, {"pixels": mean(values, 100), "frechet_dino": statistic(lambda w: 1.0, len(values))}

    (entry,) = paired_differences([cell("learned", [5.0, 7.0, 9.0, 100.0]), cell("amed", [1.0, 2.0, 3.0])], 100)
    assert (entry["metric"], entry["difference"]) == ("pixels", 5.0)
    assert 4 <= entry["ci95"][0] <= entry["ci95"][1] <= 6


def test_columns_say_what_is_measured(evaluated):
    _, metrics = evaluated
    cells = [(row["guidance_scale"], row["steps"], row["solver"]) for row in metrics["rows"]]
    assert len(set(cells)) == len(cells)
    everyone = {"learned", "ddim", "dpm2m", "base"}
    for steps in STEPS:
        assert {solver for g, k, solver in cells if (g, k) == (3.0, steps)} == everyone
        out = {e["solver"] for e in metrics["left_out"] if (e["guidance_scale"], e["steps"]) == (1.5, steps)}
        assert len(out) == 1 and {solver for g, k, solver in cells if (g, k) == (1.5, steps)} == everyone - out
    assert {solver for g, k, solver in cells if (g, k) == (3.0, 5)} == {"learned", "ddim"}
    assert {cell for cell in cells if cell[2] == "full"} == {(1.5, 8, "full"), (3.0, 8, "full")}
    steps = [k for g, k, solver in cells if g == 3.0 and solver != "full"]
    assert steps == sorted(steps)  # though 5 comes first in the config


def test_each_classical_solver_is_on_the_grid_that_is_best_on_other_prompts(models, evaluated):
    _, metrics = evaluated
    for row in metrics["rows"]:
        if row["solver"] in ("ddim", "dpm2m"):
            assert set(row["grids"]) == {"leading", "trailing", "linspace"}
            assert row["grids"][row["grid"]] == max(row["grids"].values())
            assert row["grids"][row["grid"]] != row["metrics"]["pixels"]["mean"]
        else:
            assert row["grids"] == {}


def test_budget_is_what_is_evaluated(models, evaluated, tmp_path, caplog):
    """It cannot know on which grids the solvers end up, and that leading grids differ between diffusers' classes."""
    with caplog.at_level("INFO", logger="evaluation"):
        main(arguments(models, tmp_path, **NOTHING_BUT_PIXELS | {"solvers": ["ddim", "dpm2m"]}))
    numbers = [int(text.split()[0 if "were made" in text else 1].replace(",", "")) for text in caplog.messages
               if "network evaluations" in text]  # fmt: skip
    planned, made = numbers
    assert planned + 5 == pytest.approx(made, rel=0.1)  # 5: the batch that is timed


def test_a_budget_by_hand():
    """Three prompts, one of them with a second candidate; two solvers, a distilled network in its own steps."""
    columns = {"guidance_scale": 3.0, "num_prompts": 3}
    config = EvaluationConfig(
        "model", "folder", num_inference_steps=10, scorer="clip", rank_candidates=2, grid_prompts=2,
        columns=[{**columns, "steps": [4], "ranked": 1}, {**columns, "steps": [5]}],
    )  # fmt: skip
    rows = [Contender(name, {"own": None}, is_classical=True) for name in ("ddim", "dpm2m")]
    budget = plan(config, [*rows, Contender("student", {"own": None}, {"unet": "x"}, steps=(1, 2))])
    assert budget.full_steps == 10 * (3 + 1)
    assert budget.grids == 0  # there is one grid, and all are finalists
    # The first evaluation of a prompt serves all, the second both solvers: in 4 steps 1 + 1 + 2 + 2 and not 4 + 4.
    assert budget.rows == (3 + 1) * (1 + 2 + 2) + 3 * (1 + 3 + 3) + (3 + 1) * (1 + 2)
    assert budget.pictures == 4 + 4 * 2 + 3 * 2 + 4 * 2
    said = Budget(full_steps=2000, grids=300, rows=700, pictures=120).line(0.05, 0.25)
    assert "3,000 network evaluations (2,000 for full-step pictures, 300 to choose grids, 700 for the rows; " in said
    assert "guidance counts once) and " in said
    assert "120 pictures. At 20 evaluations and 4 pictures a second: 3 minutes" in said  # 150 + 30 s


def test_workflow_is_simulated_where_there_are_candidates(evaluated):
    _, metrics = evaluated
    assert {entry["guidance_scale"] for entry in metrics["workflow"]} == {3.0}
    for entry in metrics["workflow"]:
        assert entry["prompts"] == 2 and entry["seeds"] == CANDIDATES
        found = entry["full_only_success"]["mean"]
        if found:
            assert 8 / found <= entry["full_only_nfe"]["mean"] <= 8 * CANDIDATES / found
        else:
            assert entry["full_only_nfe"]["mean"] is None
        if entry["preview_first_success"]["mean"]:
            saving = 1 - entry["preview_first_nfe"]["mean"] / entry["full_only_nfe"]["mean"]
            assert entry["saving_nfe"]["mean"] == pytest.approx(saving)


def test_files_to_look_at(evaluated):
    folder, _ = evaluated
    text = (folder / "table.md").read_text()
    assert "dino †" in text and "frechet_dino ↓" in text and "## Guidance 3" in text and "not a finalist" in text
    for name in ("contact_sheet", "metrics_cfg_3", "coefficients_cfg_1.5"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 400 and image.convert("L").getextrema()[0] < 100


def test_goes_on_where_it_was_interrupted(models, evaluated, tmp_path):
    folder, metrics = evaluated
    cells = sorted((folder / "cache" / "cells").iterdir())
    before = {path: path.stat().st_mtime_ns for path in cells}
    cells[3].unlink()
    pictures = [p for p in (folder / "cache" / "targets").iterdir() if "seen" not in p.name]
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:100])
    again = main(arguments(models, tmp_path, cache_dir=folder / "cache"))
    assert numbers(again) == numbers(metrics)
    changed = [path for path in cells if path.stat().st_mtime_ns != before[path]]
    assert changed == [cells[3]]


def test_distilled_rows_by_configuration(models, evaluated, tmp_path):
    """The pipeline itself, in the place of a distilled one, gives what the solver of that name gives."""
    folder, _ = evaluated
    settings = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    ddim = {"scheduler": "DDIMScheduler", "scheduler_kwargs": settings, "guidance_scale": 3.0, "steps": [4]}
    extra = [
        {"name": "pipeline", "pipeline": str(models / "sd"), **ddim},
        {"name": "unet", "unet": str(models / "sd" / "unet"), **ddim},
        {"name": "lcm", "scheduler": "LCMScheduler", "steps": [2], "guidance_scale": 1.0},
        {"name": "other solver", "solver": str(models / "solver"), "steps": [3]},
    ]
    changes = {"solvers": ["ddim"], "columns": [COLUMNS[2]], "extra": extra}
    result = main(arguments(models, tmp_path, cache_dir=folder / "cache", **changes))
    rows = {(row["solver"], row["steps"]): row for row in result["rows"]}
    for name, value in rows["pipeline", 4]["metrics"].items():
        assert rows["unet", 4]["metrics"][name] == value
    if rows["ddim", 4]["grid"] == "trailing":
        same = rows["ddim", 4]["metrics"]["pixels"]["mean"]
        assert rows["pipeline", 4]["metrics"]["pixels"]["mean"] == pytest.approx(same, abs=1e-3)
    assert rows["other solver", 3]["metrics"] == rows["learned", 3]["metrics"]
    lcm = rows["lcm", 2]
    assert (lcm["own_guidance_scale"], lcm["guidance_scale"], lcm["nfe"]) == (1.0, 3.0, 2)


def test_a_network_is_one_of_several_files(models, tmp_path):
    """The pipeline's own network, from a folder and from a file in a repository, is the pipeline itself."""
    shutil.copytree(models / "sd" / "unet", tmp_path / "repository" / "student")
    (file,) = (tmp_path / "repository" / "student").glob("*.safetensors")
    file.rename(file.with_name("two.safetensors"))
    own = {"scheduler": "DDIMScheduler", "scheduler_kwargs": {"timestep_spacing": "trailing"}, "steps": [3]}
    extra = [
        {"name": "own", **own},
        {"name": "folder", "unet": str(models / "sd"), "subfolder": "unet", **own},
        {
            "name": "file", "unet": str(tmp_path / "repository"), "subfolder": "student",
            "weight_name": "two.safetensors", **own,
        },
    ]  # fmt: skip
    result = main(arguments(models, tmp_path / "out", **NOTHING_BUT_PIXELS, extra=extra))
    values = {row["solver"]: row["metrics"]["pixels"]["mean"] for row in result["rows"] if row["solver"] != "full"}
    assert values["folder"] == values["file"] == pytest.approx(values["own"], abs=1e-3)


def test_a_lora_changes_its_row_and_nothing_else(models, tmp_path):
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    for name in ("one", "two"):
        scaled = {key: layer if name == "one" else 2 * layer for key, layer in layers.items()}
        folder = {"save_directory": tmp_path / "lora" / "sd", "weight_name": f"{name}.safetensors"}
        StableDiffusionPipeline.save_lora_weights(unet_lora_layers=scaled, **folder)
    own = {"scheduler": "DDIMScheduler", "scheduler_kwargs": {"timestep_spacing": "trailing"}, "steps": [3]}
    extra = [{"name": n, **own} for n in ("before", "after")]
    lora = {"lora": str(tmp_path / "lora"), "subfolder": "sd", **own}
    extra[1:1] = [{"name": name, "weight_name": f"{name}.safetensors", **lora} for name in ("one", "two")]
    result = main(arguments(models, tmp_path / "out", **NOTHING_BUT_PIXELS, extra=extra))
    values = {row["solver"]: row["metrics"]["pixels"]["mean"] for row in result["rows"] if row["solver"] != "full"}
    assert values["before"] == values["after"]
    assert len({values[name] for name in ("before", "one", "two")}) == 3


def test_frechet_distance_to_other_pictures(models, tmp_path):
    for seed in range(3):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{seed}.png")
    dino = {"rewards": ["pixels", "dino"], "reward_models": ["null", models / "dino"], "frechet": "dino"}
    metrics = main(arguments(models, tmp_path / "out", **NOTHING_BUT_PIXELS | dino, reference=tmp_path))
    full = next(row for row in metrics["rows"] if row["solver"] == "full")
    assert full["metrics"]["frechet_dino"]["mean"] > 0
    with pytest.raises(ValueError, match="0 images"):
        list(reference_images(str(tmp_path / "out" / "cache"), 3, (16, 16)))
    scenes = torch.cat(list(reference_images("scenes:test", 3, (64, 64))))
    assert scenes.shape == (3, 3, 64, 64) and 0 <= scenes.min() < scenes.max() <= 1


class MeanColour(torch.nn.Module):
    """In the place of torch-fidelity's Inception network, whose weights come from the network."""

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])

    def forward(self, images_BCHW):
        assert images_BCHW.dtype == torch.uint8
        return (images_BCHW.float().mean(dim=(2, 3)),)


def fake_torch_fidelity(monkeypatch, network):
    package, module = (ModuleType(f"torch_fidelity{name}") for name in ("", ".feature_extractor_inceptionv3"))
    module.FeatureExtractorInceptionV3 = network
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_fid_is_the_frechet_distance_of_inception_features(models, tmp_path, monkeypatch):
    fake_torch_fidelity(monkeypatch, MeanColour)
    metrics = main(arguments(models, tmp_path, **NOTHING_BUT_PIXELS, fid=True))
    (row,) = (row for row in metrics["rows"] if row["solver"] == "ddim")
    cells = [load(path)[0] for path in (tmp_path / "cache" / "cells").iterdir()]
    (cell,) = (tensors for tensors in cells if "features/fid" in tensors)
    (target,) = (s for path in (tmp_path / "cache" / "targets").glob("*-seen-*") if "fid" in (s := load(path)[0]))
    expected = frechet_distance(cell["images"].float().mean(dim=(2, 3)), target["fid"])
    assert row["metrics"]["fid"]["mean"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert metrics["metrics"]["fid"] == {"unit": "FID", "higher_is_better": False, "trained_on": False}
    assert "fid ↓" in (tmp_path / "table.md").read_text()


def test_fid_says_what_it_lacks(models, tmp_path, monkeypatch):
    def no_weights(*_):
        raise OSError("no route")

    fake_torch_fidelity(monkeypatch, no_weights)
    with pytest.raises(OSError, match="weights of torch-fidelity cannot be fetched: no route"):
        main(arguments(models, tmp_path, **NOTHING_BUT_PIXELS, fid=True))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3")
    with pytest.raises(ImportError, match=r"pip install -e '\.\[metrics\]'"):
        main(arguments(models, tmp_path, **NOTHING_BUT_PIXELS, fid=True))


def test_fid_with_the_real_network():
    pytest.importorskip("torch_fidelity")
    try:
        inception = InceptionFeatures()
    except OSError as error:
        pytest.skip(str(error))
    assert inception(torch.rand(2, 3, 32, 32)).shape == (2, 2048)


def test_the_reward_curve(models, tmp_path):
    rows = [{"step": 1, "reward": 0.5}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_reward": 0.75}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    state = tmp_path / "trainer_state.json"
    main(arguments(models, tmp_path / "out", **NOTHING_BUT_PIXELS, trainer_state=state))
    with Image.open(tmp_path / "out" / "reward.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}
    assert {(0x9A, 0xA5, 0xB1), (0xD1, 0x49, 0x5B)} <= colours  # of both curves
    state.write_text(json.dumps({"log_history": rows[1:2]}))
    with pytest.raises(ValueError, match="logged no reward"):
        main(arguments(models, tmp_path / "out", **NOTHING_BUT_PIXELS, trainer_state=state))


def test_rows_with_steps_of_their_own_are_in_the_first_columns_that_have_them(models, tmp_path):
    columns = [{**ONE_CELL[0], "only": ["ddim"]}, {**ONE_CELL[0], "steps": [4], "num_prompts": 5}]
    extra = [{"name": "own", "scheduler": "DDIMScheduler", "steps": [2]}]
    changes = NOTHING_BUT_PIXELS | {"columns": columns}
    result = main(arguments(models, tmp_path, **changes, extra=extra))
    assert [(r["steps"], r["prompts"]) for r in result["rows"] if r["solver"] == "own"] == [(2, 5)]


def test_a_baked_solver_needs_the_cells_that_it_is_in_and_no_others(models, tmp_path):
    ConsistencySolverScheduler.from_pretrained(models / "solver").bake([3], 3.0).save_pretrained(tmp_path / "baked")
    columns = [*ONE_CELL, {**ONE_CELL[0], "steps": [4], "only": ["ddim"]}]
    changes = NOTHING_BUT_PIXELS | {"columns": columns, "learned": tmp_path / "baked"}
    result = main(arguments(models, tmp_path / "out", **changes))
    assert [(r["steps"], r["guidance_scale"]) for r in result["rows"] if r["solver"] == "learned"] == [(3, 3.0)]
    assert [entry["steps"] for entry in result["coefficients"]] == [3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"columns": [{"guidance_scale": 3, "steps": [0], "num_prompts": 4}]}, r"steps=\[0\]: expected whole numbers"),
        (
            {"columns": [{"guidance_scale": 3, "steps": [4], "num_prompts": 1}]},
            "num_prompts=1: expected a whole number of at least 2",
        ),
        ({"columns": [{"guidance_scale": 3, "steps": [4]}]}, "expected the keys guidance_scale, steps, num_prompts"),
        ({"columns": [{**ONE_CELL[0], "prompts": 3}]}, "expected the keys"),
        ({"columns": [{**ONE_CELL[0], "ranked": 9}]}, "ranked=9: expected 0 to num_prompts=8"),
        ({"columns": ONE_CELL + ONE_CELL}, r"\[\(3.0, 3\)\] occur twice"),
        ({"columns": [{**ONE_CELL[0], "only": ["ddim", "heun"]}]}, "only=heun: expected some of the rows"),
        ({"extra_json": "{name: x}"}, "extra: '{name: x}' is no mapping"),
        ({"main_metric": "clip"}, "main_metric=clip: expected some of the rewards"),
        ({"solvers": ["ddim", "heun"]}, "solver 'heun'"),
        ({"solvers": ["ddim", "ddim"]}, "ddim occur twice"),
        ({"learned": None}, "'base' is the learned one"),
        ({"extra": [{"name": "x", "lora": "a", "unet": "b"}]}, "at most one of"),
        ({"extra": [{"name": "x", "schedule": "a"}]}, "no schedule; the keys are"),
        ({"extra": [{"name": "full", "solver": "learned"}]}, "'full': that is the name"),
        ({"scorer": None}, "needs a scorer"),
        ({"sheet_rows": 9}, "sheet_rows=9: of every cell 8"),
        ({"trainer_state": "nowhere.json"}, "there is no such file"),
        ({"reference": "nowhere"}, "a folder of images"),
        ({"prompts": "edits:test"}, "are instructions, no captions; use edit_check"),
        ({"caption_check": None, "edit_check": "x"}, "knows only what edits:SPLIT should lead to"),
        ({"edit_check": "x"}, "it is one or the other"),
        ({"prompts": "edits:test", "caption_check": None}, "need pipeline: FluxKontextPipeline"),
    ],
)
def test_configs_that_do_not_fit(models, tmp_path, changes, message):
    if "extra" in changes and "solver" in changes["extra"][0]:
        changes = {"extra": [{**changes["extra"][0], "solver": str(models / "solver")}]}
    given = ["--extra", changes.pop("extra_json")] if "extra_json" in changes else []
    with pytest.raises(ValueError, match=message):
        main([*arguments(models, tmp_path, **changes), *given])


def test_a_solver_that_diverges_loses_its_row_and_stops_nothing(models, tmp_path):
    """Betas above 1 leave no real α."""
    betas = {"beta_start": 3.0, "beta_end": 3.0}
    extra = [{"name": "broken", "scheduler": "DDIMScheduler", "scheduler_kwargs": betas}]
    result = main(arguments(models, tmp_path, **NOTHING_BUT_PIXELS, extra=extra))
    assert {row["solver"] for row in result["rows"]} == {"full", "ddim"}
    reason = "its pictures are not finite"
    assert result["left_out"] == [{"solver": "broken", "steps": 3, "reason": reason, "guidance_scale": 3.0}]
    assert reason in (tmp_path / "table.md").read_text()
