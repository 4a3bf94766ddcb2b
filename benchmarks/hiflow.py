"""What HiFlow costs at FLUX.1-dev's shape, and how much of it is not the network.

    python -m benchmarks.hiflow --output runs/hiflow.json            # on a CPU a rehearsal of a minute, tiny networks

Random weights (`benchmarks.shapes`). The cascade 1024 → 2048 → 4096 of the preset `code`, once, after a
warm-up of the small stages. The bars: less than 2 % of the time is spent outside of the network and the autoencoder
(`outside_percent`), and the transformer at 4096² reaches 70 % of the rate that its attention kernel reaches alone
(`of_attention_percent`). `peak_gib` is of a stage with its encoding and its decoding.
"""

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from benchmarks.clock import command_line, now, parse, print_row, write_report
from benchmarks.shapes import FAMILIES, build_pipeline
from solver.samplers.cost import network_of
from solver.samplers.hiflow import PRESETS, hiflow, with_steps
from solver.samplers.hiflow.explain import stage_flops

MODEL = "flux-dev"
FULL = {"sizes": (1024, 2048, 4096), "steps": 30}
TINY = {"sizes": (64, 128, 256), "steps": 4}


class Clock:
    """Seconds inside the transformer, call by call, and inside the autoencoder; the device is waited for.

    Attributes:
        peaks: bytes, stage by stage: a stage ends with the one picture that it decodes. Empty on a CPU.
    """

    def __init__(self, pipe: FluxPipeline):
        self.device, self.network, self.autoencoder, self.peaks = pipe.device, [], 0.0, []
        # Outside of the hooks that a stage installs and removes, so that their work is not counted as the network's.
        self._wrap(pipe.transformer, "forward", self.network.append)
        self._wrap(pipe.vae, "encode", self._add)
        self._wrap(pipe.vae, "decode", self._add_last)

    def _add(self, seconds: float) -> None:
        self.autoencoder += seconds

    def _add_last(self, seconds: float) -> None:
        self._add(seconds)
        if self.device.type == "cuda":
            self.peaks.append(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wrap(self, module, name: str, note) -> None:
        function = getattr(module, name)

        def timed(*args, **kwargs):
            start = now(self.device)
            result = function(*args, **kwargs)
            note(now(self.device) - start)
            return result

        setattr(module, name, timed)


@torch.no_grad()
def attention_rate(pipe: FluxPipeline, tokens: int, repeats: int = 3) -> float:
    """FLOP/s of the attention kernel alone on as many tokens."""
    config = pipe.transformer.config
    heads, width = config.num_attention_heads, config.attention_head_dim
    q, k, v = (torch.randn(1, heads, tokens, width, device=pipe.device, dtype=pipe.transformer.dtype) for _ in "qkv")
    F.scaled_dot_product_attention(q, k, v)
    start = now(pipe.device)
    for _ in range(repeats):
        F.scaled_dot_product_attention(q, k, v)
    return repeats * 4 * heads * width * tokens**2 / (now(pipe.device) - start)


@torch.no_grad()
def measure(given) -> dict:
    device, shape = given.device, TINY if given.tiny else FULL
    pipe, words = build_pipeline(MODEL, given.tiny, device, given.dtype), FAMILIES[MODEL].text[0]
    sizes, recipe = shape["sizes"], with_steps(PRESETS["code"], shape["steps"])
    hiflow(pipe, "x", 0, sizes[:2], with_steps(recipe, 2))  # warm-up
    clock = Clock(pipe)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = now(device)
    result = hiflow(pipe, "x", 0, sizes, recipe)
    total = now(device) - start

    network = network_of(pipe.transformer, text_tokens=words)
    stages, calls = [], iter(clock.network)
    for stage in result.stages:
        seconds = sum(next(calls) for _ in range(stage.steps))
        rate = stage_flops(network, stage) / seconds / 1e12
        stages.append({"size": stage.height, "steps": stage.steps, "seconds": seconds, "tflops_s": rate})
    for stage, peak in zip(stages, clock.peaks, strict=False):  # none on a CPU
        stage["peak_gib"] = peak / 1024**3
    outside = total - sum(clock.network) - clock.autoencoder
    alone = attention_rate(pipe, (sizes[-1] // network.pixels) ** 2 + words) / 1e12
    return {
        "stages": stages,
        "total_s": total,
        "network_s": sum(clock.network),
        "autoencoder_s": clock.autoencoder,
        "outside_s": outside,
        "outside_percent": 100 * outside / total,
        "attention_tflops_s": alone,
        "of_attention_percent": 100 * stages[-1]["tflops_s"] / alone,
    }


def main(arguments: list[str] | None = None) -> None:
    given = parse(command_line(__doc__), arguments)
    report = measure(given)
    for stage in report["stages"]:
        print_row(stage)
    print_row({name: value for name, value in report.items() if name != "stages"})
    write_report(given, report)


if __name__ == "__main__":
    main()
