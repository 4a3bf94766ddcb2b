"""What is measured of HiFlow's pictures, against numbers worked out by hand; and the command on a tiny FLUX."""

import json
from itertools import islice

import pytest
import torch
from PIL import Image
from tiny_flux import save_tiny_flux

from benchmarks.hiflow_measures import MEANS, edge_sharpness, estimates, low_band_correlation, patches
from benchmarks.hiflow_quality import captioned_scenes, main
from benchmarks.hiflow_report import OTHERS, RENDERED, summary
from benchmarks.hiflow_rows import FULL, Artist, main_rows, variants
from data.prompts import read_prompts
from data.scenes import render_batch
from evaluation.metrics import frechet_distance
from evaluation.rendering import load_pipeline
from solver import ConsistencySolverScheduler
from solver.samplers.hiflow import PRESETS, with_steps
from solver.samplers.hiflow.alignment import enlarge

MAIN_ROWS = ["stock", "direct", "bicubic", "bicubic, sharpened", "A_i", "A_i + A_d", "full"]


@pytest.fixture(scope="module")
def rendered():
    scenes = [scene for scene, _ in islice(captioned_scenes(), 3)]
    return {size: render_batch(scenes, size).image.float() / 255 for size in (32, 64)}


def test_the_scenes_are_those_of_the_captions():
    assert tuple(text for _, text in islice(captioned_scenes(), 40)) == read_prompts("scenes:test", 40).texts


def ramp(width, contrast=1.0):
    """A picture whose left side is dark, and its right side brighter after `width` pixels."""
    profile = ((torch.arange(48) - 24) / width).clamp(0, 1) * contrast
    return profile.expand(1, 3, 48, 48)


@pytest.mark.parametrize("turned", [False, True])
def test_sharpness_of_edges_is_the_contrast_that_a_pixel_crosses(turned):
    for width in (1, 2, 4):
        for contrast in (1.0, 0.3):
            picture = ramp(width, contrast)
            picture = picture.transpose(2, 3) if turned else picture
            assert edge_sharpness(picture, window=9) == pytest.approx(1 / width, abs=1e-5)
    assert edge_sharpness(torch.full((1, 3, 48, 48), 0.5), window=9) == 0


def test_enlarging_makes_edges_softer(rendered):
    soft, sharp = (edge_sharpness(x, window=9) for x in (enlarge(rendered[32], 64, 64), rendered[64]))
    assert (soft < 0.75 * sharp).all()


def test_the_low_band_of_an_enlarged_picture_is_that_of_the_picture(rendered):
    small, large = rendered[32], enlarge(rendered[32], 64, 64)
    stripes = 0.2 * (-1.0) ** torch.arange(64)  # as fine as can be
    torch.testing.assert_close(low_band_correlation(small, small, 0.4), torch.ones(3))
    for same in (large, large + stripes, 0.5 * large + 0.1, rendered[64]):
        assert all((low_band_correlation(same, small, cutoff) > 0.995).all() for cutoff in (0.1, 0.4))
    torch.testing.assert_close(low_band_correlation(1 - small, small, 0.4), -torch.ones(3))
    assert (low_band_correlation(large.roll(1, 0), small, 0.4) < 0.9).all()


def test_patches_are_crops_and_those_of_a_picture_are_the_same_everywhere():
    picture = torch.arange(3 * 12 * 16.0).reshape(1, 3, 12, 16)
    crops = patches(picture, [7], count=5, size=8)
    places = [(y, x) for y in range(5) for x in range(9)]
    for crop in crops[0]:
        assert any(torch.equal(crop, picture[0, :, y : y + 8, x : x + 8]) for y, x in places)
    assert torch.equal(crops, patches(torch.cat([picture * 0, picture]), [3, 7], count=5, size=8)[1:])
    assert patches(picture[..., :12], [0], 2, 12).shape == (1, 2, 3, 12, 12)


def test_identical_pictures_are_at_distance_zero_and_a_shift_of_features_counts_squared():
    draw = torch.Generator().manual_seed(0)
    seen = {"whole": torch.randn(6, 3, generator=draw), "patches": torch.randn(6, 2, 3, generator=draw)}
    seen |= {name: torch.rand(6, generator=draw) for name in MEANS}
    same = estimates(seen, seen)
    moved = estimates({name: value + 2 for name, value in seen.items()}, seen)
    for name in ("frechet", "frechet_patches"):
        assert same[name].value == pytest.approx(0, abs=1e-6)
        assert same[name].ci95 == pytest.approx([0, 0], abs=1e-6)
        assert moved[name].value == pytest.approx(3 * 2**2, abs=1e-5)
    less = moved["edge_sharpness"] - same["edge_sharpness"]
    assert less.ci95 == pytest.approx([2, 2], abs=1e-5)  # paired: every picture has as much more


def test_distances_are_to_the_scenes_of_other_captions():
    draw = torch.Generator().manual_seed(0)
    sets = {name: torch.randn(8, 3, generator=draw) for name in (RENDERED, OTHERS, FULL)}
    seen = {
        name: {"64.whole": x, "64.patches": x[:, None], **{f"64.{mean}": x[:, 0] for mean in MEANS}}
        for name, x in sets.items()
    }
    rows = summary(seen, 64)
    assert list(rows) == [RENDERED, FULL]
    for name, row in rows.items():
        expected = frechet_distance(sets[name], sets[OTHERS])
        assert row["frechet"]["value"] == row["frechet_patches"]["value"] == pytest.approx(expected) != 0


def test_the_command_measures_every_row_and_goes_on_where_it_stopped(tmp_path, capsys):
    model = save_tiny_flux(tmp_path / "flux")
    output = tmp_path / "out"
    arguments = ["--model", str(model), "--sizes", "32", "64", "--output", str(output), "--device", "cpu"]
    arguments += ["--num_prompts", "4", "--batch_size", "2", "--steps", "2", "--patches", "1", "--sheet_rows", "3"]
    report = main([*arguments, "--also", "acceleration", "presets"])
    assert "Budget: 11 rows of 4 pictures" in capsys.readouterr().out
    assert report["gflops"]["64"]["bicubic"] == 0 < report["gflops"]["64"]["full"] < report["gflops"]["64"]["direct"]
    rows = report["results"]["64"]
    assert list(rows) == [
        "rendered",
        *MAIN_ROWS,
        *(f"acceleration {x}" for x in ("eq13", "eq10", "fixed-noise")),
        "paper",
    ]
    assert json.loads((output / "metrics.json").read_text())["results"]["64"] == json.loads(json.dumps(rows))
    assert rows["rendered"]["frechet"]["value"] > 0.01  # from the scenes of others
    assert report["looked_at"] == {"dino": 64, "segmentation": 64}
    assert rows["bicubic"]["low_band"]["value"] > 0.999
    assert "minus_full" not in rows["full"]["frechet"]
    assert report["gflops"]["64"]["bicubic, sharpened"] == 0
    assert rows["bicubic, sharpened"]["edge_sharpness"]["value"] > rows["bicubic"]["edge_sharpness"]["value"]
    bicubic, full = rows["bicubic"]["edge_sharpness"], rows["full"]["edge_sharpness"]
    assert bicubic["minus_full"] == pytest.approx(bicubic["value"] - full["value"])
    with Image.open(output / "contact_sheet_64.png") as sheet:
        assert sheet.height > 3 * 256
    text = (output / "table.md").read_text()
    assert text.count("\n| ") == 1 + len(rows)
    assert "GFLOPs: of one branch" in text and "`stock` is" in text and "other numbers of steps" not in text

    files = {path: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}
    lost = sorted(files)[0]
    lost.unlink()
    again = main(arguments)["results"]["64"]
    assert again["full"] == rows["full"] and "paper" not in again
    kept = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    assert all(files[path] == kept[path] for path in kept if path != lost)


def test_edges_first_costs_less_at_the_last_size_only(tmp_path):
    pipe = load_pipeline(str(save_tiny_flux(tmp_path / "flux")), "float32", "cpu")
    artist, recipe = Artist(pipe, (32, 64, 128), 1.0), with_steps(PRESETS["code"], 18)
    full = next(row for row in main_rows(recipe) if row.name == FULL)
    rows = variants("edges", recipe, pipe, artist.sizes)
    assert len(rows) == 4
    costs = [[artist.gflops(row, size) for size in (64, 128)] for row in (full, *rows)]
    assert {small for small, _ in costs} == {costs[0][0]}
    assert all(large < costs[0][1] for _, large in costs[1:]) and costs[4][1] < costs[3][1] < costs[1][1]


def test_few_steps_of_two_solvers(tmp_path):
    """With a solver that is Euler's rule on the own grid, both rows are one; a policy that moves it draws others."""
    model = save_tiny_flux(tmp_path / "flux")
    pipe = load_pipeline(str(model), "float32", "cpu")
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2, base_rule="ddim")
    solver.save_pretrained(tmp_path / "euler")
    with torch.no_grad():
        solver.policy.mlp[-1].bias.fill_(0.3)
    solver.save_pretrained(tmp_path / "moved")
    arguments = ["--model", str(model), "--sizes", "32", "64", "--device", "cpu", "--num_prompts", "2", "--steps", "4"]
    for name in ("euler", "moved"):
        output = tmp_path / "out"
        report = main([*arguments, "--output", str(output), "--solver", str(tmp_path / name), "--patches", "1"])
        rows = report["results"]["64"]
        assert list(rows)[-4:] == [
            "full, 5 steps",
            "full, 5 steps, learned",
            "full, 8 steps",
            "full, 8 steps, learned",
        ]
        own, learned = (rows[f"full, 8 steps{name}"]["edge_sharpness"]["value"] for name in ("", ", learned"))
        assert (learned == pytest.approx(own, abs=1e-4)) == (name == "euler")
    costs = report["gflops"]["64"]
    assert costs["full, 5 steps"] == costs["full, 5 steps, learned"] < costs["full, 8 steps"]


def test_bad_input(tmp_path, capsys):
    for bad, message in (
        (["--sizes", "64"], "a larger one"),
        (["--num_prompts", "1"], "at least 2"),
        (["--sizes", "32", "48"], "64 px are cut"),
    ):
        with pytest.raises(SystemExit):
            main(["--output", str(tmp_path), *bad])
        assert message in capsys.readouterr().err
