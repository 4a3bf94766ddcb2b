"""The benchmarks of speed, rehearsed: what they count and write; how long it takes is nothing to test."""

import json

import pytest

from benchmarks import hiflow, preview, ralu, solver_step


def rows_of(benchmark, folder, *arguments) -> dict:
    path = folder / "new" / "report.json"
    benchmark.main(["--output", str(path), "--repeats", "1", *arguments])
    return json.loads(path.read_text())


@pytest.mark.parametrize("family", ["flux-dev", "sd35-large", "hunyuan-video"])
def test_previews_beside_their_bare_calls(family, tmp_path):
    report = rows_of(preview, tmp_path, "--families", family, "--steps", "6")
    calls = {row["run"]: row["network_calls"] for row in report["rows"]}
    # A third of the steps and the switch at full size, the four candidates and the rest at half
    assert calls == {"full": {"full": 6}, "preview": {"full": 3, "small": 7}, "refine": {"full": 3}}
    assert all(row["bare_s"] > 0 and row["seconds"] > 0 for row in report["rows"])
    assert report["dtype"] == "float32" and report["tiny"] and report["torch"]


@pytest.mark.parametrize(
    ("model", "presets"),
    [
        pytest.param("flux-dev", ["4x", "5x", "7x"], marks=pytest.mark.slow),  # with caches: twice as many runs
        ("sd35-large", ["2x", "3x"]),
    ],
)
def test_ralu_beside_its_flops(model, presets, tmp_path):
    report = rows_of(ralu, tmp_path, "--model", model, "--batches", "1", "--plain_steps", "3")
    rows = {row["run"]: row for row in report["rows"]}
    assert [f"RALU {preset}" in rows for preset in presets] == [True] * len(presets)
    assert rows["plain 3"]["speedup"] == rows["plain 3"]["flop_ratio"] == 1
    ratios = [rows[f"RALU {preset}"]["flop_ratio"] for preset in presets]
    assert ratios == sorted(ratios)  # a preset that promises more costs less
    assert report["nt_matching_seconds"] > 0


def test_hiflow_stage_by_stage(tmp_path):
    report = rows_of(hiflow, tmp_path)
    assert [(stage["size"], stage["steps"]) for stage in report["stages"]] == [(64, 4), (128, 2), (256, 1)]
    rate, alone = report["stages"][-1]["tflops_s"], report["attention_tflops_s"]
    assert report["of_attention_percent"] == pytest.approx(100 * rate / alone)
    parts = report["network_s"] + report["autoencoder_s"] + report["outside_s"]
    assert parts == pytest.approx(report["total_s"])


def test_the_step_of_the_solver_beside_an_evaluation(tmp_path):
    arguments = ["--families", "sd15", "--teacher_steps", "2", "--batch", "1", "--group", "2", "--steps", "2"]
    (row,) = rows_of(solver_step, tmp_path, *arguments)["rows"]
    assert row["step_percent"] == pytest.approx(100 * row["step_ms"] / row["evaluation_ms"])
    assert row["rollouts_per_s"] > 0 and row["images_per_s"] > 0
