"""Grids of published models: the noise levels of a run, from its number of steps and of image tokens.

They are what the stock pipelines set, without loading one. All answer (steps + 1,), both ends included.
"""

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from solver.samplers.cascade import diffusion_sigmas

QWEN_SHIFT = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def shifted(steps: int, tokens: int, **config) -> Tensor:
    """The grid of pipelines that pass the sigmas 1 .. 1/steps, and a shift for the number of tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    bounds = [config.get(name, default) for name, default in (("max_image_seq_len", 4096), ("max_shift", 1.15))]
    mu = calculate_shift(tokens, max_seq_len=bounds[0], max_shift=bounds[1])
    shift = {"mu": mu} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), **shift)
    return scheduler.sigmas


def own_grid(steps: int, tokens: int, shift: float) -> Tensor:
    """The grid of SD3, which leaves it to the scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def unipc_grid(steps: int, tokens: int, shift: float) -> Tensor:
    """The grid of Wan's UniPC."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def latent_diffusion_grid(steps: int, tokens: int) -> Tensor:
    """The grid of SD 1.5 and SDXL, σ/α of the timesteps that DDIM takes, ending at the lowest training noise."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    leading = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    return diffusion_sigmas(DDIMScheduler(**betas, **leading), steps)
