"""Singlestep DPM-Solver-2 and UniPC in x_0 form against diffusers, on the same grids."""

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler, UniPCMultistepScheduler

from solver.multistep import dpm2s, unipcpp2
from solver.scheduling_consistency_solver import Grid, history_lengths

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def field(x, s):
    """Any smooth prediction will do."""
    return torch.sin(2 * x + 3 * s) + 0.5 * x


def grid_of(scheduler, flow):
    """A scheduler's sigmas as the points of a rule; the first is drawn in from 1 where it makes λ finite."""
    sigmas = scheduler.sigmas.double()
    return Grid.flow(sigmas) if flow else Grid.variance_preserving(sigmas)


def by_rule(weights, grid, x, flow):
    s = grid.s
    alpha = torch.ones_like(s) if flow else torch.rsqrt(1 + s**2)
    y, past = x / alpha[0], []
    for i in range(len(s) - 1):
        past.insert(0, field(alpha[i] * y, s[i]))
        y = y + s.diff()[i] * sum(w * f for w, f in zip(weights[i], past, strict=False))
    return alpha[-1] * y


def by_diffusers(scheduler, grid, x):
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(field(x, grid.s[i]), t, x).prev_sample
    return x


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize(
    "rule, scheduler_class, settings",
    [
        (dpm2s, DPMSolverSinglestepScheduler, {"flow": {}, "diffusion": {"algorithm_type": "dpmsolver"}}),
        (unipcpp2, UniPCMultistepScheduler, {"flow": {}, "diffusion": {}}),
    ],
)
def test_as_diffusers(rule, scheduler_class, settings, flow):
    kind = (FLOW, settings["flow"]) if flow else (DIFFUSION, settings["diffusion"])
    end = {} if flow else {"final_sigmas_type": "sigma_min"}
    scheduler = scheduler_class(**kind[0], **kind[1], **end)
    scheduler.set_timesteps(6)
    scheduler.sigmas = scheduler.sigmas.double()  # diffusers' own arithmetic in float32 is good for 1e-4
    grid = grid_of(scheduler, flow)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)).double()
    weights = rule(grid, 2)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 6)
    torch.testing.assert_close(by_rule(weights, grid, x, flow), by_diffusers(scheduler, grid, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [dpm2s, unipcpp2])
def test_second_order_from_pure_noise_to_data(rule):
    """dx/dσ = -2x + 3σ, from σ = 1 to 0: at half the step a quarter of the error, also through both infinite ends."""
    errors = []
    for steps in (128, 256):
        grid = Grid.flow(torch.linspace(1, 0, steps + 1).double())
        s, weights, y, past = grid.s, rule(grid, 2), torch.tensor(1.0).double(), []
        for i in range(steps):
            past.insert(0, -2 * y + 3 * s[i])
            y = y + s.diff()[i] * sum(w * f for w, f in zip(weights[i], past, strict=False))
        exact = (1 - 0.75) * torch.tensor(2.0).exp().double() - 0.75
        errors.append(abs(float(y - exact)))
    assert errors[0] / errors[1] > 3 and errors[1] < 1e-3


def test_no_weight_before_its_history():
    grid = Grid.flow(torch.linspace(1, 0, 6).double())
    for rule in (dpm2s, unipcpp2):
        weights = rule(grid, 2)
        assert weights.isfinite().all()
        history = history_lengths(5, weights.shape[1])
        assert not weights[torch.arange(weights.shape[1]) >= history[:, None]].any()
    assert dpm2s(grid, 2)[0::2, 0].tolist() == [1, 1, 1]
