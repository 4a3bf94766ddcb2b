"""The benchmarks of speed, rehearsed: what they count and write; how long it takes is nothing to test."""

import json
import time
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from benchmarks import clock, hiflow, preview, ralu, solver_step
from solver.samplers.cost import network_of
from solver.samplers.ralu import sampler
from solver.samplers.ralu.plan import stage_tokens
from solver.samplers.ralu.schedule import PRESETS
from tests.flops import flop_counter
from tests.tiny_pipelines import SIZE, WORDS, tiny_pipeline


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
def test_ralu_beside_its_flops(model, presets, tmp_path, capsys):
    report = rows_of(ralu, tmp_path, "--model", model, "--batches", "1", "--plain_steps", "3")
    rows = {row["run"]: row for row in report["rows"]}
    assert [f"RALU {preset}" in rows for preset in presets] == [True] * len(presets)
    assert rows["plain 3"]["speedup"] == rows["plain 3"]["flop_ratio"] == 1
    ratios = [rows[f"RALU {preset}"]["flop_ratio"] for preset in presets]
    assert ratios == sorted(ratios)  # a preset that promises more costs less
    assert report["nt_matching_seconds"] > 0 and report["noise_seconds"] > 0
    assert report["nt_matching_cached_seconds"] < 0.01
    cached = [row for name, row in rows.items() if "TaylorSeer" in name]
    assert report["takes_feature_caches"] == bool(cached) == (model == "flux-dev")
    assert "takes no feature cache" in capsys.readouterr().out or cached
    assert all(row["flop_ratio"] > rows[row["run"].removesuffix(" + TaylorSeer")]["flop_ratio"] for row in cached)


def test_flops_with_taylorseer_are_those_counted():
    """In the transformer, all stages of a run; steps in full as the cache takes them."""
    pipe, call = tiny_pipeline("flux")
    call = {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds", "guidance_scale")}
    schedule = replace(PRESETS["4x"], steps=(5, 4, 8))
    cache, counted, forward = replace(ralu.TAYLOR, taylor_factors_dtype=torch.float32), [], pipe.transformer.forward

    def count(*args, **kwargs):
        with flop_counter() as counter:
            answer = forward(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return answer

    pipe.transformer.forward = count
    sampler.ralu(pipe, None, 7, schedule, SIZE, SIZE, call=call, cache=cache)
    assert ralu.full_steps(schedule.steps) == [4, 3, 5]
    evaluations = list(zip(stage_tokens(schedule, 64), schedule.steps, strict=True))
    row = {"evaluations": evaluations, "decoded": [], "full_steps": ralu.full_steps(schedule.steps)}
    network = network_of(pipe.transformer, pixels=4, text_tokens=WORDS)
    assert ralu.flops(row, network, 1, pipe.transformer) * 1e12 == pytest.approx(sum(counted), rel=1e-9)


def test_the_clock_stops_at_the_networks_own_forward():
    """What later hooks do before and after it is outside, and the clock leaves the answer alone."""

    class Slow(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            time.sleep(0.05)
            return args, kwargs

        def post_forward(self, module, output):
            time.sleep(0.05)
            return output

    network = torch.nn.Linear(2, 2)
    expected = network(torch.ones(1, 2))
    network_clock = clock.NetworkClock(network, torch.device("cpu"))
    HookRegistry.check_if_exists_or_initialize(network).register_hook(Slow(), "slow")
    start = time.perf_counter()
    assert torch.equal(network(torch.ones(1, 2)), expected)
    assert time.perf_counter() - start > 0.1 and 0 < network_clock.seconds() < 0.05
    assert network_clock.seconds() == 0


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
