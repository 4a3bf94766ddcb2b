"""A policy on the noise schedule of another model."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import run, tiny_pipeline

from solver import ConsistencySolverScheduler
from solver.transfer import POLICY_SETTINGS, transfer

FLOW_GRID = {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.7}


def diffusion():
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)


def flow():
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def learned(scheduler, **settings):
    """A solver that answers something else than zero."""
    solver = ConsistencySolverScheduler.from_scheduler(scheduler, order=3, **settings)
    with torch.no_grad():
        solver.policy.mlp[-1].weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    solver.register_to_config(trained_steps=[3, 8])
    return solver


def test_on_its_own_model_it_is_the_same_solver():
    solver = learned(diffusion(), timestep_spacing="trailing")
    for scheduler, settings in ((solver, {}), (diffusion(), {"timestep_spacing": "trailing"})):
        again = transfer(solver, scheduler, **settings)
        assert {name: again.config[name] for name in POLICY_SETTINGS} == {
            name: solver.config[name] for name in POLICY_SETTINGS
        }
        for mine, its in zip(again.coefficients(5, 3.0), solver.coefficients(5, 3.0), strict=True):
            assert torch.equal(mine, its)


def test_residuals_are_those_of_the_policy_on_the_other_grid():
    solver = learned(diffusion())
    moved = transfer(solver, flow())
    assert moved.is_flow and moved.config.trained_steps == [3, 8] and moved.config.use_dynamic_shifting
    actions = solver.policy(moved.policy_inputs(4, 3.0, **FLOW_GRID))
    fresh = ConsistencySolverScheduler.from_scheduler(flow(), order=3)
    expected = fresh.table_from_actions(actions, 4, **FLOW_GRID)
    for mine, its in zip(moved.coefficients(4, 3.0, **FLOW_GRID), expected, strict=True):
        assert torch.equal(mine, its)
    assert not torch.equal(expected.sigmas, fresh.table_from_actions(actions * 0, 4, **FLOW_GRID).sigmas)


def test_an_untrained_policy_is_the_base_rule_anywhere():
    pipe, call = tiny_pipeline("flux")
    expected = run(pipe, call, num_inference_steps=4)
    untrained = ConsistencySolverScheduler.from_scheduler(diffusion(), order=1)  # whose base rule is Euler's method
    pipe.scheduler = transfer(untrained, pipe.scheduler)
    assert torch.equal(run(pipe, call, num_inference_steps=4), expected)


def test_what_cannot_move_says_why():
    with pytest.raises(ValueError, match="baked"):
        transfer(learned(diffusion()).bake([4]), flow())
    for name in ("order", "learn_grid"):
        with pytest.raises(ValueError, match=f"{name}: part of the policy"):
            transfer(learned(diffusion()), flow(), **{name: 1})
    published = learned(diffusion(), inputs="published")
    with pytest.raises(ValueError, match="noise_levels"):
        transfer(published, flow())
    transfer(published, diffusion())
