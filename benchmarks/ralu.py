"""What RALU really saves: seconds, peak memory and the share outside of the network, beside the planned FLOPs.

    python benchmarks/ralu.py --output runs/ralu_flux.json --device cuda --dtype bfloat16
    python benchmarks/ralu.py --output runs/ralu_sd35.json --device cuda --dtype bfloat16 --model sd3.5-large
    python benchmarks/ralu.py --output runs/ralu_tiny.json --model tiny         # a rehearsal of seconds on a CPU

FLUX.1-dev's and SD3.5-Large's shapes with random weights, 1024 x 1024, prompts given as embeddings, decoding included.
Medians of whole runs after a warm-up. Bars: the measured speed-up is at least 95 % of the ratio of FLOPs with
attention counted, and at least 7 for the 7x preset. The second stage runs picture by picture, since masks differ.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    TaylorSeerCacheConfig,
)

from solver.samplers.cost import KL_DECODER, Network, decoding_flops, network_of, run_flops
from solver.samplers.ralu.plan import stage_tokens
from solver.samplers.ralu.rivals import plain
from solver.samplers.ralu.sampler import ralu
from solver.samplers.ralu.schedule import PRESETS, solve

# name -> transformer, its config, side in pixels, guidance, words, presets
SHAPES = {
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}, 1024, 3.5, 512, ("4x", "5x", "7x")),
    "sd3.5-large": (
        SD3Transformer2DModel,
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
        | {"sample_size": 128, "pos_embed_max_size": 192},
        1024,
        4.5,
        333,
        ("2x", "3x"),
    ),
    "tiny": (
        FluxTransformer2DModel,
        {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        | {
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
        },
        128,
        3.5,
        16,
        ("4x", "7x"),
    ),
}


def build(name: str, device: torch.device, dtype: torch.dtype):
    """A pipeline of a published shape with random weights and no text encoders."""
    transformer_class, config, side, _, _, _ = SHAPES[name]
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        transformer = transformer_class(**config).eval()
        channels = (8, 8, 16, 16) if name == "tiny" else (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=channels,
            norm_num_groups=min(channels[0], 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            sample_size=side,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval()
        torch.set_default_dtype(before)
    pipeline_class = FluxPipeline if transformer_class is FluxTransformer2DModel else StableDiffusion3Pipeline
    count = 2 if pipeline_class is FluxPipeline else 3
    texts = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")[:count])
    dynamic = {"use_dynamic_shifting": True} if pipeline_class is FluxPipeline else {}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, **dynamic)
    pipe = pipeline_class(transformer=transformer, vae=vae, scheduler=scheduler, **texts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_call(name: str, pipe, batch: int) -> dict:
    """Random embeddings, in pairs where the guidance wants both."""
    _, _, _, guidance, words, _ = SHAPES[name]
    config, given = pipe.transformer.config, {"device": pipe.device, "dtype": pipe.transformer.dtype}
    signs = ("",) if isinstance(pipe, FluxPipeline) else ("", "negative_")
    embeds = {f"{s}prompt_embeds": torch.randn(batch, words, config.joint_attention_dim, **given) for s in signs}
    pooled = {f"{s}pooled_prompt_embeds": torch.randn(batch, config.pooled_projection_dim, **given) for s in signs}
    return {**embeds, **pooled, "guidance_scale": guidance}


class NetworkClock:
    """Seconds inside a module's forward, by events on a GPU, so that nothing waits."""

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []
        module.register_forward_pre_hook(lambda *_: self.marks.append(self._now()))
        module.register_forward_hook(lambda *_: self.marks.append(self._now()))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Since the last question; the device has to be idle."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks.clear()
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs)


def measured(run, clock: NetworkClock, repeats: int, device: torch.device) -> dict:
    """Median seconds in all and in the network, and peak memory, after a warm-up."""
    cuda, totals, networks = device.type == "cuda", [], []
    run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock.seconds()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        totals.append(time.perf_counter() - start)
        networks.append(clock.seconds())
    total, network = statistics.median(totals), statistics.median(networks)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"seconds": total, "outside_percent": 100 * (1 - network / total), "peak_gib": peak}


def contenders(name: str, pipe, batch: int, plain_steps: list[int], cached: bool):
    """Pairs of a row (name, evaluations of one picture, edges decoded) and what is run."""
    side, presets = SHAPES[name][2], SHAPES[name][5]
    call, seeds = make_call(name, pipe, batch), list(range(batch))
    tokens = (side // (2 * pipe.vae_scale_factor)) ** 2
    for steps in plain_steps:
        row = {"run": f"plain {steps}", "evaluations": [(tokens, steps)], "decoded": [side]}
        yield row, lambda steps=steps: plain(pipe, None, seeds, steps, side, side, call=call)
    taylor = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3, max_order=1)
    for preset in presets:
        evaluations = list(zip(stage_tokens(PRESETS[preset], tokens), PRESETS[preset].steps, strict=True))
        row = {"run": f"RALU {preset}", "evaluations": evaluations, "decoded": [side // 2, side]}
        yield row, lambda preset=preset: ralu(pipe, None, seeds, preset, side, side, call=call)
        if cached:
            row = {"run": f"RALU {preset} + TaylorSeer", "evaluations": None, "decoded": None}
            yield row, lambda preset=preset: ralu(pipe, None, seeds, preset, side, side, call=call, cache=taylor)


def flops(row: dict, network: Network, branches: int) -> float | None:
    """TFLOPs of one picture, attention counted; of caches they are not known here."""
    if row["evaluations"] is None:
        return None
    decoded = sum(decoding_flops(network, side, side) for side in row["decoded"])
    return (run_flops(network, row["evaluations"], branches=branches) + decoded) / 1e12


def measure(name: str, device: torch.device, dtype: torch.dtype, args) -> list[dict]:
    pipe = build(name, device, dtype)
    clock = NetworkClock(pipe.transformer, device)
    network = network_of(pipe.transformer, text_tokens=SHAPES[name][4])
    network = network if name == "tiny" else replace(network, decoding=KL_DECODER)
    branches, rows = 1 if isinstance(pipe, FluxPipeline) else 2, []
    for batch in args.batches:
        base = None
        cached = hasattr(pipe.transformer, "enable_cache")
        for row, run in contenders(name, pipe, batch, args.plain_steps, cached):
            times = measured(run, clock, args.repeats, device)
            tflops = flops(row, network, branches)
            base = base or (times["seconds"], tflops)
            speed = {"speedup": base[0] / times["seconds"], "flop_ratio": tflops and base[1] / tflops}
            rows.append({"run": row["run"], "batch": batch, **times, "tflops": tflops, **speed})
            print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    return rows


def setup_seconds() -> float:
    """NT-matching of a schedule that is not cached yet."""
    start = time.perf_counter()
    solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 3.14159)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", default="flux", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--plain_steps", type=int, nargs="+", default=[50, 28], help="the first is what is compared with"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    print("run | batch | seconds | outside % | peak GiB | TFLOPs | speed-up | FLOP ratio")
    rows = measure(args.model, device, getattr(torch, args.dtype), args)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    settings = {"hardware": hardware, "model": args.model, "dtype": args.dtype, "repeats": args.repeats}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {**settings, **versions, "nt_matching_seconds": setup_seconds(), "rows": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
