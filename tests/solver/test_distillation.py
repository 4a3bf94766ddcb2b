"""Distillation: weights that the data decides are found, the others stay with the base rule, and Σ w = 1."""

import pytest
import torch
from toy_mixture import latent_psnr, toy_dataset, toy_pipeline

from solver import ConsistencySolverScheduler
from solver.distillation import WeightFit, dense_table, fit_actions, fit_policy, teacher_trajectories
from solver.rollout import Renderer
from solver.scheduling_consistency_solver import Grid, adams_bashforth, ddim, history_lengths

STEPS, ORDER = 6, 4


def random_grid(steps=STEPS, seed=0):
    s = torch.rand(steps + 1, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    return Grid.variance_preserving(s.sort(descending=True).values)


def weights_of(fit, grid, order=ORDER):
    """Base weights plus residuals, by the scheduler's own convention."""
    scheduler = ConsistencySolverScheduler(solver_order=order, learn_grid=False)
    return fit.base_weights_KM + scheduler._weight_residuals(fit.actions())


def test_weights_that_made_the_trajectories_are_recovered():
    grid = random_grid()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(STEPS, ORDER, generator=generator).double()
    weights *= torch.arange(ORDER) < history_lengths(STEPS, ORDER)[:, None]
    weights /= weights.sum(dim=1, keepdim=True)
    fit = WeightFit(ddim(grid, ORDER), grid.s)
    for _ in range(2):  # two batches
        f = torch.randn(STEPS, 5, 3, generator=generator).double()
        y = [torch.randn(5, 3, generator=generator).double()]
        for i in range(STEPS):
            past = sum(weights[i, j] * f[i - j] for j in range(min(i + 1, ORDER)))
            y.append(y[-1] + (grid.s[i + 1] - grid.s[i]) * past)
        fit.add(torch.stack(y), f)
    torch.testing.assert_close(weights_of(fit, grid), weights, rtol=0, atol=1e-9)


def test_field_linear_in_s_gives_adams_bashforth_of_order_two():
    grid = random_grid()
    a, b = torch.randn(2, 10, generator=torch.Generator().manual_seed(2)).double()
    s = grid.s[:, None]
    fit = WeightFit(ddim(grid, 2), grid.s)
    fit.add(a * s + b * s**2 / 2, (a + b * s)[:-1])
    torch.testing.assert_close(weights_of(fit, grid, 2), adams_bashforth(grid, 2), rtol=0, atol=1e-9)


def test_constant_field_decides_nothing_and_leaves_the_base_rule():
    grid = random_grid()
    a = torch.randn(10, generator=torch.Generator().manual_seed(3)).double()
    base = adams_bashforth(grid, ORDER)
    fit = WeightFit(base, grid.s)
    fit.add(a * grid.s[:, None], a.expand(STEPS, 10))
    assert fit.actions().abs().max() < 1e-9


def test_noisy_trajectories_still_have_weights_of_sum_one():
    grid = random_grid()
    generator = torch.Generator().manual_seed(4)
    fit = WeightFit(adams_bashforth(grid, ORDER), grid.s)
    fit.add(torch.randn(STEPS + 1, 50, generator=generator), torch.randn(STEPS, 50, generator=generator))
    weights = weights_of(fit, grid)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(STEPS).double(), rtol=0, atol=1e-9)
    assert (weights - adams_bashforth(grid, ORDER)).abs().max() > 0.1


@pytest.fixture(scope="module")
def toy():
    pipe = toy_pipeline()
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3, learn_grid=False)
    return Renderer(pipe, scheduler), toy_dataset(32, guidance_scales=(1.0,), steps=200)


def test_teacher_passes_the_grid_and_ends_at_the_target(toy):
    renderer, dataset = toy
    points = renderer.scheduler.base_grid(5)[1]
    table = dense_table(renderer.scheduler, points, 16)
    torch.testing.assert_close(table.sigmas[::16], points.s.float(), rtol=1e-5, atol=0)
    states, predictions = teacher_trajectories(renderer, dataset[:4], 1.0, points, 16)
    assert states.shape == (6, 4, 2, 8, 8) and predictions.shape == (5, 4, 2, 8, 8)
    alpha = torch.rsqrt(1 + points.s[-1] ** 2).float()
    targets = torch.stack([row["target_latents"] for row in dataset[:4]])
    # Not the minimum: a point may start on the border between two modes. The base rule has 14 dB in 5 steps.
    assert latent_psnr(alpha * states[-1], targets).median() > 35


def test_distilled_weights_beat_the_base_rule_and_the_policy_meets_them(toy):
    renderer, dataset = toy
    scheduler = renderer.scheduler
    cells = fit_actions(renderer, dataset, step_counts=[5, 8], num_rows=24, substeps=12)
    assert set(cells) == {(5, 1.0), (8, 1.0)}
    assert fit_policy(scheduler, cells, updates=600) < 0.15  # of residuals up to 1
    held_out = dataset[24:]
    prompts, seeds = [row["prompt"] for row in held_out], [row["seed"] for row in held_out]
    targets = torch.stack([row["target_latents"] for row in held_out])
    for steps in (5, 8):
        base = scheduler.table_from_actions(torch.zeros(steps, scheduler.num_actions), steps)
        learned = scheduler.coefficients(steps, 1.0)
        torch.testing.assert_close(learned.weights.sum(dim=1), torch.ones(steps), rtol=0, atol=1e-5)
        scores = [latent_psnr(renderer.render(prompts, seeds, 1.0, t).latents_BCHW, targets) for t in (base, learned)]
        assert (scores[1] - scores[0]).mean() > 0.3, steps
