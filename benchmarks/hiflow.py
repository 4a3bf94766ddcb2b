"""What HiFlow costs at FLUX.1-dev's shape, and how much of it is not the network.

    python benchmarks/hiflow.py --output runs/hiflow.json --device cuda --dtype bfloat16
    python benchmarks/hiflow.py --output runs/hiflow.json --tiny          # a rehearsal on a CPU, in a minute

Random weights (12 B parameters: some 24 GB in bfloat16) and random embeddings of 512 words, so there are no text
encoders; the time does not depend on the values. The cascade 1024 → 2048 → 4096 of the preset `code`, once, after a
warm-up of the small stages. The bars: less than 2 % of the time is spent outside of the network and the autoencoder,
and the transformer at 4096² reaches 70 % of the rate that its attention kernel reaches alone.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from solver.samplers.cost import evaluation_flops, network_of
from solver.samplers.hiflow import PRESETS, hiflow, with_steps

FULL = {
    "words": 512,
    "sizes": (1024, 2048, 4096),
    "steps": 30,
    "channels": (128, 256, 512, 512),  # of the autoencoder
    "transformer": {"guidance_embeds": True},
}
TINY = {
    "words": 8,
    "sizes": (64, 128, 256),
    "steps": 4,
    "channels": (32, 32, 32, 32),
    "transformer": {
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    },
}


def make_pipeline(shape: dict, device: torch.device, dtype: torch.dtype) -> FluxPipeline:
    """FLUX with random weights, made where they are used."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            transformer = FluxTransformer2DModel(**shape["transformer"])
            vae = AutoencoderKL(
                block_out_channels=shape["channels"],
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                sample_size=1024,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        finally:
            torch.set_default_dtype(torch.float32)
    no_text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **no_text)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Seconds inside the transformer, call by call, and inside the autoencoder; the device is waited for."""

    def __init__(self, pipe: FluxPipeline):
        self.device, self.network, self.autoencoder = pipe.device, [], 0.0
        # Outside of the hooks that a stage installs and removes, so that their work is not counted as the network's.
        self._wrap(pipe.transformer, "forward", self.network.append)
        for name in ("encode", "decode"):
            self._wrap(pipe.vae, name, self._add)

    def _add(self, seconds: float) -> None:
        self.autoencoder += seconds

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


def measure(shape: dict, device: torch.device, dtype: torch.dtype) -> dict:
    pipe = make_pipeline(shape, device, dtype)
    embeds = {
        "prompt_embeds": torch.randn(1, shape["words"], 4096, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(1, 768, device=device, dtype=dtype),
    }
    sizes, recipe = shape["sizes"], with_steps(PRESETS["code"], shape["steps"])
    hiflow(pipe, None, 0, sizes[:2], with_steps(recipe, 2), call=embeds)  # warm-up
    clock = Clock(pipe)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = now(device)
    result = hiflow(pipe, None, 0, sizes, recipe, call=embeds)
    total = now(device) - start

    network = network_of(pipe.transformer)
    stages, calls = [], iter(clock.network)
    for stage in result.stages:
        seconds = sum(next(calls) for _ in range(stage.steps))
        tokens = (stage.height // 16) * (stage.width // 16)
        flops = stage.steps * evaluation_flops(network, tokens, shape["words"])
        stages.append(
            {"size": stage.height, "steps": stage.steps, "seconds": seconds, "tflops_s": flops / seconds / 1e12}
        )
    outside = total - sum(clock.network) - clock.autoencoder
    return {
        "stages": stages,
        "total_s": total,
        "network_s": sum(clock.network),
        "autoencoder_s": clock.autoencoder,
        "outside_s": outside,
        "outside_percent": 100 * outside / total,
        "attention_tflops_s": attention_rate(pipe, (sizes[-1] // 16) ** 2 + shape["words"]) / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 1024**3 if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to rehearse")
    args = parser.parse_args()
    device = torch.device(args.device)
    report = measure(TINY if args.tiny else FULL, device, getattr(torch, args.dtype))
    print("size | steps | seconds | TFLOP/s")
    for stage in report["stages"]:
        print(" | ".join(f"{value:.4g}" for value in stage.values()))
    print(", ".join(f"{name} {value:.4g}" for name, value in report.items() if isinstance(value, float)))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    settings = {"hardware": hardware, "threads": torch.get_num_threads(), "dtype": args.dtype, "tiny": args.tiny}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**settings, **versions, **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
