"""A short HiFlow on the tiny pipelines."""

from dataclasses import replace

import torch
from tiny_pipelines import tiny_pipeline

from solver.samplers.hiflow import PRESETS, with_steps
from solver.samplers.latents import latent_shape

N, K = 5, 3
CODE = replace(with_steps(PRESETS["code"], N), stage_steps=(K,))
PLAIN = replace(CODE, ntk_factor=(1.0,), proportional_attention=False, shifted_patches=False)
OURS = ("height", "width", "generator", "output_type", "guidance_scale", "true_cfg_scale", "max_area")


def prepared(family, batch_size=1):
    pipe, call = tiny_pipeline(family, batch_size=batch_size)
    return pipe, {name: value for name, value in call.items() if name not in OURS}


def noise_of(pipe, seed, *sizes):
    """The noises of a cascade: one generator a picture, size after size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *latent_shape(pipe, size, size), generator=generator) for size in sizes]
