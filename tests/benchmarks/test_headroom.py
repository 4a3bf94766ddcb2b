"""Gradients through whole runs are those of the pictures that the stock pipeline makes."""

import pytest
import torch

from benchmarks.headroom import Cell, evaluate, gain
from data.noise import initial_noise
from evaluation.rendering import load_pipeline
from rewards.base import psnr
from solver import ConsistencySolverScheduler
from solver.rollout import Renderer

STEPS, GUIDANCE = 3, 3.0
PROMPTS = ("a red ring", "a small blue cube")


class Rows(list):
    """As many rows of an offline dataset as a cell asks for."""

    latent_shape = (4, 16, 16)

    def noise(self, seeds):
        return initial_noise(seeds, self.latent_shape)


@pytest.fixture(scope="module")
def cell():
    pipe = load_pipeline("zoo/mini-sd", "float32", "cpu")
    for part in (pipe.unet, pipe.vae):
        part.requires_grad_(False)
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)
    target = torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = Rows({"prompt": prompt, "seed": seed, "target": target} for seed, prompt in enumerate(PROMPTS))
    return Cell(pipe, scheduler, rows, STEPS, GUIDANCE)


@pytest.fixture
def actions(cell):
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(STEPS, cell.scheduler.num_actions, generator=generator)


def test_scores_are_those_of_the_renderer(cell, actions):
    table = cell.scheduler.table_from_actions(actions, STEPS)
    images = Renderer(cell.pipe, cell.scheduler).render(PROMPTS, (0, 1), GUIDANCE, table).images_BCHW
    targets = torch.stack([row["target"] for row in cell.dataset]) / 255
    torch.testing.assert_close(evaluate(cell, actions, [0, 1], 2), psnr(images, targets), atol=1e-3, rtol=0)


def test_gradients_reach_weights_and_grid(cell, actions):
    """Central differences along the gradient find its norm."""
    leaf = actions.clone().requires_grad_()
    cell.scores(leaf, [0, 1]).sum().backward()
    live = cell.scheduler.action_mask(STEPS)
    assert (leaf.grad[live] != 0).all() and (leaf.grad[~live] == 0).all()
    norm = leaf.grad.norm()
    step = 1e-3 * leaf.grad / norm
    up, down = (evaluate(cell, actions + sign * step, [0, 1], 2).sum() for sign in (1, -1))
    assert ((up - down) / 2e-3).item() == pytest.approx(norm.item(), rel=0.03)


def test_gain_is_the_mean_difference(cell, actions):
    before = evaluate(cell, torch.zeros_like(actions), [0, 1], 1)
    estimate = gain(cell, actions, before, [0, 1], 2)
    expected = (evaluate(cell, actions, [0, 1], 2) - before).mean().item()
    assert estimate.value == pytest.approx(expected, abs=1e-4) and estimate.value != 0
