"""Edges of pictures drawn for the purpose: where they must be found, and where not."""

import pytest
import torch

from solver.samplers.ralu.edges import (
    canny,
    canny_scores,
    edge_scores,
    gradients,
    luma_B1HW,
    number_of_fine,
    select,
    sobel_scores,
)


def grey(values_HW):
    return values_HW.expand(1, 3, *values_HW.shape).clone()


def square(dark=0.0, bright=1.0):
    """64 x 64, a square from 24 to 40."""
    picture = torch.full((64, 64), dark)
    picture[24:40, 24:40] = bright
    return picture


def test_a_dark_edge_is_found():
    """A dark grey square on black: invisible to the clipped luma."""
    picture = grey(square(0.0, 0.4))
    assert canny_scores(picture, "full", 16).sum() > 0
    assert canny_scores(picture, "clipped", 16).sum() == 0
    assert canny_scores(grey(square(0.55, 0.95)), "clipped", 16).sum() > 0


def test_clipped_luma_is_that_of_the_decoders_range():
    values = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    assert luma_B1HW(grey(values), "full").flatten().tolist() == [0, 63, 127, 191, 255]
    assert luma_B1HW(grey(values), "clipped").flatten().tolist() == [0, 0, 0, 127, 255]
    with pytest.raises(ValueError, match="luma='red'"):
        luma_B1HW(grey(values), "red")


def test_edges_are_one_pixel_thin_and_closed():
    """The outline of a square: one ring of about its perimeter, nothing inside nor outside."""
    edges = canny(255 * square()[None, None])[0, 0]
    rows, columns = edges.nonzero().T
    assert rows.min() >= 23 and rows.max() <= 40 and columns.min() >= 23 and columns.max() <= 40
    assert not edges[26:38, 26:38].any()
    assert 52 <= edges.sum() <= 68
    assert edges[30].sum() == 2 and edges[:, 30].sum() == 2  # a step is one pixel thick


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_canny_turns_with_the_picture(turn):
    """A quarter turn moves edges by at most the pixel in which equal neighbours are told apart."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 1, 8, 8, generator=generator), size=64, mode="bicubic")
    luma = (255 * smooth.clamp(0, 1) * 3).remainder(256)
    edges, turned = canny(luma), canny(luma.rot90(turn, (2, 3)))
    assert edges.any()
    assert (edges.rot90(turn, (2, 3)) == turned).float().mean() > 0.97


def test_hysteresis():
    """A weak edge counts where it hangs on to a strong one, and nowhere else."""
    weak, strong = 255 * 0.15, 255 * 0.6  # steps of four times that in |gx|: 153 and 612
    picture = torch.zeros(1, 1, 40, 40)
    picture[..., :20, 10:] = strong
    picture[..., 20:, 10:] = weak
    assert canny(picture)[0, 0, 30].sum() == 1
    alone = torch.zeros(1, 1, 40, 40)
    alone[..., 10:] = weak
    assert canny(alone).sum() == 0
    alone[..., 10:] = strong
    assert canny(alone).sum() == 40


def test_gradients_are_those_of_a_ramp():
    ramp = torch.arange(8.0).repeat(8, 1)[None, None] * 3
    gx, gy = gradients(torch.cat([ramp, ramp.mT], 1))
    assert (gx[0, 0, :, 1:-1] == 24).all() and (gy[0, 0] == 0).all()
    assert (gy[0, 1, 1:-1] == 24).all() and (gx[0, 1] == 0).all()


def test_scores_are_per_image_and_per_cell():
    pictures = torch.cat([grey(square()), grey(torch.zeros(64, 64))])
    scores = canny_scores(pictures, "full", 16)
    assert scores.shape == (2, 4, 4) and scores[1].sum() == 0
    assert scores[0].sum() == canny(luma_B1HW(pictures[:1], "full")).sum()
    assert torch.equal(scores[:1], canny_scores(pictures[:1], "full", 16))
    assert scores[0, 0].sum() == 0 and scores[0, 1:3, 1:3].sum() > 0


def test_sobel_in_latent_space():
    """Cells of the small latents in which they change."""
    x0 = torch.zeros(1, 4, 8, 12)
    x0[..., 6:] = 1
    scores = sobel_scores(x0)
    assert scores.shape == (1, 4, 6)
    assert (scores[0, :, 2:4] > 0).all() and scores[0, :, :2].sum() == scores[0, :, 4:].sum() == 0


def test_cells_that_are_alike_are_scattered():
    """Where nothing has edges, what is left of the ratio goes everywhere, in the same way for every picture."""
    fine = select(torch.zeros(2, 8, 8), 0.3)
    assert fine.sum((1, 2)).tolist() == [19, 19] and torch.equal(fine[0], fine[1])
    assert fine[0].any(1).sum() >= 6 and fine[0].any(0).sum() >= 6


def test_of_cells_with_as_many_edges_the_steeper_counts():
    """Two edges of one length, of which the right one is higher, and a gentle one that is none to Canny."""
    picture = torch.zeros(1, 3, 32, 96)
    picture[..., 16:32], picture[..., 48:64] = 0.5, 1.0
    picture[..., 80:] = 0.1
    scores = edge_scores(picture, "full", 32)[0, 0]
    counts = canny_scores(picture, "full", 32)[0, 0]
    assert counts[0] == counts[1] > counts[2] == 0
    assert scores[1] > scores[0] > scores[2] > 0 and torch.equal(scores.floor(), counts)


def test_selection_counts():
    assert [number_of_fine(ratio, 1024) for ratio in (0.3, 0.2, 0.1)] == [307, 204, 102]
    assert number_of_fine(0.3, 10) == 3
    scores = torch.tensor([[[0.0, 5, 0], [5, 1, 9]], [[1.0, 2, 3], [4, 5, 6]]])
    fine = select(scores, 0.5)
    assert fine.tolist() == [[[False, True, False], [True, False, True]], [[False] * 3, [True] * 3]]
    for ratio in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="ratio="):
            select(scores, ratio)
    with pytest.raises(ValueError, match="none"):
        select(scores, 0.1)
