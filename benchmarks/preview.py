"""What a preview takes beside the network calls that it is made of, at published shapes with random weights.

    python -m benchmarks.preview --output runs/preview_speed.json    # GPU: FLUX.1 dev, SD3.5 Large; CPU: tiny networks
    python -m benchmarks.preview --output runs/preview_speed.json --families hunyuan-video

Three rows a family: the full run, its preview at half the size by the paper's setting, and its refinement, the rest of
the full run. `bare_s` is the sum of their evaluations, `decoding_s` their one decoding, each measured alone;
`beside_percent` is what the run takes beyond the evaluations (bar: 5 %), `beside_both_percent` beyond the decoding as
well. Medians after a warm-up.
"""

import torch

from benchmarks.clock import command_line, evaluation_s, median_s, parse, print_row, write_report
from benchmarks.shapes import FAMILIES, build_pipeline
from solver.samplers.latents import decode, latent_shape
from solver.samplers.preview import PreviewOptions, preview, refine

GUIDANCE = 3.5
TINY_SIZE = (64, 64)
TINY_FRAMES = 5


@torch.no_grad()
def measure(name: str, given) -> list[dict]:
    """The rows of a family."""
    family, pipe = FAMILIES[name], build_pipeline(name, given.tiny, given.device, given.dtype)
    height, width = TINY_SIZE if given.tiny else family.size
    call = {"guidance_scale": GUIDANCE}
    if family.frames is not None:
        call["num_frames"] = TINY_FRAMES if given.tiny else family.frames
    options = PreviewOptions(num_inference_steps=given.steps, method="subsample")
    sizes = {"full": (height, width), "small": (height // options.scale, width // options.scale)}
    evaluations = {key: evaluation(pipe, size, call, given.repeats) for key, size in sizes.items()}
    decodings = {key: decoding(pipe, size, call, given.repeats) for key, size in sizes.items()}

    made = preview(pipe, "x", 0, options, height=height, width=width, **call)
    calls = {
        "full": {"full": given.steps},
        "preview": made.report["network_calls"],
        "refine": {"full": given.steps - made.checkpoint.next_step},
    }
    runs = {
        "full": lambda: pipe("x", height=height, width=width, num_inference_steps=given.steps, **call),
        "preview": lambda: preview(pipe, "x", 0, options, height=height, width=width, **call),
        "refine": lambda: refine(pipe, made.checkpoint),
    }
    rows = []
    for run, function in runs.items():
        bare = sum(count * evaluations[key] for key, count in calls[run].items())
        decoding_s = decodings["small" if run == "preview" else "full"]
        seconds = median_s(function, given.repeats, given.device)
        times = {"seconds": seconds, "bare_s": bare, "decoding_s": decoding_s}
        beside = {"beside_percent": bare, "beside_both_percent": bare + decoding_s}
        times |= {column: 100 * (seconds / known - 1) for column, known in beside.items()}
        rows.append({"family": name, "run": run, "network_calls": calls[run], **times})
        print_row(rows[-1])
    return rows


def evaluation(pipe, size: tuple[int, int], call: dict, repeats: int) -> float:
    """Seconds of one evaluation, guidance included."""
    height, width = size
    return evaluation_s(pipe, {**call, "prompt": "x", "height": height, "width": width}, repeats)


def decoding(pipe, size: tuple[int, int], call: dict, repeats: int) -> float:
    """Seconds of the decoder."""
    latents = torch.randn(1, *latent_shape(pipe, *size, call.get("num_frames")), device=pipe.device)
    return median_s(lambda: decode(pipe, latents), repeats, pipe.device)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    choices = [name for name in FAMILIES if not name.startswith("sd1") and name != "sdxl"]  # flow models
    parser.add_argument("--families", nargs="+", choices=choices, default=["flux-dev", "sd35-large"])
    parser.add_argument("--steps", type=int, default=30, help="of the full run")
    given = parse(parser, arguments)
    rows = []
    for name in given.families:
        rows += measure(name, given)
        if given.device.type == "cuda":
            torch.cuda.empty_cache()
    write_report(given, {"rows": rows})


if __name__ == "__main__":
    main()
