"""What RALU really saves: seconds, peak memory and the share outside of the network, beside the planned FLOPs.

    python -m benchmarks.ralu --output runs/ralu_flux.json           # on a CPU a rehearsal of seconds, tiny networks
    python -m benchmarks.ralu --output runs/ralu_sd35.json --model sd35-large

FLUX.1-dev's and SD3.5-Large's shapes with random weights (`benchmarks.shapes`), 1024 x 1024, decoding included.
Medians of whole runs after a warm-up. Bars: the measured speed-up is at least 95 % of the ratio of FLOPs with
attention counted, and at least 7 for the 7x preset. The second stage runs picture by picture, since masks differ.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from diffusers import TaylorSeerCacheConfig

from benchmarks.clock import NetworkClock, command_line, now, parse, print_row, write_report
from benchmarks.shapes import FAMILIES, build_pipeline
from solver.samplers.cost import KL_DECODER, Network, decoding_flops, network_of, run_flops
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


def contenders(given: argparse.Namespace, pipe, batch: int, side: int, cached: bool):
    """Pairs of a row (name, evaluations of one picture, edges decoded) and what is run."""
    guidance, presets = MODELS[given.model]
    call, prompts, seeds = {"guidance_scale": guidance}, ["x"] * batch, list(range(batch))
    tokens = (side // (2 * pipe.vae_scale_factor)) ** 2
    for steps in given.plain_steps:
        row = {"run": f"plain {steps}", "evaluations": [(tokens, steps)], "decoded": [side]}
        yield row, lambda steps=steps: plain(pipe, prompts, seeds, steps, side, side, call=call)
    taylor = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3, max_order=1)
    for preset in presets:
        evaluations = list(zip(stage_tokens(PRESETS[preset], tokens), PRESETS[preset].steps, strict=True))
        row = {"run": f"RALU {preset}", "evaluations": evaluations, "decoded": [side // 2, side]}
        yield row, lambda preset=preset: ralu(pipe, prompts, seeds, preset, side, side, call=call)
        if cached:
            row = {"run": f"RALU {preset} + TaylorSeer", "evaluations": None, "decoded": None}
            yield row, lambda preset=preset: ralu(pipe, prompts, seeds, preset, side, side, call=call, cache=taylor)


def flops(row: dict, network: Network, branches: int) -> float | None:
    """TFLOPs of one picture, attention counted; of caches they are not known here."""
    if row["evaluations"] is None:
        return None
    decoded = sum(decoding_flops(network, side, side) for side in row["decoded"])
    return (run_flops(network, row["evaluations"], branches=branches) + decoded) / 1e12


@torch.no_grad()
def measure(given: argparse.Namespace) -> list[dict]:
    family, pipe = FAMILIES[given.model], build_pipeline(given.model, given.tiny, given.device, given.dtype)
    side = TINY_SIDE if given.tiny else family.size[0]
    clock = NetworkClock(pipe.transformer, given.device)
    network = network_of(pipe.transformer, text_tokens=family.text[0])
    network = network if given.tiny else replace(network, decoding=KL_DECODER)
    cached, rows = hasattr(pipe.transformer, "enable_cache"), []
    for batch in given.batches:
        base = None
        for row, run in contenders(given, pipe, batch, side, cached):
            times = measured(run, clock, given.repeats, given.device)
            tflops = flops(row, network, family.rows)
            base = base or (times["seconds"], tflops)
            speed = {"speedup": base[0] / times["seconds"], "flop_ratio": tflops and base[1] / tflops}
            rows.append({"run": row["run"], "batch": batch, **times, "tflops": tflops, **speed})
            print_row(rows[-1])
    return rows


def setup_seconds() -> float:
    """NT-matching of a schedule that is not cached yet."""
    start = time.perf_counter()
    solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 3.14159)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="flux-dev", choices=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--plain_steps", type=int, nargs="+", default=[50, 28], help="the first is what is compared with"
    )
    given = parse(parser, arguments)
    rows = measure(given)
    write_report(given, {"nt_matching_seconds": setup_seconds(), "rows": rows})


if __name__ == "__main__":
    main()
