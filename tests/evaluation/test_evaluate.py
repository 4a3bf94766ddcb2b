"""evaluate.py end to end on tiny random models."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluate import main
from evaluation.bootstrap import mean, statistic
from evaluation.cells import Cell
from evaluation.config import EvaluationConfig
from evaluation.report import paired_differences
from evaluation.targets import reference_images

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


def test_a_lora_changes_its_row_and_nothing_else(models, tmp_path):
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    own = {"scheduler": "DDIMScheduler", "scheduler_kwargs": {"timestep_spacing": "trailing"}, "steps": [3]}
    extra = [{"name": n, **own} for n in ("before", "after")]
    extra.insert(1, {"name": "lora", "lora": str(tmp_path / "lora"), **own})
    result = main(arguments(models, tmp_path / "out", **NOTHING_BUT_PIXELS, extra=extra))
    values = {row["solver"]: row["metrics"]["pixels"]["mean"] for row in result["rows"] if row["solver"] != "full"}
    assert values["before"] == values["after"] != values["lora"]


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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"columns": [{"guidance_scale": 3, "steps": [0], "num_prompts": 4}]}, r"steps=\[0\]: expected whole numbers"),
        ({"columns": [{"guidance_scale": 3, "steps": [4], "num_prompts": 1}]}, "num_prompts=1: expected at least 2"),
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


@pytest.mark.parametrize("name", ["mini_sd", "demo", "ablations", "mini_flux", "mini_kontext"])
def test_the_shipped_configs_are_understood(name):
    from trl import TrlParser

    path = Path(__file__).parents[2] / "configs" / f"eval_{name}.yaml"
    (config,) = TrlParser((EvaluationConfig,)).parse_args_and_config(["--config", str(path)])
    assert len(path.read_text().splitlines()) <= 30 + len(config.extra)
    assert config.reward_models[0] is None
    assert not any(Path(value).is_absolute() for value in (config.model, config.output_dir))
    if name == "mini_sd":
        prompts = {(c.guidance_scale, k): c.num_prompts for c in config.columns for k in c.steps}
        wanted = {(g, k): 500 if g == 3 else 200 for g in (1.5, 3.0, 5.0, 7.5) for k in (4, 5, 6, 8)}
        assert all(prompts[cell] >= count for cell, count in wanted.items())
