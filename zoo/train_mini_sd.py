"""Trains the denoiser of zoo/mini-sd and assembles the pipeline: UNet2DConditionModel, ε-prediction, 64 x 64 px.

    accelerate launch zoo/train_mini_sd.py                                     # 2 CPU cores: 60 minutes
    accelerate launch zoo/train_mini_sd.py --steps 60000 --batch_size 512 --pool 400000      # GPU

Needs the results of `zoo/train_clip.py` (text encoder) and `zoo/train_mini_sd_vae.py`. The latents of a pool of
training scenes are computed once; every step draws new captions for its scenes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer
from trl import TrlParser

from data.scenes import Scene
from zoo.training import RUNS, ZOO, Run, captions, fit, parameter_count, pictures, write_log

NOISE_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class MiniSdRun(Run):
    name: str = "mini-sd"
    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 8e-4
    ema_decay: float = 0.9985
    pool: int = 50_000
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0


def build_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=32,
        norm_num_groups=16,
    )


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
        with torch.autocast(vae.device.type, torch.bfloat16):
            chunks.append(vae.encode(pictures(scenes, 64, vae.device)).latent_dist.mode().half().cpu())
    latents = torch.cat(chunks) * vae.config.scaling_factor
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path)
    return latents


def pool_batches(latents: torch.Tensor, run: MiniSdRun, first_step: int) -> Iterator[tuple[list[Scene], torch.Tensor]]:
    """Scenes and their latents, every scene once an epoch; batch number n is a function of n."""
    epoch_steps = len(latents) // run.batch_size
    for step in range(first_step, run.steps):
        epoch, at = divmod(step, epoch_steps)
        if at == 0 or step == first_step:
            order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(epoch))
        rows = order[at * run.batch_size : (at + 1) * run.batch_size]
        yield [Scene.random(i) for i in rows.tolist()], latents[rows]


def main() -> None:
    (run,) = TrlParser((MiniSdRun,)).parse_args_and_config()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = AutoencoderKL.from_pretrained(RUNS / "mini-sd-vae" / "vae").to(device, memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(ZOO / "clip")
    text_encoder = CLIPTextModel.from_pretrained(ZOO / "clip", dtype=torch.float32).to(device).eval()
    schedule = DDPMScheduler(num_train_timesteps=1000, **NOISE_SCHEDULE)
    latents = latent_pool(vae, RUNS / run.name, run.pool)
    unet = build_unet(text_encoder.config.hidden_size).to(memory_format=torch.channels_last)

    def loss(unet: nn.Module, step: int, batch: tuple[list[Scene], torch.Tensor]) -> dict[str, torch.Tensor]:
        scenes, x0 = batch[0], batch[1].to(device).float()
        draw = torch.Generator().manual_seed(step)
        kept = torch.rand(len(scenes), generator=draw) >= run.caption_dropout
        words = [text if keep else "" for text, keep in zip(captions(scenes, step), kept, strict=True)]
        with torch.no_grad():
            tokens = tokenizer(words, padding="max_length", return_tensors="pt").to(device)
            context = text_encoder(**tokens).last_hidden_state
        strata = (torch.randperm(len(scenes), generator=draw) + torch.rand(len(scenes), generator=draw)) / len(scenes)
        t = (strata * schedule.config.num_train_timesteps).long().to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        predicted = unet(schedule.add_noise(x0, noise, t), t, context, return_dict=False)[0].float()
        error_B = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        snr_B = compute_snr(schedule, t)
        return {"loss": (error_B * (run.snr_gamma / snr_B).clamp(max=1)).mean(), "mse": error_B.mean()}

    unet, log = fit(unet, run, loss, lambda first, device: pool_batches(latents, run, first))
    assemble(unet.to("cpu", memory_format=torch.contiguous_format), vae.cpu(), text_encoder.cpu(), tokenizer)
    write_log(ZOO / "mini-sd", log, parameters=parameter_count(unet))


def assemble(unet, vae, text_encoder, tokenizer) -> None:
    """Writes zoo/mini-sd, in bf16."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **NOISE_SCHEDULE)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.to(torch.bfloat16).save_pretrained(ZOO / "mini-sd")


if __name__ == "__main__":
    main()
