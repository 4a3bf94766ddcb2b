"""What a step of the learned solver costs beside the network evaluation that it follows.

    python benchmarks/solver_step.py --output runs/solver_step.json
    python benchmarks/solver_step.py --output runs/solver_step.json --device cuda --dtype float16

A UNet of Stable Diffusion 1.5's size with random weights (860 M parameters) on latents of 512 x 512 images. The bar: a
step takes less than 1 % of an evaluation. `set_timesteps` is paid once a run. Medians after a warm-up.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from solver import ConsistencySolverScheduler

STEPS = 8


def median_ms(
    run: Callable[[], object], repeats: int, device: torch.device, prepare: Callable[[], object] = lambda: None
) -> float:
    """Median wall time of `run` in milliseconds, the device queue emptied before and after; `prepare` is untimed."""
    times = []
    for _ in range(repeats + 1):  # the first is the warm-up
        prepare()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def solver_step_ms(scheduler, latents: torch.Tensor, repeats: int) -> float:
    """Median time of a step: that of whole runs, divided by their steps."""
    output = torch.randn_like(latents)

    def run():
        for t in scheduler.timesteps:
            scheduler.step(output, t, latents, return_dict=False)

    def prepare():
        scheduler.set_timesteps(STEPS, device=latents.device)
        scheduler.set_begin_index(0)

    return median_ms(run, repeats, latents.device, prepare) / STEPS


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict]:
    unet = UNet2DConditionModel(cross_attention_dim=768).to(device).to(dtype).eval()
    latents = torch.randn(1, 4, 64, 64, device=device, dtype=dtype)
    text = torch.randn(1, 77, 768, device=device, dtype=dtype)
    unet_ms = median_ms(lambda: unet(latents, 500, text).sample, max(1, repeats // 10), device)

    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler = ConsistencySolverScheduler.from_scheduler(stock, order=4)
    prepare_ms = median_ms(lambda: scheduler.set_timesteps(STEPS, device=device), repeats, device)
    table = scheduler.table_from_actions(torch.zeros(1, STEPS, scheduler.num_actions), STEPS)
    rows = []
    for name, pinned in (("one for all", None), ("one a sample", table)):
        scheduler.set_table(pinned)
        scheduler.set_timesteps(STEPS, device=device)
        step_ms = solver_step_ms(scheduler, latents, repeats)
        times = {"unet_ms": unet_ms, "step_ms": step_ms, "step_percent": 100 * step_ms / unet_ms}
        rows.append({"table": name, **times, "set_timesteps_ms": prepare_ms})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20, help="of the solver; the UNet gets a tenth of them")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = measure(device, getattr(torch, args.dtype), args.repeats)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    settings = {"hardware": hardware, "threads": torch.get_num_threads(), "dtype": args.dtype, "repeats": args.repeats}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**settings, **versions, "steps": STEPS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
