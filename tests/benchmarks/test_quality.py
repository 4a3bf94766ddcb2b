"""The measurements of previews and of RALU on a tiny FLUX: all rows, and numbers that follow from the settings."""

import json
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks.quality import pooled_latents, preview, ralu
from benchmarks.quality.command import REWARDS
from benchmarks.quality.ledger import kept_account
from evaluation.rendering import load_pipeline
from solver import ConsistencySolverScheduler
from solver.prompt_embeddings import PromptEmbeddings
from solver.samplers.calls import guidance
from solver.samplers.cost import evaluation_flops
from solver.samplers.latents import decode, latent_shape
from solver.samplers.ralu.plan import as_schedule
from solver.samplers.ralu.schedule import Schedule
from tests.flops import flop_counter

BRANCHES = 2  # prompt and empty prompt
FULL, SMALL = 64, 16  # tokens of 64 and of 32 pixels
SAME = dict.fromkeys(REWARDS, 100) | {"depth": 80, "check_agreement": 100}
FILES = ("metrics.json", "table.md", "figure.png", "contact_sheet.png")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(report):
    return {row["name"]: row for row in report["rows"]}


def calls(*pairs):
    """By tokens, of pairs (tokens, evaluations)."""
    return {tokens: BRANCHES * evaluations for tokens, evaluations in pairs}


def check_files(folder, report):
    assert all((folder / name).stat().st_size > 0 for name in FILES)
    assert [row["name"] for row in json.loads((folder / "metrics.json").read_text())["rows"]] == list(rows_of(report))


def check_full_run(row, steps):
    for name, value in SAME.items():
        assert row["metrics"][name]["mean"] == pytest.approx(value, abs=1e-4)
    assert row["calls"] == calls((FULL, steps)) and row["full_over_this"] == 1


def test_preview(flux, arguments, tmp_path, capsys):
    own = load_pipeline(flux, "float32", "cpu").scheduler
    ConsistencySolverScheduler.from_scheduler(own, order=3).save_pretrained(tmp_path / "solver")
    arguments += ["--output", str(tmp_path), "--solver", str(tmp_path / "solver"), "--num_prompts", "2"]
    report = preview.main([*arguments, "--seeds_each", "2"])
    rows = rows_of(report)
    check_files(tmp_path, report)
    check_full_run(rows["full run"], steps=6)
    assert rows["full run"]["metrics"]["rank"]["mean"] == rows["full run"]["metrics"]["top1"]["mean"] == 1
    assert report["pictures"] == 4 and report["prompts"] == 2

    # D = 2, m = 1 of 6 steps; 4 candidates, one of which is the first small step
    assert rows["direct small"]["calls"] == calls((SMALL, 6))
    assert rows["naive nearest"]["calls"] == calls((SMALL, 4), (FULL, 2))
    for name in ("ours", "argmax", "argmin, no guidance", "argmin of phases"):
        assert rows[name]["calls"] == calls((SMALL, 4 + 4 - 1), (FULL, 3))
    for name in ("random", "nearest"):
        assert rows[name]["calls"] == calls((SMALL, 4), (FULL, 3))
    assert rows["ours, D = 3"]["calls"] == calls((SMALL, 4 + 3 - 1), (FULL, 4))
    assert rows["mean, D = 0"]["calls"] == calls((SMALL, 6))
    assert rows["mean, 8 small steps of dpmpp2m, D = 1"]["calls"] == calls((SMALL, 8), (FULL, 1))
    assert rows["mean, 8 small steps of dpmpp2m, D = 1, guidance"]["calls"] == calls((SMALL, 8), (FULL, 2))
    assert rows["direct small, 8 steps of learned"]["calls"] == calls((SMALL, 8))
    steps = report["equal_steps"]
    for solver in ("Euler", "DPM-Solver++(2M)", "learned"):
        assert rows[f"{solver}, {steps} steps"]["calls"] == calls((FULL, steps))
    equal = rows[f"Euler, {steps} steps"]
    assert equal["gflops"] == pytest.approx(rows["ours"]["gflops"], abs=0.5 * rows["full run"]["gflops"] / 6)
    assert equal["differences"]["pixels"]["mean"] == pytest.approx(
        equal["metrics"]["pixels"]["mean"] - rows["ours"]["metrics"]["pixels"]["mean"]
    )

    text = (tmp_path / "table.md").read_text()
    few = preview.main([*arguments, "--seeds_each", "2", "--rows", "naive nearest"])
    assert list(rows_of(few)) == ["full run", "naive nearest", "ours"]
    assert rows_of(few)["naive nearest"]["metrics"] == rows["naive nearest"]["metrics"]
    with pytest.raises(ValueError, match="--rows nearly nearest: there are full run, Euler"):
        preview.main([*arguments, "--rows", "nearly nearest"])

    # the bars: one line a pair, and the cheapest row that ours is ahead of in no metric
    less = rows["ours"]["metrics"]["pixels"]["mean"] - rows["naive nearest"]["metrics"]["pixels"]["mean"]
    assert (
        f"| ours - naive nearest | {less:+.2f} [" in text and "| argmin, no guidance - random, no guidance |" in text
    )
    assert "| cheapest half-size row that ours is ahead of in no metric: " in text

    # with and without guidance the candidate is the same
    norms = report["commutators"]
    assert norms["ours"]["at_switch"] == norms["argmin, no guidance"]["at_switch"]
    assert norms["argmax"]["at_switch"][0] > norms["ours"]["at_switch"][0]
    assert norms["ours"]["after"] == norms["argmin, no guidance"]["after"]  # m = 1: nothing is corrected before

    capsys.readouterr()
    assert preview.main([*arguments, "--seeds_each", "2"]) == report
    assert "are there" in capsys.readouterr().out


@pytest.mark.parametrize("command", [preview, ralu])
def test_bfloat16(command, flux, arguments, tmp_path, capsys):
    """Stored in bfloat16, a model has the same values in both types: they must not share a cache."""
    load_pipeline(flux, "bfloat16", "cpu").save_pretrained(tmp_path / "flux")
    arguments += ["--model", str(tmp_path / "flux")]
    arguments += ["--num_prompts", "2", "--dtype", "bfloat16"]
    arguments += ["--output", str(tmp_path)]
    report = command.main(arguments)
    check_full_run(rows_of(report)["full run"], steps=6)
    assert report["dtype"] == "bfloat16" and "bfloat16" in (tmp_path / "table.md").read_text()
    assert "are there" not in capsys.readouterr().out
    again = command.main([*arguments, "--dtype", "float32"])  # nothing is taken from the other cache
    assert "are there" not in capsys.readouterr().out and again["dtype"] == "float32"


def test_sweep_of_guided_steps_and_strengths(flux):
    paint = preview.Painter(load_pipeline(flux, "float32", "cpu"), FULL, 30, 3.0)
    rows = {row.name: row for row in preview.rows_of(paint, gain=((1.0,) * 8, (0.0,) * 8), sweep=True)}
    assert len([name for name in rows if "κ" in name]) == 16 + 9
    assert rows["ours, m = 5, κ = 2"].facts == rows["ours"].facts  # the paper's setting
    assert rows["ours"].facts["options"]["switch"] == 10


def test_ralu(arguments, tmp_path):
    report = ralu.main([*arguments, "--output", str(tmp_path), "--ablations", "--num_prompts", "2"])
    rows = rows_of(report)
    assert report["dtype"] == "float32"
    check_files(tmp_path, report)
    check_full_run(rows["full run"], steps=6)
    assert rows["full run"]["metrics"]["frechet_full"]["mean"] == pytest.approx(0, abs=1e-6)
    assert {row.split(",")[0] for row in ralu.ABLATIONS} <= {name.split(",")[0] for name in rows}

    # 0.3, 0.2, 0.1 of 16 cells have 4, 3, 1 fine ones, of 3 tokens more
    assert rows["RALU 4x"]["calls"] == calls((SMALL, 5), (SMALL + 12, 6), (FULL, 7))
    assert rows["RALU 5x"]["calls"] == calls((SMALL, 4), (SMALL + 9, 5), (FULL, 6))
    assert rows["RALU 7x"]["calls"] == calls((SMALL, 2), (SMALL + 3, 3), (FULL, 5))
    assert rows["Bottleneck (4, 13, 8)"]["calls"] == calls((SMALL, 10), (FULL, 4 + 5))
    # each stage of the loss against the next
    assert rows["plain, 18 steps"]["calls"] == rows["4x, all in full"]["calls"] == calls((FULL, 18))
    assert rows["4x, only the first small"]["calls"] == calls((SMALL, 5), (FULL, 13))
    for steps, preset in ((18, "4x"), (10, "7x")):
        chain = [
            f"plain, {steps} steps",
            f"{preset}, all in full",
            f"{preset}, only the first small",
            f"RALU {preset}",
        ]
        assert [rows[name]["against"] for name in chain[:-1]] == chain[1:]
    step = rows["full run"]["gflops"] / 6
    for preset in ("4x", "7x"):
        mine = rows[f"RALU {preset}"]
        for rival in (row for row in rows.values() if row["against"] == mine["name"] and row["curve"]):
            if rival["curve"] in ("plain", "naive upsampling"):
                assert rival["gflops"] == pytest.approx(mine["gflops"], abs=0.5 * step)
            assert rival["differences"].keys() == rival["metrics"].keys()
    r = rows["r = 0.5"]["calls"]
    assert r == calls((SMALL, 5), (SMALL + 24, 6), (FULL, 7))
    (decoding,) = {entry["small_decoding_in_full_steps"] for entry in report["schedules"].values()}
    assert (tmp_path / "table.md").read_text().count(f"| {decoding:.2f} |\n") == 3


@pytest.fixture
def painter(flux):
    """Of FLUX's real shift at 1024 px."""
    pipe = load_pipeline(flux, "float32", "cpu")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.158)
    return ralu.Painter(pipe, 64)


def test_every_ablation_of_ralu_changes_something(painter):
    """No row repeats the one that it is compared with, nor another; distances and Z are those in their names."""
    schedules = {preset: as_schedule(preset, shift=painter.shift) for preset in ralu.SHOWN}
    rows = {row.name: row for row in ralu.rows_of(painter, 30, schedules, ablations=True)}
    facts = [json.dumps(row.facts, sort_keys=True) for row in rows.values() if row.facts["function"] == "ralu"]
    assert len(set(facts)) == len(facts) == 3 + len(ralu.ABLATIONS) + len(ralu.RATIOS) + len(ralu.DISTANCES) + 5
    solved = {name: Schedule(**row.facts["preset"]) for name, row in rows.items() if "preset" in row.facts}
    mine, best = solved["RALU 4x"], solved["best match, whatever Z"]
    assert best.js_distance < 0.0162 < mine.js_distance and best.Z > mine.Z
    for distance in ralu.DISTANCES:
        assert solved[f"smallest Z at JS {distance}"].js_distance == pytest.approx(distance, abs=2e-4)
    assert 2 < solved["smallest Z at JS 0.04"].Z < solved["smallest Z at JS 0.026"].Z < mine.Z
    least, unscaled = rows["Z = 2"], rows["Z = 2, noise not scaled"]
    assert solved[least.name] == solved[unscaled.name] and solved[least.name].c == 0.25
    assert least.against == "RALU 4x" and unscaled.against == "Z = 2"
    assert not unscaled.facts["choices"]["scaled_noise"]


def test_ablations_that_come_out_alike_are_one_row(painter):
    """At a shift of 1.65 no Z comes as close as 0.026 or 0.032: both would be the best match."""
    schedules = {preset: as_schedule(preset, shift=1.6487) for preset in ralu.SHOWN}
    names = [row.name for row in ralu.rows_of(painter, 30, schedules, ablations=True)]
    assert "best match, whatever Z" in names and "smallest Z at JS 0.04" in names
    assert not {"smallest Z at JS 0.026", "smallest Z at JS 0.032"} & {*names}


def test_flops_of_decoding_for_edges(painter):
    """Of a quarter of the pixels; guided, a step is one of two branches."""
    with flop_counter() as counter:
        decode(painter.pipe, torch.zeros(1, *latent_shape(painter.pipe, 32, 32)))
    step = evaluation_flops(painter.network, FULL)
    assert painter.small_decoding_steps(1.0) == counter.get_total_flops() / step
    assert painter.small_decoding_steps(4.0) == painter.small_decoding_steps(1.0) / 2


def test_ledger_answers_once_and_counts_twice(flux):
    pipe = load_pipeline(flux, "float32", "cpu")
    call = {**PromptEmbeddings(pipe)(["a red ring"]), **guidance(pipe, 3.0)}
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}

    def latents(seed):
        return pipe(**call, **settings, generator=torch.Generator().manual_seed(seed)).images

    alone = latents(0)
    with kept_account(pipe) as ledger:
        bills = []
        for seed in (0, 0, 1):
            with ledger.bill(1) as bill:
                made = latents(seed)
            bills.append(bill)
            assert torch.equal(made, alone) == (seed == 0)
    assert [bill.calls for bill in bills] == 3 * [{16: 4}]
    assert [sum(bill.made.values()) for bill in bills] == [4, 0, 4]
    assert torch.equal(latents(0), alone) and not pipe.transformer._diffusers_hook.hooks


class Doubling:
    """An encoder whose latents are the means of 4 x 4 pixels, and twice that of pictures of 32 pixels."""

    device, dtype = torch.device("cpu"), torch.float32
    config = types.SimpleNamespace(scaling_factor=1.5, get={"shift_factor": 0.1}.get)

    def encode(self, x_BCHW):
        z = F.avg_pool2d(x_BCHW, 4) * (2 if x_BCHW.shape[-1] == 32 else 1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: z))


def test_gain_of_pooled_latents():
    """(2 z - 0.1) · 1.5 = 2 · (z - 0.1) · 1.5 + 0.15."""
    found = pooled_latents.measure(types.SimpleNamespace(vae=Doubling()), 64, 4, batch_size=3)
    assert found["gain"][0] == pytest.approx((2, 2, 2), abs=1e-3)
    assert found["gain"][1] == pytest.approx((0.15, 0.15, 0.15), abs=1e-3)
    assert max(found["with_gain"]) < 1e-3 < 0.4 < min(found["relative_error"])
    assert found["correlation"] == pytest.approx([1, 1, 1], abs=1e-2)
