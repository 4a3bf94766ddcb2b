"""Distillation: weights that the data decides are found, the others stay with the base rule, and Σ w = 1."""

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from toy_mixture import latent_psnr, toy_dataset, toy_pipeline

from data.noise import initial_noise
from solver import ConsistencySolverScheduler
from solver.distillation import (
    DistillationConfig,
    WeightFit,
    dense_table,
    fit_actions,
    fit_policy,
    teacher_trajectories,
)
from solver.rollout import Renderer
from solver.samplers.latents import pack
from solver.scheduling_consistency_solver import Grid, adams_bashforth, ddim, dpm2m, history_lengths

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


# Flow models


@pytest.fixture(scope="module")
def flow():
    """A tiny FLUX, its velocities enlarged so that the trajectories bend."""
    pipe, call = tiny_pipeline("flux")
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, 0, 0.3, generator=torch.Generator().manual_seed(0))
    embeddings = {"prompt_embeds": call["prompt_embeds"], "pooled_prompt_embeds": call["pooled_prompt_embeds"]}
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3, learn_grid=False)
    renderer = Renderer(pipe, scheduler, 32, 32, encode=lambda prompt: embeddings)
    rows = [{"prompt": "a", "seed": seed, "guidance_scale": 2.5} for seed in range(24)]
    return renderer, rows


def test_flow_trajectory_begins_at_the_noise_and_follows_the_velocity(flow):
    renderer, rows = flow
    grid = renderer.grid(4)
    assert {"sigmas", "mu"} <= grid.keys()
    points = renderer.scheduler.base_grid(4, **grid)[1]
    states, velocities = teacher_trajectories(renderer, rows[:3], 2.5, points, 16)
    noise = initial_noise([0, 1, 2], renderer.latent_shape)
    torch.testing.assert_close(states[0], pack(renderer.pipe, noise))
    # Without substeps the teacher is the second-order rule itself, whose step is known.
    states, velocities = teacher_trajectories(renderer, rows[:3], 2.5, points, 1)
    slopes = states.diff(dim=0) / points.s.diff().float().reshape(-1, 1, 1, 1)
    weights = dpm2m(points, 2).float()
    for i in range(4):
        expected = weights[i, 0] * velocities[i] + weights[i, 1] * velocities[max(i - 1, 0)]
        torch.testing.assert_close(slopes[i], expected, rtol=1e-3, atol=1e-3)


def test_distilled_flow_solver_beats_its_base_rule_on_other_seeds(flow):
    renderer, rows = flow
    scheduler = renderer.scheduler
    cells = fit_actions(renderer, rows[:16], step_counts=[4], num_rows=16, substeps=16)
    assert fit_policy(scheduler, cells, updates=200, grids={4: renderer.grid(4)}) < 0.1
    held_out = [row["seed"] for row in rows[16:]]
    prompts, grid = ["a"] * len(held_out), renderer.grid(4)
    dense = dense_table(scheduler, scheduler.base_grid(64, **renderer.grid(64))[1], 1)
    targets = renderer.render(prompts, held_out, 2.5, dense).latents_BCHW
    base = scheduler.table_from_actions(torch.zeros(4, scheduler.num_actions), 4, **grid)
    learned = scheduler.coefficients(4, 2.5, **grid)
    scores = [latent_psnr(renderer.render(prompts, held_out, 2.5, t).latents_BCHW, targets) for t in (base, learned)]
    assert (scores[1] - scores[0]).mean() > 0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_inference_steps": 0}, "min_inference_steps=0: expected at least 1"),
        ({"max_inference_steps": 1}, "max_inference_steps=1 is below min_inference_steps=2"),
        ({"solver_order": 1}, "solver_order=1, learn_weights=True: the weights alone are fitted"),
        ({"learn_weights": False}, "learn_weights=False: the weights alone are fitted"),
        ({"teacher_substeps": 0}, "teacher_substeps=0"),
    ],
)
def test_configs_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(model="zoo/mini-sd", dataset="datasets/mini_sd", **changes)
