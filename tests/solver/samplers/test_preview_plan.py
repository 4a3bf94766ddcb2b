"""The arithmetic of previews: operators, signs, grids, costs. No pipeline is built."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sample import main
from solver.samplers.preview.explain import FAMILIES, as_table, explain
from solver.samplers.preview.guidance import Guidance, reevaluated
from solver.samplers.preview.operators import move_image, move_noise, translate, warp
from solver.samplers.preview.options import PreviewOptions
from solver.samplers.preview.selection import (
    block_mean,
    choose,
    choose_blockwise,
    mean_sigma,
    norms,
    of_chosen,
    phases,
    random_selections,
    split,
    subsample,
)

PAPER = partial(PreviewOptions, method="subsample")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale, unit", [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("family", ["random", "phases"])
def test_candidates_keep_every_element_once(family, scale, unit):
    """Σ D_kᵀ D_k = I: the candidates' elements together are all elements, each once."""
    height, width = 8 * unit, 16 * unit
    x = torch.arange(2 * 3 * height * width).view(2, 3, height, width).float()
    size = (height // unit, width // unit)
    index = random_selections([3, 4], *size, scale) if family == "random" else phases(2, *size, scale)
    parts = [subsample(x, k, scale, unit) for k in index]
    assert len(parts) == scale**2 and parts[0].shape == (2, 3, height // scale, width // scale)
    for b in range(2):
        together = torch.cat([part[b].flatten() for part in parts])
        assert torch.equal(together.sort().values, x[b].flatten())
    if unit == 2:  # tokens stay whole: a 2 x 2 patch of the small latent is one of the large
        patches = parts[0].unfold(2, 2, 2).unfold(3, 2, 2)[..., 0, 0]
        assert torch.equal(parts[0][..., 1::2, 1::2], patches + width + 1)


def test_operators_belong_to_the_seed():
    together = random_selections([3, 4], 8, 8, 2)
    assert torch.equal(together[:, 1:], random_selections([4], 8, 8, 2))
    assert not torch.equal(together[:, 0], together[:, 1])
    counts = random_selections([5], 256, 256, 2)[0].flatten().bincount(minlength=4)
    assert (counts / counts.sum() - 0.25).abs().max() < 0.01  # no phase is preferred


def test_operators_do_not_repeat_the_noise():
    """The CPU generator reads 32 bits of a seed: a stream that differs above them is the noise again."""
    noise_order = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(7)).argsort(dim=-1).movedim(-1, 0)
    assert not torch.equal(random_selections([7], 8, 8, 2)[:, 0], noise_order)


def test_phases_are_strides():
    x = noise(1, 2, 6, 6)
    assert torch.equal(subsample(x, phases(1, 6, 6, 2)[0], 2), x[..., ::2, ::2])
    assert torch.equal(subsample(x, phases(1, 6, 6, 3)[5], 3), x[..., 1::3, 2::3])


def test_choices():
    commutators = torch.stack([torch.full((2, 1, 2, 2), value) for value in (3.0, 1.0, 2.0)])
    commutators[0, 1] = 0.5
    assert choose("argmin", commutators, [0, 0]).tolist() == [1, 0]
    assert choose("argmax", commutators, [0, 0]).tolist() == [0, 2]
    drawn = [choose("random", commutators, [seed, seed]).tolist() for seed in range(30)]
    assert {a for a, _ in drawn} == {0, 1, 2} and all(a == b for a, b in drawn)
    assert torch.equal(
        of_chosen(commutators, torch.tensor([2, 0])), torch.stack([commutators[2, 0], commutators[0, 1]])
    )
    commutators[2, 0, 0, 1, 1] = 0.1
    index = torch.stack([torch.full((2, 2, 2), k) for k in range(3)])
    assert choose_blockwise(commutators, index).tolist() == [[[1, 1], [1, 2]], [[0, 0], [0, 0]]]


def test_the_mean_of_white_noise():
    """Variance 1/4, neighbours uncorrelated; the level of the mean and its way back."""
    small = block_mean(noise(4, 4, 256, 256), 2)
    assert small.var().item() == pytest.approx(0.25, rel=0.01)
    assert abs((small[..., 1:] * small[..., :-1]).mean() / small.var()) < 0.01
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    below = mean_sigma(sigmas, 2)
    torch.testing.assert_close(below, sigmas / (2 - sigmas))
    torch.testing.assert_close(2 * below / (1 + below), sigmas)
    assert float(mean_sigma(torch.tensor(0.863), 2)) == pytest.approx(0.759, abs=1e-3)  # 0.760 of a rounded 0.863


def test_the_split_recombines():
    x, u, sigma = noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1), 0.8
    image, eps = split(x, u, sigma)
    torch.testing.assert_close((1 - sigma) * image + sigma * eps, x)
    torch.testing.assert_close(eps - image, u)


@pytest.mark.parametrize("variance", [9.0, 0.05])
def test_the_sign_contracts_strong_modes(variance):
    """A Gaussian mode of variance p: one correction multiplies its error by 1 - α (t p - σ) / (t² p + σ²)."""
    sigma, alpha = 0.863, 0.04
    t = 1 - sigma
    factor = 1 - alpha * (t * variance - sigma) / (t**2 * variance + sigma**2)
    assert (factor < 1) == (variance > 6.3)  # t p > σ contracts, the rest expands a little

    def velocity(x):  # E[noise - image | x] of x = t image + σ noise
        return (sigma - t * variance) / (t**2 * variance + sigma**2) * x

    right, error = noise(1, 1, 8, 8), 0.3 * noise(1, 1, 8, 8, seed=1)
    guidance = Guidance([alpha], lambda now: velocity(right))
    corrected, _ = guidance(right + error, sigma, 0.84, velocity(right + error))
    torch.testing.assert_close(corrected - right, factor * error)
    assert guidance(right, sigma, 0.84, velocity(right)) is None  # one strength, one correction


def test_kappa_one_takes_the_step_with_the_target():
    x, u, target = noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1), noise(1, 2, 4, 4, seed=2)
    corrected, output = Guidance([0.7 - 0.6], lambda now: target)(x, 0.7, 0.6, u)
    torch.testing.assert_close(corrected + (0.6 - 0.7) * output, x + (0.6 - 0.7) * target)


def test_strengths():
    sigmas = torch.tensor([0.9, 0.8, 0.65, 0.4, 0.0])
    options = PAPER(num_inference_steps=8, switch=4, guided_steps=2)
    assert options.step_strengths(sigmas) == pytest.approx([0, 0.3, 0.5, 0], abs=1e-6)  # κ = 2
    at = PAPER(num_inference_steps=8, switch=4, guided_steps=2, guide_at_switch=True, alpha=0.04)
    assert at.step_strengths(sigmas) == [0.04, 0.04, 0.0, 0.0]
    fading = PAPER(num_inference_steps=8, switch=4, guided_steps=2, guide_at_switch=True, alpha=0.04, fading=True)
    assert fading.step_strengths(sigmas) == [0.04, 0.02, 0.0, 0.0]
    grid, alphas = reevaluated(torch.tensor([0.5, 0.25, 0.0]), [0.0, 0.1], corrections=2)
    assert grid == [0.5, 0.25, 0.25, 0.25, 0.0] and alphas == [0.0, 0.1, 0.1, 0.0]


def test_small_grids():
    full = torch.linspace(1, 0, 31)
    native = full**2
    same = PAPER().small_sigmas(full, native)
    assert torch.equal(same, full[10:])
    mean = PreviewOptions().small_sigmas(full, native)
    torch.testing.assert_close(mean, full[10:] / (2 - full[10:]))
    remapped = PAPER(grid="remapped").small_sigmas(full, native)  # the mean's, from where it has the noise of step 10
    begin = float(full[10] / (1 + full[10]) * 2)
    assert remapped[0] == full[10] and remapped[-1] == 0 and (remapped.diff() < 0).all() and len(remapped) == 21
    middle = torch.linspace(30 * (1 - begin), 30, 21)[10] / 30
    assert remapped[10] == pytest.approx(float((1 - middle) / (1 + middle)), abs=1e-3)
    few = PAPER(small_steps=5, guided_steps=4).small_sigmas(full, native)
    guided = {steps: PAPER(small_steps=steps).guided_steps for steps in (1, 4, 5, 8, 20, 40)}
    assert guided == {1: 0, 4: 1, 5: 1, 8: 2, 20: 5, 40: 10}  # a quarter, as 5 of 20
    guided = {steps: PreviewOptions(small_steps=steps).guided_steps for steps in (1, 2, 4, 5, 8, 20, 40)}
    assert guided == {1: 0, 2: 1, 4: 2, 5: 2, 8: 4, 20: 10, 40: 20}  # half of them, as 10 of 20
    torch.testing.assert_close(few, full[10::4])
    own = PAPER(grid="native").small_sigmas(full, native)
    assert own[0] == full[10] and own[-1] == 0 and (own.diff() < 0).all() and len(own) == 21
    # Equal distances in the step number: on the grid n², from the number where it is 2/3, up to interpolation.
    begin = 30 * (1 - math.sqrt(2 / 3))
    expected = (1 - torch.linspace(begin, 30, 21) / 30) ** 2
    torch.testing.assert_close(own, expected, atol=1e-3, rtol=0)


def test_fractions_are_steps():
    options = PreviewOptions(num_inference_steps=50, switch=1 / 3, guided_steps=0.1)
    assert (options.switch, options.guided_steps) == (17, 5)


@pytest.mark.parametrize("steps, switch, guided", [(30, 10, 5), (50, 17, 8), (10, 3, 2), (6, 2, 1)])
def test_defaults_are_the_papers_shares_of_the_run(steps, switch, guided):
    options = PAPER(num_inference_steps=steps)
    assert (options.switch, options.guided_steps, options.kappa) == (switch, guided, 2.0)


def test_defaults_of_the_mean():
    """A third of the run by the velocity of the switch itself, as far as there are so many small steps."""
    assert (PreviewOptions().switch, PreviewOptions().guided_steps, PreviewOptions().kappa) == (10, 10, 1.0)
    assert PreviewOptions(switch=25).guided_steps == 4 and PreviewOptions(switch=29).guided_steps == 0
    assert PreviewOptions(switch=25, guide_at_switch=True).guided_steps == 5
    with pytest.raises(ValueError, match="guided_steps=10: expected 0 to 4"):
        PreviewOptions(switch=25, guided_steps=10)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"switch": 30}, "switch=30: expected 0 to 29"),
        ({"switch": -1}, "switch=-1: expected 0 to 29"),
        ({"switch": 2.5}, "switch=2.5: expected a whole number of steps, or a fraction"),
        ({"switch": -1.0}, "switch=-1: expected 0 to 29"),
        ({"switch": math.inf}, "switch=inf: expected a whole number of steps"),
        ({"guided_steps": math.nan}, "guided_steps=nan: expected a whole number of steps"),
        ({"guided_steps": 20}, "guided_steps=20: expected 0 to 19, the small steps after step 10"),
        ({"guided_steps": 6, "small_steps": 5}, "guided_steps=6: expected 0 to 4"),
        ({"num_inference_steps": 4, "switch": 1, "guided_steps": 1}, "distilled model of fewer than 5 has none"),
        ({"num_inference_steps": 3}, "distilled model of fewer than 5 has none"),  # though a sixth of 3 becomes none
        ({"num_inference_steps": 30.5}, "num_inference_steps=30.5: expected a whole number"),
        ({"scale": 2.5}, "scale=2.5: expected a whole number"),
        ({"method": "nearest"}, "method='nearest': expected one of 'subsample', 'mean'"),
        ({"corrections": 2}, "corrections=2: expected 1, or more with reevaluate=True"),
        ({"kappa": -1.0}, "kappa=-1.0: expected a finite strength of at least 0"),
        ({"kappa": math.nan}, "kappa=nan: expected a finite strength"),
        ({"alpha": math.inf}, "alpha=inf, .*: expected a finite strength"),
        ({"method": "subsample", "gain": ((1.0,), (0.0,))}, "only method='mean' has one"),
        ({"method": "mean", "selection": "argmax"}, "selection='argmax': only method='subsample' has a choice there"),
        ({"unit": "tokens", "candidates": "phases"}, "candidates='phases', unit='tokens': only method='subsample'"),
        ({"grid": "remapped"}, "grid='remapped': only method='subsample' has a choice there"),
        ({"small_steps": 2.5}, "small_steps=2.5: expected a whole number"),
        ({"small_steps": True}, "small_steps=True: expected a whole number"),
        ({"kappa": "2"}, "kappa='2': expected a number"),
        ({"switch": None}, "switch=None: expected a number"),
        ({"target": "extrapolated", "switch": 0}, "needs the velocities of two steps"),
        ({"scale": 1}, "scale=1: expected 2 or more"),
        ({"num_inference_steps": 0, "switch": 0}, "num_inference_steps=0: expected at least 1"),
    ],
    ids=str,
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        PreviewOptions(**changes)


@pytest.mark.parametrize(
    "options, tflops, gain",
    [
        (PAPER(), 1312, 1.70),
        (PAPER(reevaluate=True), 1419, 1.57),
        (PAPER(selection="nearest", guided_steps=0), 1173, 1.90),
        (PreviewOptions(method="mean", switch=0, guided_steps=0), 644, 3.46),
    ],
    ids=["selection", "reevaluated", "naive", "direct"],
)
def test_costs_of_flux(options, tflops, gain):
    """Golden: 74.4 TFLOP a step at 1024², 21.5 at 512²."""
    report = explain("flux", 1024, 1024, options=options)
    assert report["tflops"]["full"] == pytest.approx(2231, rel=0.002)
    assert report["tflops"]["preview"] == pytest.approx(tflops, rel=0.003)
    assert report["tflops"]["ratio"] == pytest.approx(gain, abs=0.01)
    refined = report["tflops"]["refine"] / report["tflops"]["full"]
    assert refined == pytest.approx(1 - options.full_steps / 30)
    small = sum(phase["network_calls"] for phase in report["phases"][:-1] if phase["size"] == [512, 512])
    assert small == options.small_evaluations
    for before, after in zip(report["phases"], report["phases"][1:-1], strict=False):
        assert after["sigmas"][0] == pytest.approx(before["sigmas"][-1], abs=0.05)


def test_the_published_grids():
    """σ at step 10 of 30: 0.863 with FLUX's shift; SD3's scheduler shifts equal steps from 1 to its shifted 1/1000."""
    lowest = 3 * 0.001 / (1 + 2 * 0.001)
    t = 1 - 10 / 29 * (1 - lowest)
    for family, sigma in (("flux", 0.863), ("sd3.5-large", 3 * t / (1 + 2 * t))):
        candidates = explain(family, 1024, 1024, options=PAPER())["phases"][1]
        assert candidates["name"] == "candidates" and candidates["sigmas"][0] == pytest.approx(sigma, abs=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_explains_itself(family):
    options = PAPER(reevaluate=True, guide_at_switch=True)
    for chosen in (PAPER(), options, PreviewOptions(), PreviewOptions(small_steps=6)):
        report = explain(family, 512, 768, options=chosen)
        calls = sum(phase["network_calls"] for phase in report["phases"][:-1])
        assert calls == chosen.full_steps + chosen.small_evaluations
        assert 1 < report["tflops"]["ratio"] < 3
        assert len(as_table(report).splitlines()) == len(report["phases"]) + 3
    assert explain(family)["tflops"]["ratio"] > 1.5  # at its usual size


def test_explain_counts_branches_and_candidates(capsys):
    """True guidance doubles FLUX's evaluations, no guidance halves SD3's; a sheet costs its previews."""

    def tflops(*arguments):
        main(["preview", "--explain", "--json", *arguments])
        return json.loads(capsys.readouterr().out.splitlines()[0])["tflops"]

    flux, sd3 = tflops(), tflops("--family", "sd3")
    assert tflops("--true_cfg_scale", "4") == {
        **flux,
        **{name: 2 * flux[name] for name in ("preview", "refine", "full")},
    }
    assert tflops("--guidance_scale", "7") == flux  # it is told the scale
    assert tflops("--family", "sd3", "--guidance_scale", "5") == sd3
    assert tflops("--family", "sd3", "--guidance_scale", "1")["full"] == sd3["full"] / 2
    assert tflops("--candidates", "8") == {**flux, "sheet": 8 * flux["preview"]}
    main(["preview", "--explain", "--candidates", "8"])
    assert f"all previews: {8 * flux['preview']:.0f} TFLOPs, 4.48 full pictures" in capsys.readouterr().out


def test_explain_on_the_command_line(capsys):
    main(
        ["preview", "--explain", "--family", "flux", "--width", "1024", "--height", "512", "--json", "--switch", "0.5"]
    )
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"phases", "tflops"} and set(report["tflops"]) == {"preview", "refine", "full", "ratio"}
    assert {"size", "steps", "network_calls", "sigmas"} <= set(report["phases"][0])
    assert report["phases"][0]["size"] == [512, 1024] and report["phases"][0]["steps"] == 16
    with pytest.raises(ValueError, match=r"height=1024, width=1000: .* multiples of 32"):
        main(["preview", "--explain", "--width", "1000", "--height", "1024"])
    with pytest.raises(ValueError, match="height=0, width=1024: expected positive"):
        main(["preview", "--explain", "--height", "0"])
    with pytest.raises(ValueError, match=r"width=1048576: expected .* at most 65536"):
        main(["preview", "--explain", "--width", "1048576"])
    with pytest.raises(ValueError, match="frames=17: this model makes images"):
        main(["preview", "--explain", "--num_frames", "17"])
    with pytest.raises(ValueError, match="--candidates 0: expected at least 1"):
        main(["preview", "--explain", "--candidates", "0"])
    with pytest.raises(ValueError, match="family 'none': expected one of flux"):
        main(["preview", "--explain", "--family", "none"])
    with pytest.raises(ValueError, match="--model, --prompt, --seed: needed"):
        main(["preview"])


# Operators


def test_translation_moves_by_whole_elements():
    x, fresh = noise(1, 2, 8, 8), noise(1, 2, 8, 8, seed=1)
    flow = translate(4, -6)(8, 8, 2)  # two elements down, three to the left
    moved, share = move_noise(x, flow, fresh)
    assert torch.equal(moved[..., 2:, :5], x[..., :6, 3:])
    assert torch.equal(moved[..., :2, :], fresh[..., :2, :]) and torch.equal(moved[..., 5:], fresh[..., 5:])
    assert share == pytest.approx(1 - 6 * 5 / 64)
    image = move_image(x, flow)
    torch.testing.assert_close(image[..., 2:, :5], x[..., :6, 3:])
    torch.testing.assert_close(image[..., 0, :5], x[..., 0, 3:])  # the border goes on
    videos = move_image(x[:, :, None].expand(1, 2, 3, 8, 8), flow)
    torch.testing.assert_close(videos[:, :, 2], image)


def test_noise_moved_by_half_an_element_is_kept():
    """Halves go all to the same side, so that no element is asked for twice."""
    x, fresh = noise(1, 2, 8, 8), noise(1, 2, 8, 8, seed=1)
    moved, share = move_noise(x, translate(0, 4)(8, 8, 8), fresh)
    assert torch.equal(moved, x) and share == 0


def test_a_grid_is_a_flow():
    """The grid of grid_sample, at the picture's resolution or another, moves as grid_sample does."""
    x, theta = noise(1, 2, 8, 8), torch.tensor([[[0.5, -0.2, 0.1], [0.2, 0.5, -0.15]]])
    grid = F.affine_grid(theta, (1, 1, 8, 8), align_corners=False)
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(move_image(x, warp(grid_HW2=grid[0])(8, 8, 4)), expected, rtol=1e-4, atol=1e-5)
    fine = F.affine_grid(theta, (1, 1, 32, 32), align_corners=False)
    torch.testing.assert_close(move_image(x, warp(grid_HW2=fine[0])(8, 8, 4)), expected, rtol=1e-4, atol=1e-5)
    shift = F.affine_grid(torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]]), (1, 1, 8, 8), align_corners=False)
    torch.testing.assert_close(warp(grid_HW2=shift[0])(8, 8, 4), translate(0, -8)(8, 8, 4), rtol=0, atol=1e-5)
    for wrong in ({}, {"flow_2HW": fine[0], "grid_HW2": fine[0]}, {"flow_2HW": fine[0]}, {"grid_HW2": x[0]}):
        with pytest.raises(ValueError, match="warp: "):
            warp(**wrong)


def test_warped_noise_stays_white():
    """A magnification asks for elements many times: each is used once, the rest is fresh."""
    size = 192
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    flow = warp(torch.stack([-0.6 * rows.float(), -0.4 * columns.float()]))(size, size, 1)
    x = noise(1, 4, size, size)
    moved, share = move_noise(x, flow, noise(1, 4, size, size, seed=1))
    assert share == pytest.approx(1 - 0.4 * 0.6, abs=0.02)
    assert moved.var().item() == pytest.approx(1, abs=0.02)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        neighbours = (moved[..., dy:, dx:] * moved[..., : size - dy, : size - dx]).mean()
        assert abs(neighbours) < 0.01
    plain = move_image(x, flow)  # what it would be otherwise
    assert (plain[..., 1:, :] * plain[..., :-1, :]).mean() / plain.var() > 0.3
    assert norms(moved - x) > 0
