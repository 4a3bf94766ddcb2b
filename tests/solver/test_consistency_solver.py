"""The learned solver as a scheduler: its exact limits, its table, its policy, its errors."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from solver import ConsistencySolverScheduler, SolverTable
from solver.scheduling_consistency_solver import BASE_RULES, Grid, dpm2m, live_weights

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PLAIN = {"base_rule": "ddim", "learn_grid": False}


def ddim(spacing="trailing", **overrides):
    return DDIMScheduler(**{**DDIM, "timestep_spacing": spacing, **overrides})


def solver(scheduler=None, order=4, **overrides):
    return ConsistencySolverScheduler.from_scheduler(scheduler or ddim(), order=order, **overrides)


def noise(batch=2, dtype=torch.float32):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def nonlinear_model(x, t):
    """A deterministic stand-in for a network; t a number or one a sample."""
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, *[1] * (x.ndim - 1))
    return (torch.sin(1.3 * x.float() + 0.002 * t) + 0.3 * x.float()).to(x.dtype)


def run(scheduler, x=None, model=nonlinear_model):
    x = noise() if x is None else x
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return x


def random_actions(scheduler, steps, batch=(), scale=0.5):
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(*batch, steps, scheduler.num_actions, generator=generator)


def trained(scheduler):
    """A policy with something to say: its zero last layer is replaced."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in scheduler.policy.mlp[-1].parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return scheduler


def assert_same_table(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- exact limits: an untrained solver is a classical one -------------------------------------------------------------


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, steps", [("leading", 7), ("leading", 10), ("trailing", 5), ("trailing", 8)])
def test_zero_policy_on_ddim_is_ddim(spacing, steps, prediction_type, set_alpha_to_one):
    stock = ddim(spacing, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one)
    ours = solver(stock, base_rule="ddim")
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    torch.testing.assert_close(run(ours), run(stock), rtol=1e-5, atol=1e-5)


def test_zero_policy_on_ddim_with_linspace_is_ddim_to_the_true_next_timestep():
    """DDIM's own target is t - T // K, on this grid not the next point; a K of 4 makes it that."""
    stock = ddim("linspace", num_train_timesteps=1001)
    ours = solver(stock, base_rule="ddim")
    ours.set_timesteps(5)
    stock.set_timesteps(5)
    stock.num_inference_steps = 4
    assert ours.timesteps.tolist() == stock.timesteps.tolist() == [1000, 750, 500, 250, 0]
    torch.testing.assert_close(run(ours), run(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 5, 16])
def test_zero_policy_on_dpm_is_dpm_solver(spacing, steps):
    stock = DPMSolverMultistepScheduler(
        **SD,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        timestep_spacing=spacing,
        steps_offset=1,
    )
    ours = solver(stock, base_rule="dpm2m")
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(run(ours), run(stock), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_order_one_is_euler(spacing, end):
    stock = EulerDiscreteScheduler(**SD, timestep_spacing=spacing, steps_offset=1, final_sigmas_type=end)
    ours = solver(stock, order=1, **PLAIN)
    stock.set_timesteps(6)
    ours.set_timesteps(6)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    # Euler's sample is y = x/α; its model input is x.
    y = noise() * (stock.sigmas[0] ** 2 + 1).sqrt()
    for t in stock.timesteps:
        y = stock.step(nonlinear_model(stock.scale_model_input(y, t), t), t, y).prev_sample
    x = y / (stock.sigmas[-1] ** 2 + 1).sqrt()
    torch.testing.assert_close(run(ours), x, rtol=2e-5, atol=2e-5)


FLOW_CALLS = [
    ({"shift": 1.0}, {"num_inference_steps": 5}),
    ({"shift": 3.0}, {"num_inference_steps": 28}),
    ({"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 1.15}),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"sigmas": [1.0, 0.75, 0.5, 0.25], "mu": 0.6}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"num_inference_steps": 6, "mu": 2.0}),
    ({"shift": 2.0}, {"sigmas": [0.9, 0.5, 0.2]}),
    ({"shift": 2.0}, {"timesteps": [900.0, 400.0]}),
]


@pytest.mark.parametrize("arguments, call", FLOW_CALLS)
def test_order_one_on_a_flow_is_euler_bit_for_bit(arguments, call):
    stock = FlowMatchEulerDiscreteScheduler(**arguments)
    ours = solver(stock, order=1)
    stock.set_timesteps(**call)
    ours.set_timesteps(**call)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert torch.equal(run(ours), run(stock))


@pytest.mark.parametrize("scheduler_class", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_flow_mode_multistep_schedulers_lend_their_grid(scheduler_class):
    stock = scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ours = solver(stock, base_rule="ddim")
    stock.set_timesteps(6)
    ours.set_timesteps(6)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert ours.config.use_flow_sigmas  # Flux leaves the sigmas to such a scheduler


def test_zero_terminal_snr():
    """ᾱ_T = 0 with v-prediction. DDIM has α = 0 there, this solver 2^-12, as the multistep schedulers have."""
    stock = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ours = solver(stock, base_rule="ddim")
    stock.set_timesteps(8)
    ours.set_timesteps(8)
    torch.testing.assert_close(run(ours), run(stock), rtol=0, atol=4 * 2**-12)
    with pytest.raises(ValueError, match="zero_snr"):
        solver(ddim(rescale_betas_zero_snr=True))


def test_v_prediction_equals_epsilon_prediction():
    """The same field told as ε and as v = α ε - σ x_0 gives the same picture, with history: v becomes ε first."""
    epsilon, velocity = (solver(ddim(prediction_type=kind), order=3) for kind in ("epsilon", "v_prediction"))
    alpha = epsilon.alphas_cumprod.sqrt()
    sigma = (1 - epsilon.alphas_cumprod).sqrt()

    def as_velocity(x, t):
        a, s = alpha[int(t)], sigma[int(t)]
        return (nonlinear_model(x, t) - s * x) / a  # ε = α v + σ x

    epsilon.set_timesteps(6)
    velocity.set_timesteps(6)
    torch.testing.assert_close(run(velocity, model=as_velocity), run(epsilon), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["ddim", "pndm"])
@pytest.mark.parametrize(
    "steps, expected",
    [
        (5, [999, 799, 599, 399, 199]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
        (10, list(range(999, 0, -100))),
        (12, [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82]),
        (15, [999, 932, 866, 799, 732, 666, 599, 532, 466, 399, 332, 266, 199, 132, 66]),
    ],
)
def test_published_grids_of_stable_diffusion(kind, steps, expected):
    stock = ddim() if kind == "ddim" else PNDMScheduler(**SD, timestep_spacing="trailing", skip_prk_steps=True)
    ours = solver(stock)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == expected
    assert ours.sigmas[0].item() == pytest.approx(14.6146, abs=1e-4)
    assert ours.sigmas[-1].item() == pytest.approx(0.02917, abs=1e-5)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (3, [1, 0.8633, 0.6123, 0]),
        (4, [1, 0.9045, 0.7595, 0.5128, 0]),
        (5, [1, 0.9266, 0.8257, 0.6780, 0.4412, 0]),
    ],
)
def test_published_grids_of_flux(steps, expected):
    ours = solver(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    ours.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=1.15)
    torch.testing.assert_close(ours.sigmas, torch.tensor(expected), rtol=0, atol=5.1e-5)


# -- the table --------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "sd": ddim(),
    "sd to zero": ddim("leading", set_alpha_to_one=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc flow": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("base_rule", BASE_RULES)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_weights_sum_to_one_and_use_only_existing_history(name, base_rule, order):
    ours = solver(SCHEDULERS[name], order=order, base_rule=base_rule)
    table = ours.table_from_actions(random_actions(ours, 6, (3,)), 6)
    error = (table.weights.double().sum(dim=-1) - 1).abs()
    assert (error <= 1e-6 * table.weights.abs().sum(dim=-1)).all()  # float32: relative to the terms of the sum
    assert (table.weights[:, ~live_weights(6, order)] == 0).all()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("base_rule", BASE_RULES)
def test_zero_residuals_give_exactly_the_base(name, base_rule):
    moving, fixed = (solver(SCHEDULERS[name], base_rule=base_rule, learn_grid=learn) for learn in (True, False))
    tables = [s.table_from_actions(torch.zeros(7, s.num_actions), 7) for s in (moving, fixed)]
    assert_same_table(*tables)
    timesteps, grid = fixed.base_grid(7)
    assert_same_table(tables[0][:2], (timesteps.float(), grid.s.float()))


def test_residuals_act_as_specified():
    """w_j gets a_j for j < h, the oldest live weight the rest: at h = 3 of order 4, (1 + a, b, -a - b, 0) on DDIM."""
    ours = solver(**PLAIN)
    a, b, c = 0.5, -0.25, 0.125
    weights = ours.table_from_actions(torch.tensor([a, b, c]).expand(5, 3), 5).weights
    expected = [
        [1, 0, 0, 0],
        [1 + a, -a, 0, 0],
        [1 + a, b, -a - b, 0],
        [1 + a, b, c, -a - b - c],
        [1 + a, b, c, -a - b - c],
    ]
    assert weights.tolist() == expected


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learned_grid_is_monotone_keeps_its_ends_and_scales_gaps(name):
    ours = solver(SCHEDULERS[name])
    table = ours.table_from_actions(random_actions(ours, 6, (4,), scale=1.0), 6)
    base_timesteps, base = ours.base_grid(6)
    assert (table.sigmas.diff(dim=-1) < 0).all()
    assert (table.timesteps.diff(dim=-1) < (1 if name == "unipc flow" else 0)).all()  # whose timesteps are truncated
    assert (table.timesteps <= base_timesteps[0]).all()
    for end in (0, -1):
        torch.testing.assert_close(table.sigmas[:, end], base.s[end].float().expand(4), rtol=0, atol=0)
    torch.testing.assert_close(table.timesteps[:, 0], base_timesteps[0].float().expand(4), rtol=0, atol=0)


def test_learned_grid_scales_log_snr_gaps():
    """One gap times e, the others as they were: the ratio of any two new gaps is that of the old ones times e or 1."""
    ours = solver()
    actions = torch.zeros(5, ours.num_actions)
    actions[2, -1] = 1.0
    before, after = (ours.table_from_actions(a, 5).sigmas.double().log().diff() for a in (0 * actions, actions))
    ratio = after / before
    torch.testing.assert_close(ratio[2] / ratio[0], torch.tensor(1.0).double().exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[[1, 3, 4]], ratio[0].expand(3), rtol=1e-5, atol=0)


def test_timesteps_follow_the_training_schedule():
    """At a moved point, σ/α of the fractional timestep is the table's, by log interpolation between its neighbours."""
    ours = solver()
    table = ours.table_from_actions(random_actions(ours, 6), 6)
    train = ((1 - ours.alphas_cumprod) / ours.alphas_cumprod).sqrt().double()
    for t, sigma in zip(table.timesteps.double(), table.sigmas, strict=False):
        low = int(t)
        expected = train[low].log() + (t - low) * (train[min(low + 1, 999)] / train[low]).log()
        assert sigma.log().item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_constant_field_is_integrated_exactly(prediction_type):
    """dy = f ds with constant f: whatever the weights and the grid, y_K = y_0 + (s_K - s_0) f."""
    flow = prediction_type == "flow_prediction"
    ours = solver(SCHEDULERS["flow"] if flow else ddim(prediction_type=prediction_type))
    ours.set_table(ours.table_from_actions(random_actions(ours, 6), 6))
    ours.set_timesteps(6)
    f = noise().flip(0)
    s = ours.sigmas
    alpha = torch.ones_like(s) if flow else (s**2 + 1).rsqrt()

    def model(x, t):
        if prediction_type != "v_prediction":
            return f
        i = ours.index_for_timestep(t)
        return (f - s[i] * alpha[i] * x) / alpha[i]

    expected = alpha[-1] * (noise() / alpha[0] + (s[-1] - s[0]) * f)
    torch.testing.assert_close(run(ours, model=model), expected, rtol=2e-5, atol=2e-5)


def test_step_is_the_multistep_formula():
    """x in, x out, against y and s written out in float64 with random weights on a random grid."""
    ours = solver(order=3)
    table = ours.table_from_actions(random_actions(ours, 6), 6)
    ours.set_table(table)
    ours.set_timesteps(6)
    s, weights = table.sigmas.double(), table.weights.double()
    alpha = (s**2 + 1).rsqrt()
    y, history = noise().double() / alpha[0], []
    for i, t in enumerate(table.timesteps):
        history = [nonlinear_model((y * alpha[i]).float(), t).double(), *history][:3]
        y = y + (s[i + 1] - s[i]) * sum(w * f for w, f in zip(weights[i], history, strict=False))
    torch.testing.assert_close(run(ours), (y * alpha[-1]).float(), rtol=2e-5, atol=2e-5)


def test_a_table_per_sample_equals_each_sample_alone():
    for stock in (ddim(), ddim(prediction_type="v_prediction"), SCHEDULERS["flow"]):
        ours = solver(stock)
        table = ours.table_from_actions(random_actions(ours, 5, (3,)), 5)
        ours.set_table(table)
        ours.set_timesteps(5)
        assert ours.timesteps.shape == (5,) and ours.sigmas.shape == (6,)
        x = noise(3)
        for t in ours.timesteps:
            own_times = ours.table.timesteps[:, ours.step_index or 0]
            x = ours.step(nonlinear_model(x, own_times), t, x).prev_sample
        for b in range(3):
            ours.set_table(SolverTable(*(part[b] for part in table)))
            ours.set_timesteps(5)
            torch.testing.assert_close(run(ours, noise(3)[b : b + 1])[0], x[b], rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match="3 samples"):
            ours.set_table(table)
            ours.set_timesteps(5)
            run(ours, noise(2))


def test_pinned_table_stays_until_cleared():
    ours = solver()
    table = ours.table_from_actions(random_actions(ours, 4), 4)
    ours.set_table(table)
    for _ in range(2):
        ours.set_timesteps(4)
        assert_same_table(ours.table, table)
    with pytest.raises(ValueError, match="pinned table has 4 steps"):
        ours.set_timesteps(5)
    ours.clear_table()
    ours.set_timesteps(4)
    assert_same_table(ours.table, ours.coefficients(4))


def test_pinned_table_must_fit_the_solver():
    table = solver(order=4).table_from_actions(torch.zeros(5, 4), 5)
    narrow = solver(order=2)
    with pytest.raises(ValueError, match="4 weights a step, but solver_order is 2"):
        narrow.set_table(table)
    narrow.set_table(table._replace(weights=table.weights[:, :1]))  # uses less history than it could
    per_sample = SolverTable(*(part.expand(3, *part.shape) for part in table))
    for wrong in (
        table._replace(sigmas=table.sigmas[:-1]),
        table._replace(timesteps=table.timesteps[1:]),
        table._replace(weights=table.weights[:3]),
        table._replace(weights=table.weights[:, 0]),
        per_sample._replace(weights=table.weights),
        per_sample._replace(sigmas=per_sample.sigmas[:2]),
    ):
        with pytest.raises(ValueError) as error:
            solver().set_table(wrong)
        assert all(str(tuple(part.shape)) in str(error.value) for part in wrong)


def test_gradients_reach_every_live_action_and_no_dead_one():
    for stock in (ddim(), SCHEDULERS["sd to zero"], SCHEDULERS["flow"]):
        ours = solver(stock)
        actions = random_actions(ours, 5, (2,)).requires_grad_()
        ours.set_table(ours.table_from_actions(actions, 5))
        ours.set_timesteps(5)
        x = noise()
        for t in ours.timesteps:
            own_times = ours.table.timesteps[:, ours.step_index or 0]
            x = ours.step(nonlinear_model(x, own_times), t, x).prev_sample
        x.square().sum().backward()
        assert actions.grad.isfinite().all()
        mask = ours.action_mask(5)
        assert (actions.grad[:, mask] != 0).all()
        assert (actions.grad[:, ~mask] == 0).all()


@pytest.mark.parametrize("steps", [True, "5", 5.5, math.nan, math.inf, 0, 1001])
def test_steps_that_are_no_number_of_steps(steps):
    with pytest.raises(ValueError, match=r"The number of steps must be 1 \.\. 1000, got "):
        solver().set_timesteps(steps)


def test_steps_of_other_types_are_whole_numbers_too():
    ours = solver()
    for steps in (5.0, np.int64(5)):
        ours.set_timesteps(steps)
        assert ours.num_inference_steps == 5 and type(ours.num_inference_steps) is int


def test_outside_of_the_trained_steps_it_is_the_base_rule():
    ours = solver()
    torch.nn.init.constant_(ours.policy.mlp[-1].bias, 0.3)
    assert not ours.coefficients(12).weights.equal(solver().coefficients(12).weights)  # nobody said what was trained
    ours.extend_training([4, 8], [1.0])
    for steps in (3, 9, 40):
        assert_same_table(ours.coefficients(steps), solver().coefficients(steps))
    for steps in (4, 6, 8):
        assert not ours.coefficients(steps).weights.equal(solver().coefficients(steps).weights)
    ours.extend_training(iter([10]), iter([7.5]))
    assert ours.config.trained_steps == [4, 10] and ours.config.trained_guidance_scales == [1.0, 7.5]
    older = solver(trained_steps=[3, 8])  # from before guidance scales were noted
    older.extend_training([10], [3.0])
    assert older.config.trained_steps == [3, 10] and older.config.trained_guidance_scales is None


@pytest.fixture
def warned(caplog):
    """What diffusers' logger has said, which is not passed on to others by itself."""
    logging.enable_propagation()
    yield lambda: [record.getMessage() for record in caplog.records]
    logging.disable_propagation()


def test_steps_that_it_was_not_trained_on_are_said_once_each(warned):
    ours = trained(solver(trained_steps=[3, 8]))
    for steps in (3, 8, 15, 15, 2, 15):
        ours.set_timesteps(steps)
    copy.copy(ours).coefficients(15)  # as cascades ask for it
    assert warned() == [
        f"This solver was trained on 3 to 8 steps; at {steps} it is its base rule dpm2m." for steps in (15, 2)
    ]
    trained(solver(trained_steps=[3, 8])).set_timesteps(15)
    assert len(warned()) == 3
    logging.set_verbosity_error()  # a user's wish
    trained(solver(trained_steps=[3, 8])).set_timesteps(15)
    logging.set_verbosity_warning()
    assert len(warned()) == 3


def test_a_guidance_scale_that_it_was_not_trained_on_is_told_as_the_nearest(warned):
    ours = trained(solver(trained_guidance_scales=[1.5, 7.5]))
    assert_same_table(ours.coefficients(5, 20.0), ours.coefficients(5, 7.5))
    assert_same_table(ours.coefficients(5, 1.0), ours.coefficients(5, 1.5))
    assert not ours.coefficients(5, 3.0).weights.equal(ours.coefficients(5, 7.5).weights)
    messages = warned()
    assert len(messages) == 2 and "guidance scales of 1.5 to 7.5; 20 is told to it as 7.5" in messages[0]


@pytest.mark.parametrize("span", [[8, 3], [3], "3-8", [3, None]])
@pytest.mark.parametrize("name", ["trained_steps", "trained_guidance_scales"])
def test_a_span_that_is_none(name, span):
    with pytest.raises(ValueError, match=name):
        solver(**{name: span})


def test_steps_are_whole_and_scales_finite():
    with pytest.raises(ValueError, match="whole numbers"):
        solver(trained_steps=[3.0, 8.0])
    with pytest.raises(ValueError, match="trained_guidance_scales"):
        solver(trained_guidance_scales=[3.0, math.inf])
    assert solver(trained_guidance_scales=[3, 7.5]).config.trained_guidance_scales == [3, 7.5]


def test_a_span_of_one_number_is_said_as_one(warned):
    trained(solver(trained_guidance_scales=[3.0, 3.0])).coefficients(5, 7.5)
    assert "guidance scales of 3; 7.5 is told to it as 3." in warned()[0]


@pytest.mark.parametrize("trained_steps", [None, [3, 8]])
def test_a_fresh_policy_is_said_once(trained_steps, warned):
    """Also that of `from_config`, which keeps the number of steps that another policy was trained on."""
    ours = ConsistencySolverScheduler.from_config(trained(solver(trained_steps=trained_steps)).config)
    for steps in (4, 5):
        ours.set_timesteps(steps)
    (message,) = warned()
    assert "untrained" in message and "from_pretrained" in message


def test_nothing_is_said_of_trained_solvers_pinned_tables_and_classical_rules(warned):
    trained(solver()).set_timesteps(5)  # trained, but nobody wrote down on what
    solver(order=1, learn_grid=False).set_timesteps(5)  # there is nothing to learn
    for trained_steps in (None, [3, 8]):
        pinned = solver(trained_steps=trained_steps)
        pinned.set_table(pinned.table_from_actions(torch.zeros(12, 4), 12))
        pinned.set_timesteps(12)
    solver(trained_steps=[3, 8]).coefficients(5)  # a training's own question
    assert warned() == []


def test_known_steps():
    assert solver().known_steps == list(range(2, 17))
    assert solver(trained_steps=[3, 8]).known_steps == [3, 4, 5, 6, 7, 8]
    assert solver(trained_steps=[3, 8]).bake(steps=(10, 9)).known_steps == [9, 10]
    fresh = solver(solver(trained_steps=[3, 8], trained_guidance_scales=[1.0, 3.0]))  # another policy
    assert fresh.config.trained_steps is None and fresh.config.trained_guidance_scales is None


def test_action_mask():
    """Dim d (from 1) is live from history d + 1 on, that is from step d (from 0); the grid's everywhere."""
    expected = [[d <= i for d in (1, 2, 3)] + [True] for i in range(5)]
    assert solver().action_mask(5).tolist() == expected
    assert solver(learn_weights=False).action_mask(2).tolist() == [[True], [True]]
    assert solver(learn_grid=False, order=1).action_mask(3).shape == (3, 0)


def test_grid_alone_keeps_the_base_rule():
    """Without learned weights they are those of the base rule, evaluated on the moved grid."""
    ours = solver(learn_weights=False, base_rule="dpm2m", lower_order_final=False)
    table = ours.table_from_actions(random_actions(ours, 6), 6)
    expected = dpm2m(Grid.variance_preserving(table.sigmas.double()), 4).float()
    torch.testing.assert_close(table.weights, expected, rtol=1e-4, atol=1e-4)
    assert not table.weights.equal(ours.table_from_actions(torch.zeros(6, 1), 6).weights)


# -- the policy -------------------------------------------------------------------------------------------------------


def test_policy_inputs():
    ours = solver(order=3)
    ours.guidance_scale = 7.5
    inputs = ours.policy_inputs(4)
    _, grid = ours.base_grid(4)
    torch.testing.assert_close(inputs[:, 0], grid.u[:-1].float())
    torch.testing.assert_close(inputs[:, 1], grid.u[1:].float())
    torch.testing.assert_close(inputs[:, 2], torch.tensor([1 / 3, 2 / 3, 1, 1]))
    torch.testing.assert_close(inputs[:, 3:], torch.tensor([[1 / 4, 0.75]]).expand(4, 2))
    assert ours.policy_inputs(4, 3.0)[0, -1].item() == pytest.approx(0.3)
    published = solver(inputs="published", **PLAIN).policy_inputs(5)
    torch.testing.assert_close(published[0], torch.tensor([1.0, 799 / 999]))
    torch.testing.assert_close(published[-1], torch.tensor([199 / 999, -1 / 999]))


def test_uniform_categorical_policy_has_the_published_mean():
    ours = solver(head="categorical", **PLAIN)
    logits = ours.policy(ours.policy_inputs(5))
    assert logits.shape == (5, 3, 11) and (logits == 0).all()
    weights = ours.coefficients(5).weights
    torch.testing.assert_close(weights[3:], torch.tensor([2.0, -1.0, 0.0, 0.0]).expand(2, 4), rtol=0, atol=1e-6)


def test_gaussian_policy_is_bounded_and_starts_at_zero():
    ours = solver(weight_bound=0.5, grid_bound=2.0)
    inputs = ours.policy_inputs(5)
    assert (ours.policy(inputs) == 0).all()
    with torch.no_grad():
        ours.policy.mlp[-1].bias.fill_(100.0)
    torch.testing.assert_close(ours.policy(inputs), torch.tensor([0.5, 0.5, 0.5, 2.0]).expand(5, 4))


def test_published_policy_has_the_published_size():
    ours = solver(head="categorical", inputs="published", **PLAIN)
    assert sum(p.numel() for p in ours.policy.parameters()) == 75_041


def test_fresh_policies_are_the_same_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    one, other = solver(), solver()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inputs", ["noise_levels", "published"])
def test_guidance_scale_must_be_finite(guidance, inputs):
    ours = trained(solver(inputs=inputs))
    calls = (
        lambda: setattr(ours, "guidance_scale", guidance),
        lambda: ours.coefficients(5, guidance),
        lambda: ours.policy_inputs(5, guidance),
        lambda: ours.bake(steps=(5,), guidance_scale=guidance),
        lambda: ours.bake(steps=(5,)).coefficients(5, guidance),
        lambda: solver(guidance_scale=guidance),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{guidance}"):
            call()
    assert ours.guidance_scale == 1.0


def test_guidance_scale_reaches_the_table():
    ours = trained(solver())
    tables = []
    for guidance in (1.0, 7.5, 7.5):
        ours.guidance_scale = guidance
        ours.set_timesteps(5)
        tables.append(ours.table)
    assert not torch.equal(tables[0].weights, tables[1].weights)
    assert_same_table(tables[1], tables[2])


# -- what pipelines rely on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype):
    for stock in (ddim(), ddim(prediction_type="v_prediction"), SCHEDULERS["flow"]):
        ours = solver(stock)
        ours.set_timesteps(5)
        half = run(ours, noise(dtype=dtype))
        assert half.dtype == dtype
        ours.set_timesteps(5)
        precision = torch.finfo(dtype).eps
        torch.testing.assert_close(half.float(), run(ours), rtol=0, atol=40 * precision)


def test_signatures_that_pipelines_inspect():
    step = inspect.signature(ConsistencySolverScheduler.step).parameters
    assert not {"eta", "generator"} & step.keys()
    set_timesteps = inspect.signature(ConsistencySolverScheduler.set_timesteps).parameters
    assert {"sigmas", "timesteps", "mu"} <= set_timesteps.keys()
    ours = solver()
    assert ours.order == 1 and ours.init_noise_sigma == 1.0 and ours.config.steps_offset == 1


def test_beginning_in_the_middle_has_no_history():
    """Image-to-image at step 2 of 6: DDIM first, then two weights, ... with the oldest one taking what is missing."""
    ours = solver(order=3)
    ours.set_timesteps(6)
    weights = ours.table.weights.double()
    ours.set_begin_index(2)
    x = y = noise()
    history = []
    s = ours.sigmas.double()
    alpha = (s**2 + 1).rsqrt()
    for i, t in list(enumerate(ours.timesteps))[2:]:
        x = ours.step(nonlinear_model(x, t), t, x).prev_sample
        history = [nonlinear_model(y, t), *history][:3]
        w = weights[i].tolist()
        live = len(history)
        w = [*w[: live - 1], 1 - sum(w[: live - 1])]
        f = sum(a * b for a, b in zip(w, history, strict=True))
        y = (alpha[i + 1] * (y.double() / alpha[i] + (s[i + 1] - s[i]) * f)).float()
    torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_add_noise_matches_diffusers():
    x, e = noise(), noise().flip(0)
    stock, ours = ddim(), solver()
    t = torch.tensor([20, 977])
    torch.testing.assert_close(ours.add_noise(x, e, t), stock.add_noise(x, e, t), rtol=1e-5, atol=1e-5)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = solver(stock)
    for s in (stock, ours):
        s.set_timesteps(5)
    t = ours.timesteps[[1, 3]]
    torch.testing.assert_close(ours.scale_noise(x, t, e), stock.scale_noise(x, t, e))


def test_noise_on_a_learned_grid_is_that_of_the_table():
    ours = trained(solver())
    ours.set_timesteps(5)
    s = ours.sigmas[2]
    noisy = ours.add_noise(torch.zeros_like(noise()), noise(), ours.timesteps[2:3])
    torch.testing.assert_close(noisy, noise() * s * (s**2 + 1).rsqrt(), rtol=1e-4, atol=1e-4)


def test_custom_timesteps_and_sigmas():
    ours = solver(**PLAIN)
    ours.set_timesteps(timesteps=[999, 650, 300])
    assert ours.timesteps.tolist() == [999, 650, 300]
    sigmas = ours.sigmas
    ours.set_timesteps(sigmas=sigmas.tolist())
    torch.testing.assert_close(ours.timesteps, torch.tensor([999.0, 650.0, 300.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.sigmas, sigmas)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 999])
def test_extreme_numbers_of_steps(name, steps):
    ours = trained(solver(SCHEDULERS[name]))
    ours.set_timesteps(steps)
    assert len(ours.timesteps) == steps
    assert all(part.isfinite().all() for part in ours.table)
    assert (ours.sigmas.diff() <= 0).all()


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match=f"got {steps}"):
        solver().set_timesteps(steps)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_rule": "heun"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "karras"},
        {"beta_schedule": "cosine"},
        {"head": "beta"},
        {"final_sigmas_type": "none"},
        {"inputs": "text"},
        {"grid": "lms"},
        {"solver_order": 0},
        {"solver_order": 2.5},
        {"solver_order": "4"},
        {"num_bins": 1},
        {"hidden_dim": 0},
        {"num_train_timesteps": 0},
        {"weight_bound": -1},
        {"weight_bound": math.inf},
        {"grid_bound": math.nan},
        {"prediction_type": "flow_prediction"},
    ],
)
def test_wrong_configuration(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        ConsistencySolverScheduler(**wrong)


@pytest.mark.parametrize(
    "stock, word",
    [
        (DDIMScheduler(), "clip_sample"),
        (DDPMScheduler(), "DDPMScheduler"),
        (DEISMultistepScheduler(), "DEISMultistepScheduler"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
    ],
)
def test_unsupported_schedulers_are_refused_by_name(stock, word):
    with pytest.raises(ValueError, match=word):
        solver(stock)


@pytest.mark.parametrize("sigmas", [[1, 0.5, 0], [1, 1], [2, 1], [1, math.nan], [0.1, 0.5]])
def test_a_flow_grid_that_has_no_log_snr(sigmas):
    """A second 0 or 1 would make the learned grid NaN, and the picture black."""
    with pytest.raises(ValueError, match="must fall from point to point, from 1 or less"):
        solver(SCHEDULERS["flow"]).set_timesteps(sigmas=sigmas)


def test_misuse_is_told():
    ours = solver()
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(noise(), 999, noise())
    with pytest.raises(ValueError, match="number of steps"):
        ours.set_timesteps()
    with pytest.raises(ValueError, match="mu="):
        ours.set_timesteps(4, mu=1.0)
    with pytest.raises(ValueError, match="must fall"):
        ours.set_timesteps(timesteps=[300, 600, 100])
    ours.set_timesteps(2)
    with pytest.raises(ValueError, match="none of this run's"):
        ours.step(noise(), 500, noise())
    run(ours)
    with pytest.raises(ValueError, match="2 steps are done"):
        ours.step(noise(), 499, noise())
    with pytest.raises(ValueError, match="actions"):
        ours.table_from_actions(torch.zeros(3, 4), 2)


def test_check_compatible():
    ours, flow = solver(), solver(SCHEDULERS["flow"])
    ours.check_compatible(ddim("leading"))
    ours.check_compatible(solver(base_rule="ddim"))
    ours.check_compatible(DPMSolverMultistepScheduler(**SD))
    flow.check_compatible(FlowMatchEulerDiscreteScheduler(shift=1.0))
    flow.check_compatible(SCHEDULERS["unipc flow"])
    for one, other in [
        (ours, DDIMScheduler()),
        (ours, ddim(prediction_type="v_prediction")),
        (ours, SCHEDULERS["flow"]),
        (flow, ddim()),
    ]:
        with pytest.raises(ValueError, match="noise schedules differ"):
            one.check_compatible(other)


def test_same_noise_same_picture_whatever_the_batch():
    ours = trained(solver())
    ours.set_timesteps(5)
    together = run(ours, noise(4))
    for b in range(4):
        ours.set_timesteps(5)
        assert torch.equal(run(ours, noise(4)[b : b + 1])[0], together[b])


def test_from_scheduler_of_a_solver_keeps_its_schedule():
    again = solver(solver(ddim("leading")), order=2)
    assert again.config.solver_order == 2 and again.config.timestep_spacing == "leading"
    again.check_compatible(ddim())
