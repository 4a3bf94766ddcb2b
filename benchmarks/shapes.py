"""Pipelines of published shapes with random weights, or of tiny ones, built on the device, without text encoders.

    pipe = build_pipeline("flux-dev", tiny=False, device=torch.device("cuda"), dtype=torch.bfloat16)
    image = pipe("x", height=1024, width=1024).images[0]

What a run takes does not depend on the values of weights and texts: prompts are given random embeddings of the usual
length, whatever they say. Autoencoders are in float32, as everywhere in this project. FLUX.1 dev needs 30 GB of
memory, HunyuanVideo 35 GB, Stable Diffusion 3.5 Large 22 GB.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from solver.samplers.latents import denoiser


def autoencoder(channels: int, tiny: bool) -> AutoencoderKL:
    """Eight pixels a latent, in float32 as everywhere in this project."""
    widths = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        norm_num_groups=8 if tiny else 32,
        shift_factor=0.1,
        sample_size=512,
    ).float()


def diffusion_scheduler() -> DDIMScheduler:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def sd15(tiny: bool) -> DiffusionPipeline:
    small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "attention_head_dim": 4} if tiny else {}
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **small)
    return StableDiffusionPipeline(
        autoencoder(4, tiny), None, None, unet, diffusion_scheduler(), None, None, requires_safety_checker=False
    )


def sdxl(tiny: bool) -> DiffusionPipeline:
    widths, heads, depths = ((8, 8, 8), 4, 1) if tiny else ((320, 640, 1280), (5, 10, 20), (1, 2, 10))
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depths,
        attention_head_dim=heads,
        norm_num_groups=4 if tiny else 32,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        autoencoder(4, tiny), None, None, None, None, unet, diffusion_scheduler(), add_watermarker=False
    )


def sd35_large(tiny: bool) -> DiffusionPipeline:
    layers, heads, head = (2, 2, 16) if tiny else (38, 38, 64)
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head,
        caption_projection_dim=heads * head,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(16, tiny), *(None,) * 6
    )


def flux_dev(tiny: bool) -> DiffusionPipeline:
    small = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1} if tiny else {}
    transformer = FluxTransformer2DModel(guidance_embeds=True, **small)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return FluxPipeline(scheduler, autoencoder(16, tiny), None, None, None, None, transformer)


def hunyuan_video(tiny: bool) -> DiffusionPipeline:
    small = (
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 1} if tiny else {}
    )
    widths = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} if tiny else {}
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=HunyuanVideoTransformer3DModel(guidance_embeds=True, **small),
        vae=AutoencoderKLHunyuanVideo(**widths).float(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


class Family(NamedTuple):
    """A published model.

    Attributes:
        build: makes its pipeline, or a tiny one.
        size: usual height and width in pixels.
        rows: that the denoiser sees of a picture; 2 where guidance doubles them.
        text: words and width of the text.
        pooled: width of the pooled text, None where there is none.
        frames: of a video, None of a picture.
    """

    build: Callable[[bool], DiffusionPipeline]
    size: tuple[int, int]
    rows: int
    text: tuple[int, int]
    pooled: int | None = None
    frames: int | None = None


FAMILIES = {
    "sd15": Family(sd15, (512, 512), 2, (77, 768)),
    "sdxl": Family(sdxl, (1024, 1024), 2, (77, 2048), 1280),
    "sd35-large": Family(sd35_large, (1024, 1024), 2, (333, 4096), 2048),
    "flux-dev": Family(flux_dev, (1024, 1024), 1, (512, 4096), 768),
    "hunyuan-video": Family(hunyuan_video, (544, 960), 1, (256, 4096), 768, 61),
}


def build_pipeline(name: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline of a family on the device; its `encode_prompt` answers random embeddings."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipe = family.build(tiny)
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # on the CPU, as it is when loaded
    nn.Module.to(denoiser(pipe), device, dtype)  # diffusers' own warns, of nothing
    for part in (pipe.vae, denoiser(pipe)):
        part.eval().requires_grad_(False)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = random_text(pipe, family, device, dtype)
    return pipe


def random_text(pipe: DiffusionPipeline, family: Family, device: torch.device, dtype: torch.dtype) -> Callable:
    """What stands in for `encode_prompt`: the same embeddings for any prompt, in the order of the family."""
    words = torch.randn(1, *family.text, device=device, dtype=dtype)
    pooled = None if family.pooled is None else torch.randn(1, family.pooled, device=device, dtype=dtype)
    own = pipe.encode_prompt

    def encode_prompt(prompt, *args, **kwargs):
        if prompt is None:  # embeddings are given
            return own(prompt, *args, **kwargs)
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        embeds = words.expand(prompts, -1, -1)
        if pooled is None:
            return embeds, embeds
        pools = pooled.expand(prompts, -1)
        if family.frames is not None:
            return embeds, pools, torch.ones(prompts, family.text[0], device=device, dtype=dtype)
        if family.rows == 1:
            return embeds, pools, torch.zeros(family.text[0], 3, device=device, dtype=dtype)
        return embeds, embeds, pools, pools

    return encode_prompt
