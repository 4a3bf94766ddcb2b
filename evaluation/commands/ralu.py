"""A full-size picture in a fraction of the compute: small first, then its edges, then all of it.

    python sample.py ralu --model zoo/mini-flux --prompt "a red ring above a blue cube" --seed 7 --preset 4x \\
        --output picture.png
    python sample.py ralu --explain --family flux --width 1024 --height 1024 --preset 4x --json
    python sample.py ralu --explain --family sd3 --steps 5 6 9 --ends .2 .3 1 --ratio .3 --shift 3

`--explain` prints stages, tokens, sigmas and FLOPs, and loads no weights.
"""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from evaluation.commands import check_output, check_steps, next_output, picture_facts


class Family(NamedTuple):
    """A published model of `--explain`.

    Attributes:
        network: key of `cost.NETWORKS`.
        plain_steps: of the run that it is compared with.
        preset: where none is given.
        scheduler: what of its scheduler's configuration says the shift.
        reference: pixels of a picture to edit.
    """

    network: str
    plain_steps: int
    preset: str
    scheduler: dict
    reference: int = 0


FLUX_SHIFT = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
QWEN_SHIFT = FLUX_SHIFT | {"max_shift": 0.9, "max_image_seq_len": 8192}
FAMILIES = {
    "flux": Family("flux-dev", 50, "4x", FLUX_SHIFT),
    "flux-kontext": Family("flux-dev", 28, "4x", FLUX_SHIFT, reference=1024**2),
    "flux-schnell": Family("flux-schnell", 4, "turbo", {"shift": 1.0}),
    "sd3": Family("sd3-medium", 28, "2x", {"shift": 3.0}),
    "sd3.5-medium": Family("sd3.5-medium", 28, "2x", {"shift": 3.0}),
    "sd3.5-large": Family("sd3.5-large", 28, "2x", {"shift": 3.0}),
    "sd3.5-large-turbo": Family("sd3.5-large-turbo", 4, "turbo", {"shift": 3.0}),
    "qwen-image": Family("qwen-image", 50, "4x", QWEN_SHIFT),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", help="pipeline: hub id or local folder")
    parser.add_argument("--prompt")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--guidance_scale", type=float, help="default 3")
    parser.add_argument("--height", type=int, help="in pixels; the pipeline's own by default, 1024 with --explain")
    parser.add_argument("--width", type=int, help="likewise")
    parser.add_argument("--output", type=Path, help="PNG file to write; the next of outputs/ralu-N.png by default")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--preset", help="4x (default), 5x, 7x (FLUX), 2x, 3x (SD3), turbo (4 steps)")
    parser.add_argument("--steps", type=int, nargs="+", help="of each of the three stages, instead of a preset")
    parser.add_argument("--ends", type=float, nargs="+", help="time at which each stage ends, the last 1")
    parser.add_argument("--ratio", type=float, help="share of tokens with the full resolution in the second stage")
    parser.add_argument("--shift", type=_shift, help="of the plain run, whose timesteps are matched; own: its own")
    parser.add_argument("--published", action="store_true", help="do as the public code does, defects included")
    parser.add_argument("--explain", action="store_true", help="print the plan and its cost, render nothing")
    parser.add_argument("--family", choices=FAMILIES, help="with --explain, which it needs: a published model")
    parser.add_argument("--plain_steps", type=int, help="of the run that the cost is compared with")
    parser.add_argument("--text_tokens", type=int, help="length of the prompt for the cost; the family's by default")
    parser.add_argument("--without_attention", action="store_true", help="count FLOPs as most publications do")
    parser.add_argument("--json", action="store_true", help="with --explain, JSON instead of a table")


def run(given: Namespace) -> Path | str:
    """Writes the picture, or answers with the plan. Raises ValueError or OSError as `ralu` and `plan` say."""
    check_steps(*given.steps or ())
    check_steps(given.plain_steps, option="--plain_steps")
    if given.explain:
        return explain(given)
    output = given.output or next_output("ralu")
    check_output(output)
    from evaluation.rendering import load_pipeline
    from evaluation.single import save_png, to_picture
    from solver.samplers.calls import guidance, text_length
    from solver.samplers.ralu.sampler import PUBLISHED, Choices, ralu

    facts = picture_facts(given)
    pipe = load_pipeline(facts["model"], given.dtype, given.device)
    result = ralu(
        pipe,
        facts["prompt"],
        facts["seed"],
        given.preset or "4x",
        facts.get("height"),
        facts.get("width"),
        steps=given.steps,
        ends=given.ends,
        ratio=given.ratio,
        shift=given.shift,
        choices=PUBLISHED if given.published else Choices(),
        call={**guidance(pipe, facts["guidance_scale"], [""]), **text_length(pipe)},
    )
    image = to_picture(pipe, result.images_BCHW)
    name = given.preset or "4x" if given.steps is None else "custom"
    facts |= {"solver": f"ralu {name}", "steps": sum(result.schedule.steps), "dtype": given.dtype}
    facts["ralu"] = json.dumps({**asdict(result.schedule), "published": given.published})
    save_png(image, output, facts)
    return output


def explain(given: Namespace) -> str:
    """The plan as a table or as JSON, of the run that these arguments make of the family's own scheduler."""
    from solver.samplers.cost import NETWORKS, image_tokens
    from solver.samplers.ralu.plan import as_schedule, as_table, plan
    from solver.samplers.ralu.schedule import scheduler_shift

    if given.family is None:
        raise ValueError(f"--explain needs --family, one of {', '.join(FAMILIES)}.")
    family = FAMILIES[given.family]
    network, shift = NETWORKS[family.network], given.shift
    height, width = (1024 if side is None else side for side in (given.height, given.width))
    if shift == "own" or (shift is None and given.steps is not None):
        shift = scheduler_shift(SimpleNamespace(config=family.scheduler), image_tokens(network, height, width))
    planned = plan(
        network,
        as_schedule(given.preset or family.preset, given.steps, given.ends, given.ratio, shift),
        height,
        width,
        family.plain_steps if given.plain_steps is None else given.plain_steps,
        given.text_tokens,
        attention=not given.without_attention,
        reference_tokens=family.reference // network.pixels**2,
    )
    return json.dumps(planned, indent=2) if given.json else as_table(planned)


def _shift(text: str) -> float | str:
    return text if text == "own" else float(text)
