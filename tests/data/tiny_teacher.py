"""Tiny random pipelines of the real classes, and the command line of a build that takes a second."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from data.scenes import vocabulary


def make_tokenizer(length=32):
    words = ["<start>", "<end>", "<unknown>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    special = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unknown>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def make_text_encoder(tokenizer, width=16):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, hidden_size=width,
        intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config)


def make_vae(**kwargs):
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, **kwargs,
    )  # fmt: skip


def make_tiny_sd(seed=0):
    """16 x 16 pixels, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = (make_vae(), make_text_encoder(tokenizer), tokenizer, unet, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def make_tiny_sdxl(seed=0):
    """An SDXL pipeline without text encoders, its VAE with a mean and deviation; latents 4 x H/2 x W/2."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    vae = make_vae(latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    return StableDiffusionXLPipeline(vae, None, None, None, None, unet, DDIMScheduler(steps_offset=1))


def make_tiny_sd3(seed=0):
    """A StableDiffusion3Pipeline without text encoders; latents 4 x H/2 x W/2."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
    )  # fmt: skip
    vae = make_vae(shift_factor=0.1)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, *(None,) * 6)


def make_tiny_flux(seed=0):
    """A FluxPipeline without text encoders; latents 4 x H/2 x W/2, packed to tokens of 16."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    vae = make_vae(shift_factor=0.1)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)


def save_dino(folder):
    """A tiny random DINOv2 for the dino reward: features of 32 numbers."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)


def save_models(folder):
    """Writes `sd` and `dino` under a folder."""
    make_tiny_sd().save_pretrained(folder / "sd")
    save_dino(folder / "dino")
    return folder


def build_args(models, output_dir, **changes):
    """Command line of a build of 18 rows in 4 shards, two guidance scales, two rewards; None leaves a knob out."""
    knobs = {
        "model": models / "sd", "output_dir": output_dir, "num_prompts": 9, "seeds_per_prompt": 2,
        "guidance_scale": [3.0, 7.5], "num_inference_steps": 3, "batch_size": 2, "shard_size": 5,
        "rewards": ["pixels", "dino"], "reward_models": ["null", models / "dino"],
    }  # fmt: skip
    args = []
    for name, value in (knobs | changes).items():
        if value is not None:
            args += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return args
