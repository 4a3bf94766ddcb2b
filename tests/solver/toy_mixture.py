"""A stock pipeline around a closed-form denoiser: the training problem without a network.

Every latent "pixel" is a point in the plane, drawn from a mixture of Gaussians whose weights the prompt gives. Its ε
is exact, a step costs microseconds, and the reward is -10 log10 of the latent MSE to the endpoint of 1000 DDIM steps.
"""

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config

from data.noise import initial_noise
from solver.scheduling_consistency_solver import _interpolate

SIZE = 8
MODES = 6


class MixtureUNet(ModelMixin, ConfigMixin):
    """ε(x, t) = σ Σ_m r_m (x - α μ_m) / (α² τ² + σ²), r the responsibilities of the modes."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: int = SIZE, time_cond_proj_dim: int | None = None):
        super().__init__()
        angles = torch.arange(MODES) * 2 * torch.pi / MODES
        radii = torch.tensor([1.5, 1.0]).repeat(MODES // 2)
        self.means = torch.nn.Parameter(torch.stack([radii * angles.cos(), radii * angles.sin()], dim=-1))
        self.variance = 0.01
        self.evaluations = 0
        alphas_cumprod = noise_schedule().alphas_cumprod.double()
        self.log_s = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **kwargs):
        self.evaluations += len(sample)
        timestep = torch.as_tensor(timestep).double().expand(len(sample))
        s = _interpolate(self.log_s, timestep).exp().float()
        alpha = torch.rsqrt(1 + s**2).reshape(-1, 1, 1, 1, 1)
        sigma = s.reshape(alpha.shape) * alpha
        away_BMCHW = sample[:, None] - alpha * self.means[None, :, :, None, None]
        variance = (alpha**2 * self.variance + sigma**2)[:, 0]
        logits_BMHW = encoder_hidden_states[:, 0, :, None, None] - away_BMCHW.square().sum(2) / (2 * variance)
        return (sigma[:, 0] * (logits_BMHW.softmax(1)[:, :, None] * away_BMCHW).sum(1) / variance,)


class ToyPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline`, its text encoder replaced by arithmetic: prompt "i" prefers two of the modes."""

    def encode_prompt(self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs):
        if prompt is None:
            return kwargs["prompt_embeds"], kwargs["negative_prompt_embeds"]
        logits = torch.zeros(len(prompt), 1, MODES)
        for row, words in zip(logits, prompt, strict=True):
            row[0, [int(words or 0) % MODES, (int(words or 0) * 5 + 2) % MODES]] = 1.5
        return logits, torch.zeros_like(logits)


def noise_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def toy_pipeline() -> ToyPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            latent_channels=2,
            block_out_channels=(4,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=2,
            layers_per_block=1,
            mid_block_add_attention=False,
            sample_size=SIZE,
        )
    parts = (vae, None, None, MixtureUNet(), noise_schedule(), None, None)
    pipe = ToyPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toy_dataset(rows: int, guidance_scales=(1.0,), first_seed: int = 0, steps: int = 1000) -> list[dict]:
    """Rows with the endpoints of many DDIM steps; guidance scales take turns."""
    pipe = toy_pipeline()
    dataset: list[dict | None] = [None] * rows
    for g, guidance_scale in enumerate(guidance_scales):
        mine = range(g, rows, len(guidance_scales))
        prompts, seeds = [str(i) for i in mine], [first_seed + i for i in mine]
        embeds, negative_embeds = pipe.encode_prompt(prompts, None, 1, True)
        latents_BCHW = pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            latents=initial_noise(seeds, (2, SIZE, SIZE)),
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            output_type="latent",
        ).images
        for i, prompt, seed, latents in zip(mine, prompts, seeds, latents_BCHW, strict=True):
            target = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
            row = {"prompt": prompt, "seed": seed, "guidance_scale": float(guidance_scale), "target": target}
            dataset[i] = {**row, "target_latents": latents, "features": {}}
    return dataset


def latent_psnr(latents, target_latents, **kwargs):
    """-10 log10 of the latent mean square error, (B,)."""
    return -10 * (latents - target_latents).square().flatten(1).mean(1).log10()
