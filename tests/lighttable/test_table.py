"""What runs cost, how they are stopped, whose turn it is, and what is kept of them."""

import threading

import pytest
import torch
from PIL import Image

from evaluation.recipe import METHODS, Recipe
from lighttable import runs
from lighttable.form import Form
from lighttable.form import recipes as recipes_of
from lighttable.table import LightTable, Stopped
from lighttable.visit import Visit
from lighttable.wording import costs, facts_table, saved, scores_table
from tests.flops import flop_counter


def recipes(table, method="few", seeds=(7, 8, 9), **changes):
    solver = table.solver if method in ("solver", "both") else None
    knobs = {"steps": 3, "full_steps": 6, "solver": solver} | changes
    return [Recipe("a red ring", seed, method, **knobs) for seed in seeds]


def counted_flops(table, asked, monkeypatch):
    """Of each evaluation of the network that the recipes take."""
    flops, forward = [], table.pipe.transformer.forward

    def counted(*args, **kwargs):
        with flop_counter() as counter:
            output = forward(*args, **kwargs)
        flops.append(counter.get_total_flops())
        return output

    with monkeypatch.context() as patch:
        patch.setattr(table.pipe.transformer, "forward", counted)
        list(table.make(asked, threading.Event()))
    return flops


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_is_what_a_run_takes(method, flux_table, monkeypatch):
    """To the FLOP, with as many text tokens as the run has."""
    one = {"seeds": (7,), "height": 32, "width": 32, "guidance_scale": 1.0}
    asked = recipes(flux_table, method, **one)
    flops = counted_flops(flux_table, asked, monkeypatch)
    estimate = flux_table.estimate(asked)
    assert estimate.evaluations == len(flops)
    full = max(counted_flops(flux_table, recipes(flux_table, "full", **one), monkeypatch))
    assert estimate.share == pytest.approx(sum(flops) / full / (3 if method == "full" else 6), rel=1e-6)
    assert (min(flops) < 0.9 * full) == (method in ("half", "both"))


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_of_a_refinement_is_what_it_takes(method, flux_table, never):
    (preview,) = flux_table.make(recipes(flux_table, method, seeds=(7,), height=32, width=32), never)
    estimate = flux_table.estimate_refinements([preview.recipe])
    full = flux_table.refine(preview, never)
    assert estimate.evaluations == full.evaluations
    assert estimate.share == pytest.approx(full.evaluations / preview.recipe.full.steps)


def test_methods_are_those_that_the_model_knows(sd_table, flux_table):
    assert flux_table.methods == list(METHODS)
    assert sd_table.methods == ["solver", "few", "full"]
    assert LightTable(sd_table.pipe, "sd").methods == ["few", "full"]


def test_the_size_is_that_of_the_weights(sd_table, flux_table):
    """The FluxPipeline answers 128 latents of 4 pixels, although this autoencoder says 32 pixels."""
    assert sd_table.default_size == (16, 16)
    assert flux_table.pipe.default_sample_size == 128 and flux_table.default_size == (32, 32)
    assert recipes_of(Form("x", candidates=1), flux_table)[0].height == 32


def test_seconds_are_of_this_device(sd_table, never):
    sd_table.warm_up()
    asked = recipes(sd_table)
    guess = sd_table.estimate(asked).seconds
    spent = sum(picture.seconds for picture in sd_table.make(asked, never))
    assert spent / 50 < guess < spent * 50  # the machine may be busy; a wrong unit would be further off
    assert sd_table.estimate(recipes(sd_table, height=32, width=32)).seconds > sd_table.estimate(asked).seconds


def test_a_guided_picture_takes_two_rows(sd_table, monkeypatch):
    monkeypatch.setattr(sd_table, "_seconds", (1.0 / 16**2, 0.0))  # a second a row
    plain, guided = (recipes(sd_table, guidance_scale=scale)[:1] for scale in (1.0, 3.0))
    assert sd_table.estimate(plain).seconds == pytest.approx(plain[0].steps)
    assert sd_table.estimate(guided).seconds == pytest.approx(2 * guided[0].steps)


@pytest.mark.parametrize("name, method", [("sd", "few"), ("flux", "half"), ("flux", "full")])
def test_a_stop_ends_a_run_before_the_next_evaluation(name, method, request, never):
    table = request.getfixturevalue(f"{name}_table")
    size = {"height": 32, "width": 32} if name == "flux" else {}
    asked = recipes(table, method, **size)
    (alone,) = table.make(asked[:1], never)
    stop, shares, made = threading.Event(), [], []

    def tell(share):
        shares.append(share)
        if share > 0.4:  # in the middle of the second picture
            stop.set()

    with pytest.raises(Stopped):
        made.extend(picture.recipe.seed for picture in table.make(asked, stop, tell))
    assert max(shares) < 0.7 and sorted(shares) == shares
    (again,) = table.make(asked[:1], never)  # the device is free, and nothing is left of the run
    assert again.image.tobytes() == alone.image.tobytes()
    stopped_before = threading.Event()
    stopped_before.set()
    with pytest.raises(Stopped):
        next(table.make(asked, stopped_before))


def test_two_visitors_share_the_device_and_nothing_else(sd_table, never, tmp_path):
    alone = {
        seed: p.image.tobytes() for seed, p in zip((7, 8, 9), sd_table.make(recipes(sd_table), never), strict=True)
    }
    visits = [Visit(tmp_path), Visit(tmp_path)]
    inside, most = [], []

    def work(visit, seeds):
        for _ in runs.sheet(sd_table, visit, recipes(sd_table, seeds=seeds), threading.Event(), tell):
            pass

    def tell(share):
        inside.append(threading.get_ident())
        most.append(sd_table._device.locked())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(visits, ((7, 8), (9, 8)), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(inside)) == 2 and all(most)
    for visit, seeds in zip(visits, ((7, 8), (9, 8)), strict=True):
        assert [kept.recipe.seed for kept in visit.sheet] == list(seeds)
        assert all(kept.picture().image.tobytes() == alone[kept.recipe.seed] for kept in visit.sheet)
        assert {path.name for path in visit.folder.glob("*.png")} == {kept.path.name for kept in visit.history}
    assert visits[0].folder != visits[1].folder and len(visits[0].folder.name) >= 32
    visits[0].end()
    assert not visits[0].folder.exists() and visits[1].sheet[0].path.exists()
    with pytest.raises(Stopped):  # a run that had not noticed yet writes nothing
        visits[0].keep(visits[1].sheet[0].picture())


def test_a_stop_while_waiting_for_the_device(sd_table):
    stop = threading.Event()
    with sd_table._turn(stop):
        timer = threading.Timer(0.2, stop.set)
        timer.start()
        with pytest.raises(Stopped):
            next(sd_table.make(recipes(sd_table), stop))


def test_refinements_and_comparisons_are_kept(sd_table, never, tmp_path, monkeypatch):
    visit, tell = Visit(tmp_path), lambda share: None
    *_, sheet = runs.sheet(sd_table, visit, recipes(sd_table, "solver"), never, tell)
    *_, refined = runs.refinements(sd_table, visit, [0, 2], never, tell)
    assert [pair.preview for pair in refined] == [sheet[0], sheet[2]]
    first = refined[0]
    assert first.full.recipe == sheet[0].recipe.full and first.scores.keys() == {"pixels"}
    one, other = first.side_by_side()
    x, y = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double() for image in (one, other))
    assert first.scores["pixels"] == pytest.approx(float(10 * torch.log10(255**2 / (x - y).square().mean())), abs=1e-3)
    assert len(list(runs.refinements(sd_table, visit, [0], never, tell))[-1]) == 2  # again is not twice

    rows = [recipes(sd_table, method, seeds=(7, 8)) for method in ("solver", "few")]
    *_, made = runs.comparison(sd_table, visit, rows, never, tell)
    assert [[kept.recipe for kept in row] for row in made] == rows
    assert made[0][0].picture().image.tobytes() == sheet[0].picture().image.tobytes()
    assert len(visit.history) == 3 + 2 + 1 + 4

    monkeypatch.setattr("lighttable.visit.MOST_KEPT", 4)
    visit.keep(sheet[0].picture())
    assert all(kept.path.is_file() for kept in (*visit.sheet, *(one.full for one in visit.refined)))  # still needed
    visit.sheet, visit.refined = [], []
    visit.keep(sheet[0].picture())
    assert len(visit.history) == len(list(visit.folder.glob("*.png"))) == 4


def test_scores_of_a_half_size_preview(sd_table):
    small = Image.new("RGB", (2, 2), (10, 20, 30))
    assert sd_table.scores(small, small.resize((4, 4)))["pixels"] == 100


def test_what_a_visitor_typed_is_text(sd_table):
    script = '<script>alert("1")</script>'
    for html in (facts_table({"prompt": script}), scores_table([(script, {script: 1.0})])):
        assert "<script" not in html and "&lt;script&gt;" in html


def test_sentences(sd_table, flux_table):
    estimate = sd_table.estimate(recipes(sd_table))._replace(seconds=100)
    assert (
        costs(estimate)
        == "3 pictures, 9 network evaluations (guidance counts once), about 2 min: 50% of the work of 3 full renders."
    )
    assert saved(estimate, [6], 6) == "The sheet and 1 refinement took 83% of the work of 3 full renders: 17% saved."
