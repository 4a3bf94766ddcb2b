"""Solvers away from where they were trained: what is measured, and the table."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from benchmarks import transfer
from benchmarks.transfer import PLACES, Place, bring, evaluation_of, gains, own_scheduler, table, with_solvers
from evaluation.config import EvaluationConfig
from evaluation.run import evaluate
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
    return {name: Place(str(tmp_path / "eval.yaml"), str(tmp_path / name), 3.0, changes=size) for name in own}


def test_a_policy_is_brought_to_the_other_model(places, tmp_path):
    assert bring(places["here"].solver, places["here"], tmp_path / "unused") == places["here"].solver
    metrics = evaluate(evaluation_of("elsewhere", "here", places, tmp_path / "out", [3], 2, "float32"))
    means = {row["solver"]: row["metrics"]["pixels"]["mean"] for row in metrics["rows"] if row["solver"] != "full"}
    (gain,) = gains(metrics)
    assert gain["higher_is_better"]
    assert gain["difference"] == pytest.approx(means["learned"] - means["base"], abs=1e-6)
    assert abs(gain["difference"]) > 0.01
    moved = ConsistencySolverScheduler.from_pretrained(tmp_path / "out" / "elsewhere_on_here" / "solver")
    assert moved.is_flow


def test_a_place_takes_another_solver(places, tmp_path):
    changed = with_solvers(places, [f"here={tmp_path}"])
    assert changed["here"].solver == str(tmp_path) and changed["elsewhere"] == places["elsewhere"]
    with pytest.raises(ValueError, match="--solver here=a/typo: there is no folder a/typo"):
        with_solvers(places, ["here=a/typo"])
    for wrong in ("nowhere=runs/other", "here"):
        with pytest.raises(ValueError, match=rf"--solver {wrong}: expected PLACE=FOLDER with one of \['here', 'els"):
            with_solvers(places, [wrong])


def paired(metric, higher_is_better, **intervals):
    """Of the learned solver minus each other one, as metrics.json has it."""
    facts = {"a": "learned", "steps": 5, "metric": metric, "difference": 1.0}
    return {
        "paired": [{**facts, "b": name, "ci95": interval} for name, interval in intervals.items()],
        "metrics": {metric: {"higher_is_better": higher_is_better}},
    }


def test_a_place_without_a_solver_of_its_own(places, flux, tmp_path):
    empty = replace(places["here"], solver=str(tmp_path / "nothing"))
    assert isinstance(own_scheduler(empty), FlowMatchEulerDiscreteScheduler)
    assert bring(places["here"].solver, empty, tmp_path / "unused") == places["here"].solver
    moved = ConsistencySolverScheduler.from_pretrained(bring(places["elsewhere"].solver, empty, tmp_path / "moved"))
    assert moved.is_flow


def test_the_base_grid_is_the_places(places, tmp_path, monkeypatch):
    """Whether or not a solver was trained there."""
    own = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    monkeypatch.setattr(transfer, "own_scheduler", lambda place: own)
    for spacing in ("trailing", "leading"):
        place = replace(places["elsewhere"], base_grid={"timestep_spacing": spacing})
        moved = ConsistencySolverScheduler.from_pretrained(bring(places["here"].solver, place, tmp_path / spacing))
        assert moved.config.timestep_spacing == spacing


def test_gains_say_who_is_ahead_of_all():
    (ahead,) = gains(paired("pixels", True, base=[0.5, 1.5], unipc=[0.1, 1.5]))
    (behind,) = gains(paired("pixels", True, base=[0.5, 1.5], unipc=[-0.1, 1.5]))
    assert ahead["ahead_of_all"] and not behind["ahead_of_all"]
    rows = [{"trained": "a", "used": "a", **ahead}, {"trained": "b", "used": "a", **behind}]
    lines = table(rows, "pixels").splitlines()
    assert lines[0] == "### 5 steps, pixels"
    assert lines[2:] == [
        "| trained on | a |", "|---|---|", "| a | **+1.00 [+0.50, +1.50]** |", "| b | +1.00 [+0.50, +1.50] |"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "unipc, ahead", [([-0.9, -0.1], True), ([-0.9, 0.1], False), ([0.1, 0.9], False)], ids=["below", "near", "above"]
)
def test_ahead_is_below_where_low_is_better(unipc, ahead):
    (gain,) = gains(paired("frechet_dino", False, base=[-0.9, -0.5], unipc=unipc))
    assert gain["ahead_of_all"] == ahead
    assert table([{"trained": "a", "used": "a", **gain}], "frechet_dino").startswith("### 5 steps, frechet_dino ↓\n")


def test_the_report_says_what_it_ran_on(tmp_path, monkeypatch, capsys):
    run = {"hardware": "abacus", "dtype": "float32", "autocast": False, "batch_size": 50}
    metrics = paired("pixels", True, base=[0.5, 1.5]) | run | {"versions": {"torch": "2", "diffusers": "1"}}
    places = {name: Place("unused", str(tmp_path), 3.0) for name in ("a", "b")}
    monkeypatch.setattr(transfer, "PLACES", places)
    monkeypatch.setattr(transfer, "evaluation_of", lambda *_: SimpleNamespace(rewards=["pixels"]))
    monkeypatch.setattr("evaluation.run.evaluate", lambda config: metrics)
    monkeypatch.setattr("sys.argv", ["transfer", "--metrics", "pixels", "--output", str(tmp_path)])
    transfer.main()
    report = (tmp_path / "transfer.md").read_text()
    assert "\n\nabacus, float32, batches of 50, torch 2, diffusers 1.\n\n### 5 steps, pixels\n" in report
    assert f"Solvers: a: {tmp_path}, b: {tmp_path}." in report
    assert json.loads((tmp_path / "transfer.json").read_text())["solvers"] == {"a": str(tmp_path), "b": str(tmp_path)}
    assert capsys.readouterr().out.startswith(report)
    monkeypatch.setattr("sys.argv", ["transfer", "--metrics", "pixels", "dinno", "--output", str(tmp_path)])
    monkeypatch.setattr("evaluation.run.evaluate", None)  # said before anything is measured
    with pytest.raises(SystemExit):
        transfer.main()
    assert "--metrics dinno: not a reward of every place" in capsys.readouterr().err


@pytest.mark.parametrize("name", PLACES)
def test_places_are_evaluations_of_the_repository(name):
    place = PLACES[name]
    with open(place.config) as file:
        config = EvaluationConfig(**(yaml.safe_load(file) | place.changes))
    assert config.learned == place.solver or name.endswith("128 px")
    assert {"pixels", "dino"} <= set(config.rewards)
