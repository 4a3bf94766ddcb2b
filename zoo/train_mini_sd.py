"""Trains the denoiser of zoo/mini-sd and assembles the pipeline: UNet2DConditionModel, ε-prediction, 64 x 64 px.

    accelerate launch zoo/train_mini_sd.py                                     # 2 CPU cores: 60 minutes
    accelerate launch zoo/train_mini_sd.py --steps 60000 --batch_size 512 --pool 400000      # GPU
    accelerate launch zoo/train_mini_sd.py --start zoo/mini-sd --name mini-sd-2             # goes on from it

Needs the results of `zoo/train_mini_sd_vae.py` and `zoo/train_clip.py`, whose text tower is the text encoder to start
from; it is trained further with the UNet. The latents of a pool of training scenes are computed once; every step draws
new captions for its scenes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer
from trl import TrlParser

from data.scenes import Scene
from zoo.training import (
    BF16,
    FUSED_ATTENTION,
    RUNS,
    ZOO,
    Run,
    captions,
    drawn,
    fit,
    parameter_count,
    pictures,
    save_pipeline,
    seed_of,
    write_log,
)

NOISE_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class MiniSdRun(Run):
    name: str = "mini-sd"
    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 8e-4
    ema_decay: float = 0.9985
    pool: int = 40_000
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0


class Denoiser(nn.Module):
    """The two networks that are trained: ε from a noisy latent, a time and a caption."""

    def __init__(self, text_encoder: CLIPTextModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(96, 128, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=text_encoder.config.hidden_size,
            attention_head_dim=32,
            norm_num_groups=16,
        )
        self.unet.set_attn_processor(AttnProcessor2_0() if FUSED_ATTENTION else AttnProcessor())

    def forward(self, x_BCHW: torch.Tensor, t_B: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        context_BLD = self.text_encoder(tokens_BL).last_hidden_state
        return self.unet(x_BCHW, t_B, context_BLD, return_dict=False)[0].float()


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, folder: Path, count: int) -> torch.Tensor:
    """Scaled latents fp16 (count, 4, 16, 16) of the first training scenes; kept in the run's folder."""
    path = folder / "latents.safetensors"
    if path.exists() and len(latents := load_file(path)["latents"]) == count:
        return latents
    size = 250
    chunks = []
    for first in tqdm(range(0, count, size), desc="latents", mininterval=10):
        scenes = [Scene.random(i) for i in range(first, min(first + size, count))]
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=BF16):
            chunks.append(vae.encode(pictures(scenes, 64, vae.device)).latent_dist.mode().half().cpu())
    latents = (torch.cat(chunks) * vae.config.scaling_factor).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path)
    return latents


def pool_batches(latents: torch.Tensor, run: MiniSdRun, first_step: int) -> Iterator[tuple[list[Scene], torch.Tensor]]:
    """Scenes and their latents, every scene once an epoch; batch number n is a function of n."""
    epoch_steps = len(latents) // run.batch_size
    for step in range(first_step, run.steps):
        epoch, at = divmod(step, epoch_steps)
        if at == 0 or step == first_step:
            order = torch.randperm(len(latents), generator=drawn(run, "epoch", epoch))
        rows = order[at * run.batch_size : (at + 1) * run.batch_size]
        yield [Scene.random(i) for i in rows.tolist()], latents[rows]


def main() -> None:
    (run,) = TrlParser((MiniSdRun,)).parse_args_and_config()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = Path(run.start) if run.start else None
    vae = AutoencoderKL.from_pretrained(start / "vae" if start else RUNS / "mini-sd-vae" / "vae", dtype=torch.float32)
    vae.to(device)
    tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer" if start else ZOO / "clip")
    text_encoder = CLIPTextModel.from_pretrained(
        start / "text_encoder" if start else ZOO / "clip",
        dtype=torch.float32,
        attn_implementation="sdpa" if FUSED_ATTENTION else "eager",
    )
    schedule = DDPMScheduler(num_train_timesteps=1000, **NOISE_SCHEDULE)
    latents = latent_pool(vae, RUNS / run.name, run.pool)
    denoiser = Denoiser(text_encoder)
    if start:
        unet = UNet2DConditionModel.from_pretrained(start / "unet", dtype=torch.float32)
        denoiser.unet.load_state_dict(unet.state_dict())
    denoiser.to(memory_format=torch.channels_last)

    def loss(denoiser: nn.Module, step: int, batch: tuple[list[Scene], torch.Tensor]) -> dict[str, torch.Tensor]:
        scenes, x0 = batch[0], batch[1].to(device).float()
        draw = drawn(run, "step", step)
        kept = torch.rand(len(scenes), generator=draw) >= run.caption_dropout
        said = captions(scenes, seed_of(run, "captions", step))
        words = [text if keep else "" for text, keep in zip(said, kept, strict=True)]
        tokens = tokenizer(words, padding="max_length", return_tensors="pt").input_ids.to(device)
        strata = (torch.randperm(len(scenes), generator=draw) + torch.rand(len(scenes), generator=draw)) / len(scenes)
        t = (strata * schedule.config.num_train_timesteps).long().to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        predicted = denoiser(schedule.add_noise(x0, noise, t), t, tokens)
        error_B = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        snr_B = compute_snr(schedule, t)
        return {"loss": (error_B * (run.snr_gamma / snr_B).clamp(max=1)).mean(), "mse": error_B.mean()}

    denoiser, log = fit(denoiser, run, loss, lambda first, device: pool_batches(latents, run, first))
    denoiser.to("cpu", memory_format=torch.contiguous_format)
    assemble(denoiser.unet, vae.cpu(), denoiser.text_encoder, tokenizer)
    write_log(ZOO / "mini-sd", run, log, parameters=f"{parameter_count(denoiser.unet)} UNet")


def assemble(unet, vae, text_encoder, tokenizer) -> None:
    """Writes zoo/mini-sd, in bf16."""
    unet.set_attn_processor(AttnProcessor2_0())
    text_encoder.config._attn_implementation = "sdpa"
    vae.register_to_config(_name_or_path="")
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **NOISE_SCHEDULE)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    save_pipeline(pipeline, ZOO / "mini-sd")


if __name__ == "__main__":
    main()
