"""Tiny pipelines of the real classes, with random weights and no text encoders: every family runs offline in a second.

    pipe, call = tiny_pipeline("flux", batch_size=2, seed=0)
    latents = pipe(**call, num_inference_steps=3).images        # `.frames` of the video families

`call` has prompt embeddings instead of prompts, a guidance scale above 1, one CPU generator an image and
`output_type="latent"`. The same seed gives the same weights and the same call.
"""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)

SIZE = 32  # pixels
WORDS = 5  # length of a prompt, in tokens


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def image_vae(**config) -> AutoencoderKL:
    """Four latent channels, half the size."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIZE,
        **config,
    )


def unet(**config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=SIZE // 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
        **config,
    )


def diffusion_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def stable_diffusion(batch_size: int):
    pipe = StableDiffusionPipeline(
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=diffusion_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    call = {"prompt_embeds": randn(batch_size, WORDS, 16), "negative_prompt_embeds": randn(batch_size, WORDS, 16)}
    return pipe, {**call, "guidance_scale": 3.0}


def stable_diffusion_xl(batch_size: int):
    pipe = StableDiffusionXLPipeline(
        vae=image_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            use_linear_projection=True,
        ),
        scheduler=diffusion_scheduler(),
        add_watermarker=False,
    )
    call = {"prompt_embeds": randn(batch_size, WORDS, 16), "negative_prompt_embeds": randn(batch_size, WORDS, 16)}
    pooled = {"pooled_prompt_embeds": randn(batch_size, 16), "negative_pooled_prompt_embeds": randn(batch_size, 16)}
    return pipe, {**call, **pooled, "guidance_scale": 3.0}


def stable_diffusion_3(batch_size: int, **more):
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            **more,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035),
        **dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")),
    )
    call = {"prompt_embeds": randn(batch_size, WORDS, 16), "negative_prompt_embeds": randn(batch_size, WORDS, 16)}
    pooled = {"pooled_prompt_embeds": randn(batch_size, 16), "negative_pooled_prompt_embeds": randn(batch_size, 16)}
    return pipe, {**call, **pooled, "guidance_scale": 3.0}


def stable_diffusion_35(batch_size: int):
    """3.5 normalizes queries and keys; in its medium size images attend to themselves once more."""
    return stable_diffusion_3(batch_size, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(batch_size: int, pipeline_class=FluxPipeline):
    pipe = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        **dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2")),
    )
    call = {"prompt_embeds": randn(batch_size, WORDS, 16), "pooled_prompt_embeds": randn(batch_size, 16)}
    return pipe, {**call, "guidance_scale": 2.5}


def flux_kontext(batch_size: int):
    pipe, call = flux(batch_size, FluxKontextPipeline)
    image = torch.rand(1, 3, SIZE, SIZE)
    # Both keep the pipeline from scaling a tiny image to the sizes that the big model knows.
    return pipe, {**call, "image": image, "max_area": SIZE**2, "_auto_resize": False}


def qwen_image(batch_size: int):
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    )
    embeds = {name: randn(batch_size, WORDS, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    masks = {f"{name}_mask": torch.ones(batch_size, WORDS, dtype=torch.int64) for name in embeds}
    return pipe, {**embeds, **masks, "true_cfg_scale": 3.0}


def wan(batch_size: int):
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
    )
    embeds = {name: randn(batch_size, WORDS, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipe, {**embeds, "guidance_scale": 3.0, "num_frames": 5}


def hunyuan_video(batch_size: int):
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    call = {"prompt_embeds": randn(batch_size, WORDS, 16), "pooled_prompt_embeds": randn(batch_size, 8)}
    mask = torch.ones(batch_size, WORDS)
    return pipe, {**call, "prompt_attention_mask": mask, "guidance_scale": 3.0, "num_frames": 5}


FAMILIES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd35": stable_diffusion_35,
    "flux": flux,
    "flux-kontext": flux_kontext,
    "qwen-image": qwen_image,
    "wan": wan,
    "hunyuan-video": hunyuan_video,
}


def tiny_pipeline(family: str, batch_size: int = 1, seed: int = 0) -> tuple[DiffusionPipeline, dict]:
    """A pipeline of a family (a key of `FAMILIES`) on the CPU in float32, and the arguments of a call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe, call = FAMILIES[family](batch_size)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch_size)]
    return pipe, {**call, "height": SIZE, "width": SIZE, "generator": generators, "output_type": "latent"}


def run(pipe: DiffusionPipeline, call: dict, **overrides) -> torch.Tensor:
    """The latents of a call, images or videos, from the same noise at each run."""
    generators = [torch.Generator().manual_seed(generator.initial_seed()) for generator in call["generator"]]
    return pipe(**{**call, "generator": generators, **overrides}, return_dict=False)[0]
