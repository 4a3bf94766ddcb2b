"""`benchmarks/workflow.py` on tiny models: it runs, counts, and says so."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "rewards"))

from tiny_networks import save_smp_segmentation

from benchmarks.workflow import main


def test_the_workflow_is_measured(models, tmp_path, capsys):
    save_smp_segmentation(tmp_path / "segmentation")
    numbers = {"prompts": 2, "seeds": 2, "steps": 3, "full_steps": 6}
    words = [f"--{name}={number}" for name, number in numbers.items()]
    words += [f"--model={models / 'sd'}", f"--solver={models / 'sd-solver'}", "--device=cpu"]
    words += [f"--checker={tmp_path / 'segmentation'}", f"--output={tmp_path / 'workflow.json'}"]
    rows = main(words)
    assert [row["method"] for row in rows] == ["solver", "few"]
    for row in rows:
        assert row["evaluations_per_picture"] == {"preview": 3, "full": 6}
        assert row["seconds_per_picture"]["full"] > 0
        spent = row["evaluations"]["full_only"]["mean"]  # random pictures hardly pass: then nothing is ever accepted
        assert spent is None or spent >= 6
    assert json.loads((tmp_path / "workflow.json").read_text())["rows"] == rows
    printed = capsys.readouterr().out
    assert "Learned solver, 3 steps" in printed and "Plain few steps, 3 steps" in printed
