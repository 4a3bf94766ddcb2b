"""What RALU really saves: seconds, peak memory and the share outside of the network, beside the planned FLOPs.

    python -m benchmarks.ralu --output runs/ralu_flux.json           # on a CPU a rehearsal of seconds, tiny networks
    python -m benchmarks.ralu --output runs/ralu_sd35.json --model sd35-large

FLUX.1-dev's and SD3.5-Large's shapes with random weights (`benchmarks.shapes`), 1024 x 1024, decoding included.
Medians of whole runs after a warm-up. Bars: the measured speed-up is at least 95 % of the ratio of FLOPs with
attention counted, and at least 7 for the 7x preset. The second stage runs picture by picture, since masks differ.
With TaylorSeer, FLOPs are those of the steps that are evaluated in full, and of the others all but attention layers,
which is what diffusers forecasts: less is saved than where whole blocks are forecast, as in the paper.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

from benchmarks.clock import NetworkClock, command_line, now, parse, print_row, write_report
from benchmarks.shapes import FAMILIES, build_pipeline
from solver.samplers.cost import KL_DECODER, Network, decoding_flops, network_of, run_flops
from solver.samplers.latents import latent_shape
from solver.samplers.ralu.noise import injected_noise, white_noise
from solver.samplers.ralu.plan import stage_tokens
from solver.samplers.ralu.rivals import plain
from solver.samplers.ralu.sampler import ralu
from solver.samplers.ralu.schedule import PRESETS, solve

MODELS = {"flux-dev": (3.5, ("4x", "5x", "7x")), "sd35-large": (4.5, ("2x", "3x"))}  # guidance, presets
TINY_SIDE = 128  # in pixels


def measured(run, clock: NetworkClock, repeats: int, device: torch.device) -> dict:
    """Median seconds in all and in the network, and peak memory, after a warm-up."""
    totals, networks = [], []
    run()
    now(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.seconds()
    for _ in range(repeats):
        start = now(device)
        run()
        totals.append(now(device) - start)
        networks.append(clock.seconds())
    total, network = statistics.median(totals), statistics.median(networks)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"seconds": total, "outside_percent": 100 * (1 - network / total), "peak_gib": peak}


TAYLOR = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3, max_order=1)


def contenders(given: argparse.Namespace, pipe, batch: int, side: int, cached: bool):
    """Pairs of a row (name, evaluations of one picture, edges decoded) and what is run."""
    guidance, presets = MODELS[given.model]
    call, prompts, seeds = {"guidance_scale": guidance}, ["x"] * batch, list(range(batch))
    tokens = (side // (2 * pipe.vae_scale_factor)) ** 2
    for steps in given.plain_steps:
        row = {"run": f"plain {steps}", "evaluations": [(tokens, steps)], "decoded": [side]}
        yield row, lambda steps=steps: plain(pipe, prompts, seeds, steps, side, side, call=call)
    for preset in presets:
        evaluations = list(zip(stage_tokens(PRESETS[preset], tokens), PRESETS[preset].steps, strict=True))
        row = {"run": f"RALU {preset}", "evaluations": evaluations, "decoded": [side // 2, side]}
        yield row, lambda preset=preset: ralu(pipe, prompts, seeds, preset, side, side, call=call)
        if cached:
            row = {**row, "run": f"RALU {preset} + TaylorSeer", "full_steps": full_steps(PRESETS[preset].steps)}
            yield row, lambda preset=preset: ralu(pipe, prompts, seeds, preset, side, side, call=call, cache=TAYLOR)


def full_steps(steps: tuple[int, int, int], cache: TaylorSeerCacheConfig = TAYLOR) -> list[int]:
    """How many steps of each stage TaylorSeer evaluates in full, as diffusers counts, and the first stage's last."""
    before, interval = cache.disable_cache_before_step, cache.cache_interval
    full = [[i < before or (i - before - 1) % interval == 0 for i in range(n)] for n in steps]
    full[0][-1] = True
    return [sum(stage) for stage in full]


def attention_layers_flops(transformer: FluxTransformer2DModel, tokens: int) -> float:
    """FLOPs of FLUX's attention layers on so many tokens of picture and text: projections and products.

    Those of single blocks have no projection back, the block has.
    """
    config = transformer.config
    d = config.num_attention_heads * config.attention_head_dim
    projections = 8 * config.num_layers + 6 * config.num_single_layers
    return projections * d**2 * tokens + 4 * d * (config.num_layers + config.num_single_layers) * tokens**2


def flops(row: dict, network: Network, branches: int, transformer) -> float:
    """TFLOPs of one picture, attention counted."""
    total = run_flops(network, row["evaluations"], branches=branches)
    for (tokens, steps), full in zip(row["evaluations"], row.get("full_steps", ()), strict=False):
        total -= branches * (steps - full) * attention_layers_flops(transformer, tokens + network.text_tokens)
    return (total + sum(decoding_flops(network, side, side) for side in row["decoded"])) / 1e12


@torch.no_grad()
def measure(given: argparse.Namespace) -> dict:
    family, pipe = FAMILIES[given.model], build_pipeline(given.model, given.tiny, given.device, given.dtype)
    side = TINY_SIDE if given.tiny else family.size[0]
    clock = NetworkClock(pipe.transformer, given.device)
    network = network_of(pipe.transformer, text_tokens=family.text[0])
    network = network if given.tiny else replace(network, decoding=KL_DECODER)
    cached, rows = isinstance(pipe.transformer, CacheMixin), []
    if not cached:
        print(f"{type(pipe.transformer).__name__} takes no feature cache in diffusers: no rows with TaylorSeer")
    for batch in given.batches:
        base = None
        for row, run in contenders(given, pipe, batch, side, cached):
            times = measured(run, clock, given.repeats, given.device)
            tflops = flops(row, network, family.rows, pipe.transformer)
            base = base or (times["seconds"], tflops)
            speed = {"speedup": base[0] / times["seconds"], "flop_ratio": base[1] / tflops}
            rows.append({"run": row["run"], "batch": batch, **times, "tflops": tflops, **speed})
            print_row(rows[-1])
    shape = latent_shape(pipe, side, side)
    return {"takes_feature_caches": cached, **setup_seconds(shape), "rows": rows}


def setup_seconds(shape: tuple[int, int, int]) -> dict[str, float]:
    """NT-matching of a schedule that is not cached yet and again, and all noise of a picture of this latent shape."""

    def match():
        return solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 3.14159)

    def noise():
        generators, schedule = [torch.Generator().manual_seed(0)], match()
        fine = torch.arange(shape[1] * shape[2] // 16).view(1, shape[1] // 4, shape[2] // 4) % 3 == 0
        white_noise(generators, shape)
        for copied, coarse in ((fine, ~fine), (~fine, torch.zeros_like(fine))):
            injected_noise(white_noise(generators, shape), copied, coarse, schedule.c, "pixel")

    seconds = {}
    parts = {"nt_matching_seconds": match, "nt_matching_cached_seconds": match, "noise_seconds": noise}
    for name, part in parts.items():
        start = time.perf_counter()
        part()
        seconds[name] = time.perf_counter() - start
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="flux-dev", choices=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--plain_steps", type=int, nargs="+", default=[50, 28], help="the first is what is compared with"
    )
    given = parse(parser, arguments)
    write_report(given, measure(given))


if __name__ == "__main__":
    main()
