"""The solver inside unmodified pipelines of every family."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_pipelines import FAMILIES, run, tiny_pipeline

from solver import ConsistencySolverScheduler

STEPS = 4
TOKENS = 64  # of a packed tiny image


def grid_of_the_call(family, scheduler):
    """What a pipeline says of its grid in `set_timesteps`, beside the number of steps."""
    if family == "hunyuan-video":
        return {"sigmas": lambda steps: torch.linspace(1, 0, steps + 1)[:-1].tolist()}
    if family in ("flux", "flux-kontext", "qwen-image"):
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(TOKENS, *(scheduler.config[key] for key in keys))
        return {"sigmas": lambda steps: torch.linspace(1, 1 / steps, steps).tolist(), "mu": mu}
    return {}


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_first_order_solver_is_the_stock_scheduler(family):
    pipe, call = tiny_pipeline(family, batch_size=2)
    expected = run(pipe, call, num_inference_steps=STEPS)
    pipe.scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3, base_rule="ddim")
    latents = run(pipe, call, num_inference_steps=STEPS)
    if pipe.scheduler.is_flow:
        assert torch.equal(latents, expected)
    else:
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_baked_solver_equals_the_policy_and_its_coefficients_matter(family):
    pipe, call = tiny_pipeline(family)
    untrained = run(pipe, call, num_inference_steps=STEPS)
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3, guidance_scale=3.0)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.normal_(generator=torch.Generator().manual_seed(0))
    pipe.scheduler = solver
    latents = run(pipe, call, num_inference_steps=STEPS)
    assert not torch.allclose(latents, untrained, atol=1e-2)
    pipe.scheduler = solver.bake(steps=(STEPS,), **grid_of_the_call(family, solver))
    torch.testing.assert_close(run(pipe, call, num_inference_steps=STEPS), latents, rtol=1e-5, atol=1e-5)


def test_flow_mode_solver_in_wan_equals_unipc_first_order():
    """UniPC of order 1 without corrector is Euler; Wan is sampled with such flow-mode schedulers."""
    pipe, call = tiny_pipeline("wan")
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=list(range(STEPS)),
    )
    expected = run(pipe, call, num_inference_steps=STEPS)
    pipe.scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, base_rule="ddim")
    torch.testing.assert_close(run(pipe, call, num_inference_steps=STEPS), expected, rtol=1e-4, atol=1e-4)


def test_dpm_base_in_stable_diffusion_equals_dpm_solver():
    pipe, call = tiny_pipeline("sd")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    expected = run(pipe, call, num_inference_steps=STEPS)
    pipe.scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler)
    torch.testing.assert_close(run(pipe, call, num_inference_steps=STEPS), expected, rtol=1e-4, atol=1e-4)


def test_image_to_image_begins_in_the_middle():
    pipe, call = tiny_pipeline("sd")
    image_to_image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    call = {key: value for key, value in call.items() if key not in ("height", "width")}
    call.update(image=image, strength=0.5, num_inference_steps=8)
    expected = run(image_to_image, call)
    stock = image_to_image.scheduler
    image_to_image.scheduler = ConsistencySolverScheduler.from_scheduler(stock, base_rule="ddim")
    torch.testing.assert_close(run(image_to_image, call), expected, rtol=1e-4, atol=1e-4)


def test_other_schedulers_can_take_over_the_configuration():
    """`X.from_config(pipe.scheduler.config)` is how users change schedulers."""
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver = ConsistencySolverScheduler.from_scheduler(stock)
    again = FlowMatchEulerDiscreteScheduler.from_config(solver.config)
    stock.set_timesteps(STEPS)
    again.set_timesteps(STEPS)
    assert torch.equal(again.sigmas, stock.sigmas)
