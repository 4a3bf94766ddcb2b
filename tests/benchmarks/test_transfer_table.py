"""Solvers away from where they were trained: what is measured, and the table."""

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from benchmarks import transfer
from benchmarks.transfer import PLACES, Place, bring, gains, measure, table
from evaluation.config import EvaluationConfig
from solver import ConsistencySolverScheduler


@pytest.fixture
def places(flux, tmp_path):
    """A solver of the tiny model, and one of a diffusion model, which has the same policy."""
    knobs = {
        "model": flux, "output_dir": "unused", "learned": "unused", "solvers": ["heun"], "scorer": "unused",
        "columns": [], "scheduler": "FlowMatchEulerDiscreteScheduler", "num_inference_steps": 3, "rewards": ["pixels"],
    }  # fmt: skip
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(knobs))
    own = {
        "here": FlowMatchEulerDiscreteScheduler.from_pretrained(flux, subfolder="scheduler"),
        "elsewhere": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    }
    for name, scheduler in own.items():
        solver = ConsistencySolverScheduler.from_scheduler(scheduler, order=2)
        with torch.no_grad():
            solver.policy.mlp[-1].bias.fill_(0.3)
        solver.save_pretrained(tmp_path / name)
    size = {"height": 32, "width": 32}
    return {name: Place(str(tmp_path / "eval.yaml"), str(tmp_path / name), size) for name in own}


def test_a_policy_is_brought_to_the_other_model(places, tmp_path, monkeypatch):
    assert bring(places["here"].solver, places["here"], tmp_path / "unused") == places["here"].solver
    monkeypatch.setattr(transfer, "CLASSICAL", ["ddim"])
    metrics = measure("elsewhere", "here", places, tmp_path / "out", [3], 2)
    means = {row["solver"]: row["metrics"]["pixels"]["mean"] for row in metrics["rows"] if row["solver"] != "full"}
    (gain,) = gains(metrics)
    assert gain["difference"] == pytest.approx(means["learned"] - means["base"], abs=1e-6)
    assert abs(gain["difference"]) > 0.01
    moved = ConsistencySolverScheduler.from_pretrained(tmp_path / "out" / "elsewhere_on_here" / "solver")
    assert moved.is_flow


def test_gains_say_who_is_ahead_of_all():
    def entry(b, low):
        return {"a": "learned", "b": b, "steps": 5, "metric": "pixels", "difference": 1.0, "ci95": [low, 1.5]}

    (ahead,) = gains({"paired": [entry("base", 0.5), entry("unipc", 0.1)]})
    (behind,) = gains({"paired": [entry("base", 0.5), entry("unipc", -0.1)]})
    assert ahead["ahead_of_all"] and not behind["ahead_of_all"]
    rows = [{"trained": "a", "used": "a", **ahead}, {"trained": "b", "used": "a", **behind}]
    lines = table(rows, "pixels").splitlines()
    assert lines[2:] == [
        "| trained on | a |", "|---|---|", "| a | **+1.00 [+0.50, +1.50]** |", "| b | +1.00 [+0.50, +1.50] |"
    ]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places_are_evaluations_of_the_repository(name):
    place = PLACES[name]
    with open(place.config) as file:
        config = EvaluationConfig(**(yaml.safe_load(file) | place.changes))
    assert config.learned == place.solver or name.endswith("128 px")
    assert {"pixels", "dino"} <= set(config.rewards)
