"""Seconds of runs, of bare evaluations and of what is inside the network, and the file that keeps them."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook

from solver.samplers.latents import denoiser


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_s(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median wall time of `run` in seconds, the device queue emptied before and after."""
    times = []
    for _ in range(repeats + 1):  # the first is the warm-up
        start = now(device)
        run()
        times.append(now(device) - start)
    return statistics.median(times[1:])


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
    with torch.no_grad():
        return median_s(lambda: network(*args, **kwargs), repeats, pipe.device)


class NetworkClock(ModelHook):
    """Seconds inside a module's own forward, by events on a GPU, so that nothing waits.

    What hooks of diffusers do that are registered later is outside: those of RALU, which gather and scatter tokens.
    Inside stay those on its submodules, which of SD3 gather and scatter too.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        super().__init__()
        self.cuda, self.marks = device.type == "cuda", []
        HookRegistry.check_if_exists_or_initialize(module).register_hook(self, "clock")

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        self.marks.append(self._now())
        answer = self.fn_ref.original_forward(*args, **kwargs)
        self.marks.append(self._now())
        return answer

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


def command_line(doc: str) -> argparse.ArgumentParser:
    """What every benchmark of speed is told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the denoiser; float32 on a CPU")
    parser.add_argument("--shapes", choices=["tiny", "published"], help="tiny on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments; what was left to the device is filled in."""
    given = parser.parse_args(arguments)
    given.device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cpu = given.device.type == "cpu"
    given.dtype = getattr(torch, given.dtype or ("float32" if on_cpu else "bfloat16"))
    given.tiny = (given.shapes or ("tiny" if on_cpu else "published")) == "tiny"
    return given


def print_row(row: dict) -> None:
    """A row as it comes."""
    values = (
        f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in row.items()
    )
    print(" | ".join(values), flush=True)


def write_report(given: argparse.Namespace, results: dict) -> None:
    """The results, beside what they were measured on and how."""
    cuda = given.device.type == "cuda"
    hardware = torch.cuda.get_device_name(given.device) if cuda else f"{platform.machine()} processor"
    hidden = ("output", "shapes", "device", "dtype")
    settings = {name: value for name, value in vars(given).items() if name not in hidden}
    settings |= {"device": str(given.device), "dtype": str(given.dtype).removeprefix("torch.")}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    facts = {"hardware": hardware, "threads": torch.get_num_threads(), **settings, **versions}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({**facts, **results}, indent=2) + "\n")
