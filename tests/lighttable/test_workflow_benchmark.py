"""`benchmarks/workflow.py` on tiny models: it runs, counts, and says so."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "rewards"))

from tiny_networks import save_smp_segmentation

from benchmarks.workflow import _interval, main
from evaluation.recipe import Recipe, options


def words(models, tmp_path, name):
    save_smp_segmentation(tmp_path / "segmentation")
    numbers = {"prompts": 2, "seeds": 2, "steps": 3, "full_steps": 6}
    return [
        *(f"--{name}={number}" for name, number in numbers.items()),
        *(f"--model={models / name}", f"--solver={models / f'{name}-solver'}", "--device=cpu"),
        *(f"--checker={tmp_path / 'segmentation'}", f"--output={tmp_path / 'workflow.json'}"),
    ]


def test_the_workflow_is_measured(models, tmp_path, capsys):
    rows = main(words(models, tmp_path, "sd"))
    assert [row["method"] for row in rows] == ["solver", "few"]
    for row in rows:
        assert row["evaluations_per_picture"] == {"preview": 3, "full": 6, "refine": 6}
        assert row["seconds_per_picture"]["full"] > 0
        spent = row["evaluations"]["full_only"]["mean"]  # random pictures hardly pass: then nothing is ever accepted
        assert spent is None or spent >= 6
    assert json.loads((tmp_path / "workflow.json").read_text())["rows"] == rows
    printed = capsys.readouterr().out
    assert "Learned solver, 3 steps" in printed and "Plain few steps, 3 steps" in printed


def test_half_size_previews_are_finished_for_what_is_left(models, tmp_path):
    (row,) = main([*words(models, tmp_path, "flux"), "--methods=half"])
    begun = options(Recipe("x", 0, "half", 3, 6)).full_steps
    assert row["evaluations_per_picture"] == {"preview": begun + 4, "full": 6, "refine": 6 - begun}


def test_the_table_says_what_never_comes():
    assert _interval({"mean": 86.04, "ci95": [40.0, None]}, ".4g") == "86.04 [40, never]"
    assert _interval({"mean": 0.68, "ci95": [None, 0.8]}, ".0%", "?") == "68% [?, 80%]"
