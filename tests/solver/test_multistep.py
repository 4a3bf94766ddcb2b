"""The rules of `multistep.py` against diffusers' own schedulers, and their order of convergence on a known ODE."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)

from solver.multistep import RULES
from solver.scheduling_consistency_solver import Grid

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
STEPS = 12


def integrate(weights_KM, grid, start, f):
    """y_{i+1} = y_i + Δs Σ_j w_ij f_{i+1-j}, from the states in `start` on; `f(y, i)` is the prediction at point i."""
    states, history = list(start), []
    for i, row in enumerate(weights_KM):
        history = [f(states[i], i), *history]
        if i + 1 == len(states):
            effective = sum(w * past for w, past in zip(row, history, strict=False))
            states.append(states[i] + (grid.s[i + 1] - grid.s[i]) * effective)
    return states[-1]


def nonlinear_model(x, t):
    """A deterministic stand-in for a network, in float64."""
    return torch.sin(1.3 * x + 0.002 * float(t)) + 0.3 * x


def run_stock(scheduler, x):
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = (
            scheduler.sigmas.double()
        )  # its coefficients, differences of logarithms, lose digits in float32
    for t in scheduler.timesteps:
        x = scheduler.step(nonlinear_model(x, t), t, x).prev_sample.double()
    return x


def noise():
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run_table(rule, order, scheduler, flow, x, first_order_end=False):
    """The same model and grid as the stock scheduler, stepped by the rule's table in (y, s)."""
    sigmas = scheduler.sigmas.double()
    grid = Grid.flow(sigmas) if flow else Grid.variance_preserving(sigmas)
    alpha = torch.ones_like(sigmas) if flow else torch.rsqrt(1 + sigmas**2)
    weights = RULES[rule](grid, order)
    if first_order_end:
        weights[-1] = torch.eye(weights.shape[-1])[0]

    def f(y, i):
        return nonlinear_model(y * alpha[i], scheduler.timesteps[i])

    return integrate(weights, grid, [x / alpha[0]], f) * alpha[-1]


VP_CASES = {
    "dpm2m": (DPMSolverMultistepScheduler, 2, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmpp2m": (DPMSolverMultistepScheduler, 2, {"final_sigmas_type": "zero"}),
    "unip2": (UniPCMultistepScheduler, 2, {"predict_x0": False, "disable_corrector": list(range(STEPS))}),
    "unipc2": (UniPCMultistepScheduler, 2, {"predict_x0": False}),
    "deis": (DEISMultistepScheduler, 3, {}),
}


@pytest.mark.parametrize("rule", VP_CASES)
def test_rule_equals_the_diffusers_scheduler(rule):
    scheduler_class, order, arguments = VP_CASES[rule]
    if scheduler_class is UniPCMultistepScheduler:
        arguments = {**arguments, "final_sigmas_type": "sigma_min"}
    scheduler = scheduler_class(**SD, solver_order=order, lower_order_final=False, **arguments)
    scheduler.set_timesteps(STEPS)
    torch.testing.assert_close(
        run_table(rule, order, scheduler, False, noise()), run_stock(scheduler, noise()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("rule", ["dpmpp2m", "deis"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rule_equals_the_diffusers_scheduler_in_flow_mode(rule, shift):
    scheduler_class, arguments = {
        "dpmpp2m": (DPMSolverMultistepScheduler, {}),
        "deis": (DEISMultistepScheduler, {}),
    }[rule]
    scheduler = scheduler_class(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, lower_order_final=False, **arguments
    )
    scheduler.set_timesteps(STEPS)
    table = run_table(rule, 2, scheduler, True, noise(), first_order_end=rule == "deis")
    torch.testing.assert_close(table, run_stock(scheduler, noise()), rtol=1e-5, atol=1e-5)


def test_unip2_in_x0_form_on_a_flow_is_dpmpp2m():
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, disable_corrector=list(range(STEPS))
    )
    scheduler.set_timesteps(STEPS)
    table = run_table("dpmpp2m", 2, scheduler, True, noise(), first_order_end=True)
    torch.testing.assert_close(table, run_stock(scheduler, noise()), rtol=1e-5, atol=1e-5)


def test_ddim_equals_the_diffusers_scheduler():
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)  # divides 1000, so that DDIM's own target is the next grid point
    alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()[[*scheduler.timesteps.tolist(), 0]]
    table = run_table("ddim", 1, scheduler, False, noise())
    torch.testing.assert_close(table, run_stock(scheduler, noise()), rtol=1e-5, atol=1e-5)


def test_ipndm_equals_the_diffusers_scheduler():
    sigma = torch.linspace(0.98, 0.05, STEPS + 1, dtype=torch.float64)
    scheduler = IPNDMScheduler(trained_betas=sigma.tolist())
    scheduler.set_timesteps(STEPS)
    alpha = (1 - sigma**2).sqrt()
    grid = Grid.variance_preserving(sigma / alpha)

    def epsilon(y, i):  # IPNDMScheduler mixes ε = σ x + α v itself
        x = y * alpha[i]
        return sigma[i] * x + alpha[i] * nonlinear_model(x, scheduler.timesteps[i])

    table = integrate(RULES["ipndm"](grid, 4), grid, [noise() / alpha[0]], epsilon) * alpha[-1]
    torch.testing.assert_close(table, run_stock(scheduler, noise()), rtol=1e-5, atol=1e-5)


def test_adams_bashforth_on_equal_steps_has_the_textbook_weights():
    grid = Grid.flow(torch.linspace(0.9, 0.1, 9, dtype=torch.float64))
    torch.testing.assert_close(RULES["ab4"](grid, 4), RULES["ipndm"](grid, 4))


def test_two_steps_of_adams_bashforth_on_unequal_steps():
    s = torch.tensor([10.0, 6.0, 3.0, 1.0], dtype=torch.float64)
    q = torch.tensor([3 / (2 * 4), 2 / (2 * 3)], dtype=torch.float64)  # Δ_i / 2Δ_{i-1}
    expected = torch.stack([1 + q, -q], dim=-1)
    torch.testing.assert_close(RULES["ab2"](Grid.variance_preserving(s), 2)[1:], expected)


GRIDS = {
    "vp": Grid.variance_preserving(torch.logspace(1, -1, STEPS + 1, dtype=torch.float64)),
    "vp to zero": Grid.variance_preserving(torch.linspace(14.6, 0, STEPS + 1, dtype=torch.float64)),
    "flow": Grid.flow(torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_are_finite_and_sum_to_one(rule, grid, order):
    if rule == "unipc2" and (grid == "flow" or order == 1):
        with pytest.raises(ValueError, match="unipc2"):
            RULES[rule](GRIDS[grid], order)
        return
    weights = RULES[rule](GRIDS[grid], order)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(STEPS, dtype=torch.float64))
    live = torch.arange(weights.shape[-1]) <= torch.arange(STEPS)[:, None]
    assert (weights[~live] == 0).all(), "weights on a history that does not exist"


# -- order of convergence on the probability-flow ODE of a Gaussian mixture, whose score is known ---------------------

MEANS = torch.tensor([-1.0, 0.4, 1.2], dtype=torch.float64)
SPREAD = 0.3


def mixture_epsilon(y, n):
    """E[ε | y = x_0 + n ε] for x_0 from the mixture: the posterior mean of each component, by its responsibility."""
    variance = SPREAD**2 + n**2
    responsibility = torch.softmax(-((y[:, None] - MEANS) ** 2) / (2 * variance), dim=-1)
    return (responsibility * (y[:, None] - MEANS) * n / variance).sum(dim=-1)


def mixture_velocity(x, sigma):
    """ε - x_0 of a flow model at x = (1 - σ) x_0 + σ ε."""
    n = sigma / (1 - sigma)
    y = x / (1 - sigma)
    epsilon = mixture_epsilon(y, n)
    return epsilon - (y - n * epsilon)


def exact_states(f, s, y, substeps=4):
    """Runge-Kutta 4 with substeps between the grid's points."""
    states = [y]
    for start, end in pairwise(s):
        h, y = (end - start) / substeps, states[-1]
        for i in range(substeps):
            z = start + i * h
            k1 = f(y, z)
            k2 = f(y + h / 2 * k1, z + h / 2)
            k3 = f(y + h / 2 * k2, z + h / 2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(y + h * k3, z + h))
        states.append(y)
    return states


def final_error(rule, order, family, steps):
    """RMS error at the end. The first states are exact, or the low-order start would hide the order of the rule.

    Not so for UniPC: it corrects its first step itself, and would "correct" an exact one.
    """
    if family == "vp":
        s = torch.logspace(math.log10(8), math.log10(0.2), steps + 1, dtype=torch.float64)
        f, grid = mixture_epsilon, Grid.variance_preserving(s)
    else:
        s = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)
        f, grid = mixture_velocity, Grid.flow(s)
    exact = exact_states(f, s, torch.linspace(-2, 2, 9, dtype=torch.float64) * s[0])
    given = 1 if rule == "unipc2" else order
    end = integrate(RULES[rule](grid, order), grid, exact[:given], lambda y, i: f(y, s[i]))
    return (end - exact[-1]).square().mean().sqrt().item()


@pytest.mark.parametrize("family", ["vp", "flow"])
@pytest.mark.parametrize(
    "rule, order, expected",
    [
        ("ddim", 1, 1),
        ("ab2", 2, 2),
        ("ab3", 3, 3),
        ("ab4", 4, 4),
        ("dpm2m", 2, 2),
        ("dpmpp2m", 2, 2),
        ("deis", 2, 2),
        ("deis", 3, 3),
        ("unipc2", 2, 3),  # the corrector adds one order to its predictor's (Theorem 3.1 of arXiv 2302.04867)
        ("ipndm", 4, 4),  # on equal steps, those of the flow grid here
    ],
)
def test_order_of_convergence(rule, order, expected, family):
    if rule == "unipc2" and family == "flow":
        pytest.skip("no flow form")
    if rule == "ipndm" and family == "vp":
        expected = 2  # neighbouring steps differ by O(h), the weights too, and so a step by O(h^3)
    errors = [final_error(rule, order, family, steps) for steps in (64, 128)]
    measured = math.log2(errors[0] / errors[1])
    assert measured == pytest.approx(expected, abs=0.35), errors
