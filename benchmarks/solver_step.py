"""What the solver, the rollouts and the dataset builder cost beside the network evaluations that they are made of.

    python benchmarks/solver_step.py --output runs/solver_step.json                            # CPU: tiny networks
    python benchmarks/solver_step.py --output runs/solver_step.json --device cuda              # GPU: published shapes
    python benchmarks/solver_step.py --output runs/solver_step.json --device cuda --families sd15 flux-dev

Pipelines with denoisers and autoencoders of the published shapes, or tiny ones, with random weights, built on the
device. There are no text encoders; prompts are given random embeddings of the usual length. One row a family:

* `evaluation_ms`: the denoiser on a batch, guidance included where it doubles the rows;
* `step_ms`, `step_percent`: the learned solver of order 4, one table for all rows; of an evaluation (bar: below 1 %);
* `rollouts_per_s`: groups of one prompt and seed under tables of their own, decoded, as the trainer renders them;
* `images_per_s`, `builder_percent`: the dataset builder, decoding and shards included, and what the bare evaluations
  would take of its time (bar: 95 % at the teacher's number of steps).

Medians after a warm-up. FLUX.1 dev needs 30 GB of memory, Stable Diffusion 3.5 Large 22 GB.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from data.shards import shard_paths, write_shard
from data.teacher import Row, Teacher
from solver import ConsistencySolverScheduler
from solver.rollout import Renderer, replaced
from solver.samplers.latents import denoiser

# ----------------------------------------------------------------------------------------------- pipelines by shape


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


# Family -> pipeline, pixels of the published size, rows that the denoiser sees of an image, (words, width) of the
# text, width of the pooled text.
FAMILIES = {
    "sd15": (sd15, 512, 2, (77, 768), None),
    "sdxl": (sdxl, 1024, 2, (77, 2048), 1280),
    "sd35-large": (sd35_large, 1024, 2, (333, 4096), 2048),
    "flux-dev": (flux_dev, 1024, 1, (512, 4096), 768),
}


def build_pipeline(family: str, tiny: bool, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline of a family on the device; its `encode_prompt` answers random embeddings."""
    build, _, rows, text, pooled_width = FAMILIES[family]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipe = build(tiny)
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # on the CPU, as it is when loaded
    denoiser(pipe).to(device, dtype)
    for part in (pipe.vae, denoiser(pipe)):
        part.eval().requires_grad_(False)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    words = torch.randn(1, *text, device=device, dtype=dtype)
    pooled = None if pooled_width is None else torch.randn(1, pooled_width, device=device, dtype=dtype)

    given_embeddings = pipe.encode_prompt

    def encode_prompt(prompt, *args, **kwargs):
        if prompt is None:
            return given_embeddings(prompt, *args, **kwargs)
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        embeds = words.expand(prompts, -1, -1)
        if pooled is None:
            return embeds, embeds
        pools = pooled.expand(prompts, -1)
        if rows == 1:
            return embeds, pools, torch.zeros(text[0], 3, device=device, dtype=dtype)
        return embeds, embeds, pools, pools

    pipe.encode_prompt = encode_prompt
    return pipe


# ------------------------------------------------------------------------------------------------------------ clocks


def median_s(
    run: Callable[[], object], repeats: int, device: torch.device, prepare: Callable[[], object] = lambda: None
) -> float:
    """Median wall time of `run` in seconds, the device queue emptied before and after; `prepare` is untimed."""
    times = []
    for _ in range(repeats + 1):  # the first is the warm-up
        prepare()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Question(Exception):
    """Ends a pipeline's call; carries what the denoiser was asked."""


def evaluation_s(pipe: DiffusionPipeline, call: dict, repeats: int) -> float:
    """Seconds of one evaluation of the denoiser as the pipeline's call asks for it."""
    network = denoiser(pipe)

    def stop(module, args, kwargs):
        raise _Question(args, kwargs)

    handle = network.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(**call)
    except _Question as question:
        args, kwargs = question.args
    finally:
        handle.remove()
    return median_s(lambda: network(*args, **kwargs), repeats, pipe.device)


def step_s(scheduler: ConsistencySolverScheduler, sample: torch.Tensor, steps: int, repeats: int, **grid) -> float:
    """Seconds of a step of the solver: those of whole runs, divided by their steps."""
    output = torch.randn_like(sample)

    def run():
        for t in scheduler.timesteps:
            scheduler.step(output, t, sample, return_dict=False)

    def prepare():
        scheduler.set_timesteps(steps, device=sample.device, **grid)
        scheduler.set_begin_index(0)

    return median_s(run, repeats, sample.device, prepare) / steps


# ---------------------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def measure(family: str, given: argparse.Namespace) -> dict:
    """A row of the table."""
    device, dtype, tiny = torch.device(given.device), getattr(torch, given.dtype), given.shapes == "tiny"
    pipe = build_pipeline(family, tiny, device, dtype)
    size = 64 if tiny else FAMILIES[family][1]
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=4)
    renderer = Renderer(pipe, solver, size, size, batch_size=given.group)
    grid = renderer.grid(given.steps, "x")

    # The builder, against its evaluations alone
    teacher = Teacher(pipe, (), given.teacher_steps, size, size)
    rows = [Row("x", seed, 3.5) for seed in range(given.batch)]
    call = {"prompt": ["x"] * given.batch, "guidance_scale": 3.5, "height": size, "width": size}
    evaluation = evaluation_s(pipe, {**call, "num_inference_steps": 2}, given.repeats)
    with tempfile.TemporaryDirectory() as folder:
        (shard,) = shard_paths(Path(folder), len(rows), len(rows))
        builder = median_s(lambda: write_shard(shard, teacher.render(rows), [], []), given.repeats, device)

    # The solver and the rollouts
    latents = torch.randn(given.batch, *renderer.latent_shape, device=device, dtype=dtype)
    with replaced(pipe, "scheduler", solver):
        step = step_s(solver, latents, given.steps, 10 * given.repeats, **grid)
    actions = 0.1 * torch.randn(given.group, given.steps, solver.num_actions)
    table = solver.table_from_actions(actions, given.steps, **grid)
    rollouts = median_s(
        lambda: renderer.render(["x"] * given.group, [0] * given.group, 3.5, table), given.repeats, device
    )
    return {
        "family": family,
        "parameters_B": sum(p.numel() for p in denoiser(pipe).parameters()) / 1e9,
        "pixels": size,
        "evaluation_ms": 1000 * evaluation,
        "step_ms": 1000 * step,
        "step_percent": 100 * step / evaluation,
        "rollouts_per_s": given.group / rollouts,
        "images_per_s": given.batch / builder,
        "builder_percent": 100 * given.teacher_steps * evaluation / builder,
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the denoiser; float32 on a CPU")
    parser.add_argument("--shapes", choices=["tiny", "published"], help="tiny on a CPU")
    parser.add_argument("--batch", type=int, default=4, help="images of an evaluation and of the builder's batch")
    parser.add_argument("--group", type=int, default=8, help="rollouts of one prompt and seed")
    parser.add_argument("--steps", type=int, default=5, help="of the solver and the rollouts")
    parser.add_argument("--teacher_steps", type=int, default=40, help="of the builder")
    parser.add_argument("--repeats", type=int, default=3, help="of everything; of the solver ten times as many")
    given = parser.parse_args(args)
    on_cpu = given.device == "cpu"
    given.dtype = given.dtype or ("float32" if on_cpu else "bfloat16")
    given.shapes = given.shapes or ("tiny" if on_cpu else "published")
    rows = []
    for family in given.families:
        rows.append(measure(family, given))
        if not on_cpu:
            torch.cuda.empty_cache()
        print(
            " | ".join(
                f"{name}: {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in rows[-1].items()
            )
        )
    hardware = platform.processor() or "cpu" if on_cpu else torch.cuda.get_device_name(given.device)
    settings = {name: value for name, value in vars(given).items() if name not in ("output", "families")}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    facts = {"hardware": hardware, "threads": torch.get_num_threads(), **settings, **versions}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
