"""AMED's steps: the table does what the formula says, and the fit beats the midpoint it generalises."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toy_mixture import latent_psnr, toy_dataset, toy_pipeline

from evaluation.solvers import RuleScheduler, describe
from solver import ConsistencySolverScheduler
from solver.amed import amed_table, bake_amed, fit_amed
from solver.multistep import dpm2s
from solver.rollout import Renderer
from solver.scheduling_consistency_solver import SolverTable


@pytest.fixture(scope="module")
def toy():
    pipe = toy_pipeline()
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2, learn_grid=False)
    return Renderer(pipe, scheduler), toy_dataset(40, steps=200)


def test_a_pair_goes_the_whole_way_along_its_second_prediction(toy):
    scheduler = toy[0].scheduler
    points = scheduler.base_grid(3)[1]
    middle, scale = [0.3, 0.5, 0.8], [1.0, 0.9, 1.1]
    sigmas, weights = (x.double() for x in amed_table(scheduler, points, middle, scale)[1:])
    f = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    y = torch.zeros(5).double()
    for i in range(3):
        expected = y + scale[i] * (points.s[i + 1] - points.s[i]) * f[2 * i + 1]
        for k in (2 * i, 2 * i + 1):
            y = y + (sigmas[k + 1] - sigmas[k]) * (weights[k, 0] * f[k] + weights[k, 1] * f[k - 1])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert weights.sum(1)[:2].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_fitted_steps_beat_the_midpoint(toy):
    renderer, dataset = toy
    fitted = fit_amed(renderer, dataset[:24], 1.0, 6, substeps=16, candidates=7)
    timesteps, points = renderer.scheduler.base_grid(6)
    midpoint = SolverTable(timesteps.float(), points.s.float(), dpm2s(points, 2).float())
    held_out = dataset[24:]
    prompts, seeds = [row["prompt"] for row in held_out], [row["seed"] for row in held_out]
    targets = torch.stack([row["target_latents"] for row in held_out])
    scores = [latent_psnr(renderer.render(prompts, seeds, 1.0, t).latents_BCHW, targets) for t in (midpoint, fitted)]
    assert (scores[1] - scores[0]).mean() > 0.5


def test_a_baked_table_is_run_as_it_is(toy, tmp_path):
    """And is not taken for the classical rule that its config names."""
    scheduler = toy[0].scheduler
    tables = {
        k: amed_table(scheduler, scheduler.base_grid(k // 2)[1], [0.4] * (k // 2), [1.1] * (k // 2)) for k in (4, 6)
    }
    bake_amed(scheduler, tables, 3.0).save_pretrained(tmp_path)
    loaded = ConsistencySolverScheduler.from_pretrained(tmp_path)
    loaded.guidance_scale = 3.0
    for count, table in tables.items():
        loaded.set_timesteps(count)
        for ours, its in zip(table, loaded.table, strict=True):
            torch.testing.assert_close(ours, its)
        assert describe(loaded, count) != describe(RuleScheduler.of("dpm2m", 2, scheduler, count), count)
    with pytest.raises(ValueError, match="Baked for guidance_scale=3"):
        loaded.guidance_scale = 5.0


def test_what_it_cannot_do(toy):
    renderer, dataset = toy
    with pytest.raises(ValueError, match="evaluations=5: AMED makes two a step"):
        fit_amed(renderer, dataset[:2], 1.0, 5, substeps=2, candidates=1)
    flow = ConsistencySolverScheduler.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="use the solver dpm2s"):
        fit_amed(Renderer(renderer.pipe, flow), dataset[:2], 1.0, 4, substeps=2, candidates=1)
