"""The mixed sequence, and the hooks on tiny models of every family that has one."""

import pytest
import torch

from solver.samplers.cascade import Segment, run_segment
from solver.samplers.latents import latent_shape, to_grid, to_tokens
from solver.samplers.ralu.edges import select
from solver.samplers.ralu.mixed_resolution import MixedTokens, mixed_resolution, sd3_positions
from solver.samplers.ralu.noise import COPIES, enlarge, siblings
from tests.tiny_pipelines import SIZE, tiny_pipeline

FAMILIES = ("flux", "flux-kontext", "sd3", "sd35", "qwen-image")


def standard(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_fine(h, w, seed=0):
    fine = torch.rand(h, w, generator=torch.Generator().manual_seed(seed)) < 0.4
    fine.view(-1)[0], fine.view(-1)[-1] = True, False
    return fine


def test_token_counts():
    """1024 x 1024 pixels: 1945, 1636 and 1330 tokens of 4096."""
    for ratio, count in ((0.3, 1945), (0.2, 1636), (0.1, 1330)):
        mixed = MixedTokens(select(torch.zeros(1, 32, 32), ratio)[0])
        assert len(mixed.positions_N2) == len(mixed.coarse) + len(mixed.fine) == count
    assert len(MixedTokens(torch.ones(32, 32, dtype=torch.bool)).fine) == 4096


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (7, 2)])
def test_every_place_of_the_full_grid_is_covered_once(size):
    """Coarse tokens opened up and fine ones together are a permutation of the full picture's tokens."""
    mixed = MixedTokens(some_fine(*size))
    opened = MixedTokens(~mixed.fine_hw).fine  # the children of those that are coarse
    assert torch.equal(torch.cat([opened, mixed.fine]).sort().values, torch.arange(4 * size[0] * size[1]))
    all_fine = MixedTokens(torch.ones(*size, dtype=torch.bool), units="full")
    place = all_fine.positions_N2[:, 0] * 2 * size[1] + all_fine.positions_N2[:, 1]
    assert torch.equal(place.long(), all_fine.fine)  # whole positions, those of the stock picture


def test_positions():
    """Small units: coarse tokens on whole numbers or in their cell's middle, children on halves."""
    fine = torch.tensor([[True, False], [False, False]])
    corner = MixedTokens(fine, anchor="corner").positions_N2
    assert corner.tolist() == [[0, 1], [1, 0], [1, 1], [0, 0], [0, 0.5], [0.5, 0], [0.5, 0.5]]
    centre = MixedTokens(fine, anchor="centre").positions_N2
    assert torch.equal(centre[:3], corner[:3] + 0.25) and torch.equal(centre[3:], corner[3:])
    children = MixedTokens(torch.ones(2, 2, dtype=torch.bool)).positions_N2.unflatten(0, (4, 4)).mean(1)
    assert torch.equal(children, MixedTokens(~torch.ones(2, 2, dtype=torch.bool)).positions_N2)  # a cell's middle
    assert torch.equal(MixedTokens(fine, units="full").positions_N2, 2 * centre)


@pytest.mark.parametrize("copy", COPIES)
def test_gather_and_scatter(copy):
    """A grid with constant coarse cells comes back; the coarse token is that of the small picture."""
    fine = some_fine(3, 4)
    x, small = standard(2, 4, 12, 16), standard(2, 4, 6, 8, seed=1)
    mixed = MixedTokens(fine, copy)
    on = fine.repeat_interleave(4, 0).repeat_interleave(4, 1)
    state = torch.where(on, x, enlarge(small, copy))
    sequence = mixed.gather(state)
    assert torch.equal(sequence[:, : len(mixed.coarse)], to_tokens(small)[:, mixed.coarse])
    assert torch.equal(mixed.scatter(sequence), state)
    assert torch.equal(to_grid(to_tokens(x), 6, 8), x)


def test_tokens_are_those_of_flux():
    pipe, _ = tiny_pipeline("flux")
    x = standard(2, 4, 8, 12)
    assert torch.equal(to_tokens(x), pipe._pack_latents(x, *x.shape))


def segment_run(pipe, call, x, sigmas, size):
    given = {
        name: value for name, value in call.items() if name not in ("height", "width", "generator", "output_type")
    }
    if "max_area" in given:  # Kontext makes its own size of it
        given["max_area"] = size**2
    return run_segment(pipe, x, Segment(sigmas, size, size), **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_fine_is_the_plain_pipeline(family):
    """With every cell fine, and the full picture's positions: the stock call, and no trace of the hooks after it."""
    pipe, call = tiny_pipeline(family)
    x = standard(1, *latent_shape(pipe, SIZE, SIZE))
    plain = segment_run(pipe, call, x, [1.0, 0.7, 0.2], SIZE)
    cells = SIZE // (4 * pipe.vae_scale_factor)
    modules = {name: dict(module.__dict__) for name, module in pipe.transformer.named_modules()}
    with mixed_resolution(pipe.transformer, torch.ones(cells, cells, dtype=torch.bool), units="full"):
        mixed = segment_run(pipe, call, x, [1.0, 0.7, 0.2], SIZE)
    assert (mixed - plain).abs().max() <= 2e-6
    assert not torch.equal(plain, x)
    after = {name: set(module.__dict__) for name, module in pipe.transformer.named_modules()}
    assert after == {name: set(state) for name, state in modules.items()}
    assert torch.equal(segment_run(pipe, call, x, [1.0, 0.7, 0.2], SIZE), plain)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_coarse_is_the_small_picture(family, copy):
    """With every cell coarse, anchored as the small picture: its run, each latent four times."""
    pipe, call = tiny_pipeline(family)
    if (family, copy) == ("qwen-image", "pixel"):  # its guidance is rescaled by the norm of the full grid's tokens
        call["true_cfg_scale"] = 1.0
    y = standard(1, *latent_shape(pipe, SIZE // 2, SIZE // 2))
    small = segment_run(pipe, call, y, [1.0, 0.7, 0.2], SIZE // 2)
    cells = SIZE // (4 * pipe.vae_scale_factor)
    with mixed_resolution(pipe.transformer, torch.zeros(cells, cells, dtype=torch.bool), copy, "corner"):
        mixed = segment_run(pipe, call, enlarge(y, copy), [1.0, 0.7, 0.2], SIZE)
    assert (mixed - enlarge(small, copy)).abs().max() <= 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_cells(family):
    """Coarse cells stay constant, fine ones do not; the anchor and every fine cell matter to all the others."""
    pipe, call = tiny_pipeline(family)
    cells = SIZE // (4 * pipe.vae_scale_factor)
    fine = some_fine(cells, cells)
    on = fine.repeat_interleave(4, 0).repeat_interleave(4, 1)
    x = torch.where(
        on, standard(1, *latent_shape(pipe, SIZE, SIZE)), enlarge(standard(1, 4, SIZE // 4, SIZE // 4), "pixel")
    )
    answers = {}
    for anchor in ("centre", "corner"):
        with mixed_resolution(pipe.transformer, fine, anchor=anchor):
            answers[anchor] = segment_run(pipe, call, x, [0.9, 0.7, 0.5], SIZE)
    blocks = siblings(answers["centre"], "pixel")
    spread = (blocks.amax(-1) - blocks.amin(-1)).amax((0, 1, 4))
    assert (spread[~fine] == 0).all() and (spread[fine] > 0).all()
    assert not torch.equal(answers["centre"], answers["corner"])


def test_sd3_between_the_entries_of_its_table():
    """On whole positions the table itself, for the small and the full crop; a foreign table is refused."""
    embedder = tiny_pipeline("sd3")[0].transformer.pos_embed
    cells = torch.zeros(4, 4, dtype=torch.bool)
    small = sd3_positions(embedder, MixedTokens(cells, anchor="corner"))
    assert (small - embedder.cropped_pos_embed(8, 8)[0]).abs().max() < 1e-6
    full = MixedTokens(~cells, units="full")
    assert (sd3_positions(embedder, full) - embedder.cropped_pos_embed(16, 16)[0, full.fine]).abs().max() < 1e-6
    embedder.pos_embed = torch.rand_like(embedder.pos_embed)
    with pytest.raises(ValueError, match="position table"):
        sd3_positions(embedder, full)


def test_what_cannot_be_mixed():
    fine = torch.ones(2, 2, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match=r"UNet2DConditionModel: it has no tokens"),
        mixed_resolution(tiny_pipeline("sd")[0].unet, fine),
    ):
        pass
    with (
        pytest.raises(ValueError, match="WanTransformer3DModel"),
        mixed_resolution(tiny_pipeline("wan")[0].transformer, fine),
    ):
        pass
    with pytest.raises(ValueError, match="anchor='edge'"):
        MixedTokens(fine, anchor="edge")
    with pytest.raises(ValueError, match="float32"):
        MixedTokens(torch.ones(2, 2))


def test_the_hook_goes_also_when_the_call_fails():
    pipe, _ = tiny_pipeline("flux")
    with pytest.raises(RuntimeError, match="stop"), mixed_resolution(pipe.transformer, some_fine(2, 2)):
        raise RuntimeError("stop")
    assert "forward" not in pipe.transformer.__dict__
