"""evaluate.py end to end on tiny random models."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluate import main
from evaluation.config import EvaluationConfig
from evaluation.targets import reference_images

STEPS, GUIDANCE, PROMPTS, CANDIDATES = [3, 4], [1.5, 3.0], 8, 4


def arguments(models, output_dir, **changes):
    knobs = {
        "model": models / "sd", "output_dir": output_dir, "learned": models / "solver",
        "solvers": ["ddim", "dpm2m", "base"], "steps": STEPS, "guidance_scale": GUIDANCE, "num_prompts": PROMPTS,
        "rewards": ["pixels", "dino", "segmentation"],
        "reward_models": ["null", models / "dino", models / "segmentation"], "trained_on": ["dino"],
        "frechet": "dino", "caption_check": models / "segmentation", "scorer": models / "clip",
        "rank_prompts": [0, 2], "rank_candidates": CANDIDATES, "grid_prompts": 4, "batch_size": 5,
        "num_inference_steps": 8, "resamples": 200, "sheet_steps": STEPS, "sheet_rows": 2,
    }  # fmt: skip
    args = []
    for name, value in (knobs | changes).items():
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
        assert row["nfe"] == row["steps"] and row["prompts"] == PROMPTS and row["seconds_per_image"] > 0
        for value in row["metrics"].values():
            assert value.keys() == {"mean", "ci95"}
            low, high = value["ci95"]
            assert math.isfinite(value["mean"]) and low <= value["mean"] <= high
    for entry in metrics["paired"]:
        assert entry.keys() == {"a", "b", "steps", "guidance_scale", "metric", "difference", "ci95"}
        assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
    solvers = {"learned", "ddim", "dpm2m", "base"}
    cells = {(row["solver"], row["steps"], row["guidance_scale"]) for row in metrics["rows"]}
    assert cells >= {(s, k, g) for s in solvers for k in STEPS for g in GUIDANCE} | {("full", 8, g) for g in GUIDANCE}
    consistency = {"pixels", "dino", "segmentation", "caption_check", "frechet_dino"}
    ranks = {"rank_spearman", "rank_top1"}
    for row in metrics["rows"]:
        if row["solver"] != "full":
            assert set(row["metrics"]) == consistency | (ranks if row["guidance_scale"] == 3 else set())
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
    for entry in metrics["across_steps"]:
        a = means["learned", entry["steps"], entry["guidance_scale"], entry["metric"]]
        b = means[entry["b"], entry["steps_b"], entry["guidance_scale"], entry["metric"]]
        assert (entry["steps"], entry["steps_b"]) == (3, 4)
        assert entry["difference"] == pytest.approx(a - b, abs=1e-6)


def test_best_grid_is_reported(evaluated):
    _, metrics = evaluated
    for row in metrics["rows"]:
        if row["solver"] in ("ddim", "dpm2m"):
            assert set(row["grids"]) == {"leading", "trailing", "linspace"}
            assert row["grids"][row["grid"]] == pytest.approx(row["metrics"]["pixels"]["mean"])


def test_workflow_is_simulated_where_there_are_candidates(evaluated):
    _, metrics = evaluated
    assert {entry["guidance_scale"] for entry in metrics["workflow"]} == {3.0}
    for entry in metrics["workflow"]:
        assert entry["prompts"] == 2 and entry["seeds"] == CANDIDATES
        assert 8 <= entry["full_only_nfe"]["mean"] <= 8 * CANDIDATES
        saving = 1 - entry["preview_first_nfe"]["mean"] / entry["full_only_nfe"]["mean"]
        assert entry["saving_nfe"]["mean"] == pytest.approx(saving)


def test_files_to_look_at(evaluated):
    folder, _ = evaluated
    text = (folder / "table.md").read_text()
    assert "dino †" in text and "frechet_dino ↓" in text and "Guidance 3, 8 prompts" in text
    for name in ("contact_sheet", "metrics_cfg_3", "coefficients_cfg_1.5"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 400 and image.convert("L").getextrema()[0] < 100


def test_goes_on_where_it_was_interrupted(models, evaluated, tmp_path):
    folder, metrics = evaluated
    cells = sorted((folder / "cache" / "cells").iterdir())
    before = {path: path.stat().st_mtime_ns for path in cells}
    cells[3].unlink()
    next((folder / "cache" / "targets").rglob("00001.safetensors")).unlink()
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
    changes = {"solvers": ["ddim"], "guidance_scale": [3.0], "rank_prompts": [2], "grid_prompts": 20}
    result = main(
        [*arguments(models, tmp_path, cache_dir=folder / "cache", **changes), "--extra", *map(json.dumps, extra)]
    )
    rows = {(row["solver"], row["steps"]): row for row in result["rows"]}
    assert rows["pipeline", 4]["metrics"] == rows["unet", 4]["metrics"]
    trailing = rows["ddim", 4]["grids"]["trailing"]
    assert rows["pipeline", 4]["metrics"]["pixels"]["mean"] == pytest.approx(trailing, abs=1e-3)
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
    changes = {"solvers": ["ddim"], "learned": None, "guidance_scale": [3.0], "steps": [3], "rank_prompts": [0]}
    result = main([*arguments(models, tmp_path / "out", **changes), "--extra", *map(json.dumps, extra)])
    values = {row["solver"]: row["metrics"]["pixels"]["mean"] for row in result["rows"] if row["solver"] != "full"}
    assert values["before"] == values["after"] != values["lora"]


def test_frechet_distance_to_other_pictures(models, tmp_path):
    for seed in range(3):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{seed}.png")
    changes = {"reference": tmp_path, "steps": [3], "guidance_scale": [3.0], "rank_prompts": [0]}
    metrics = main(arguments(models, tmp_path / "out", solvers=["ddim"], grid_prompts=20, **changes))
    full = next(row for row in metrics["rows"] if row["solver"] == "full")
    assert full["metrics"]["frechet_dino"]["mean"] > 0
    with pytest.raises(ValueError, match="0 images"):
        list(reference_images(str(tmp_path / "out" / "cache"), 3, (16, 16)))
    scenes = torch.cat(list(reference_images("scenes:test", 3, (64, 64))))
    assert scenes.shape == (3, 3, 64, 64) and 0 <= scenes.min() < scenes.max() <= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": [0]}, r"steps=\[0\]: expected whole numbers"),
        ({"num_prompts": [3, 4, 5]}, "one for each of"),
        ({"main_metric": "clip"}, "main_metric=clip: expected some of the rewards"),
        ({"solvers": ["ddim", "heun"]}, "solver 'heun'"),
        ({"solvers": ["ddim", "ddim"]}, "ddim occur twice"),
        ({"learned": None}, "'base' is the learned one"),
        ({"extra": [json.dumps({"name": "x", "lora": "a", "unet": "b"})]}, "at most one of"),
        ({"extra": [json.dumps({"name": "x", "schedule": "a"})]}, "no schedule; the keys are"),
        ({"scorer": None}, "needs a scorer"),
    ],
)
def test_configs_that_do_not_fit(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(models, tmp_path, **changes))


def test_the_shipped_config_is_understood():
    from trl import TrlParser

    path = Path(__file__).parents[2] / "configs" / "eval_mini_sd.yaml"
    (config,) = TrlParser((EvaluationConfig,)).parse_args_and_config(["--config", str(path)])
    assert len(path.read_text().splitlines()) <= 30
    assert config.num_prompts == [200, 500, 200, 200] and config.reward_models[0] is None
    assert not any(Path(value).is_absolute() for value in (config.model, config.output_dir, config.learned))
    assert torch.tensor(config.guidance_scale).tolist() == [1.5, 3.0, 5.0, 7.5]
