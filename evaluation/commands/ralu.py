"""A full-size picture in a fraction of the compute: small first, then its edges, then all of it.

    python sample.py ralu --model zoo/mini-flux --prompt "a red ring above a blue cube" --seed 7 --preset 4x \\
        --output picture.png
    python sample.py ralu --explain --family flux --width 1024 --height 1024 --preset 4x --json
    python sample.py ralu --explain --family sd3 --steps 5 6 9 --ends .2 .3 1 --ratio .3 --shift 3

`--explain` prints stages, tokens, sigmas and FLOPs, and loads no weights.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from data.command_line import DTYPES
from evaluation.commands import check_output, check_steps, next_output, picture_facts, refuse_unused
from evaluation.config import check_guidance

PICTURE = ("model", "prompt", "seed", "output", "device", "dtype", "published")  # nothing to a plan
PLAN = ("family", "plain_steps", "text_tokens", "without_attention", "json")  # nothing to a picture


class Family(NamedTuple):
    """A published model of `--explain`.

    Attributes:
        network: key of `cost.NETWORKS`.
        plain_steps: of the run that it is compared with; 4 of models that are distilled to them.
        scheduler: what of its scheduler's configuration says the shift.
        reference: pixels of a picture to edit.
    """

    network: str
    plain_steps: int
    scheduler: dict
    reference: int = 0

    @property
    def few_steps(self) -> bool:
        return self.plain_steps == 4

    @property
    def sd3(self) -> bool:
        return self.network.startswith("sd3")

    @property
    def told(self) -> bool:
        """Whether the model is told its guidance scale."""
        return self.network == "flux-dev"


FLUX_SHIFT = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
QWEN_SHIFT = FLUX_SHIFT | {"max_shift": 0.9, "max_image_seq_len": 8192}
FAMILIES = {
    "flux": Family("flux-dev", 50, FLUX_SHIFT),
    "flux-kontext": Family("flux-dev", 28, FLUX_SHIFT, reference=1024**2),
    "flux-schnell": Family("flux-schnell", 4, {"shift": 1.0}),
    "sd3": Family("sd3-medium", 28, {"shift": 3.0}),
    "sd3.5-medium": Family("sd3.5-medium", 28, {"shift": 3.0}),
    "sd3.5-large": Family("sd3.5-large", 28, {"shift": 3.0}),
    "sd3.5-large-turbo": Family("sd3.5-large-turbo", 4, {"shift": 3.0}),
    "qwen-image": Family("qwen-image", 50, QWEN_SHIFT),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", help="pipeline: hub id or local folder")
    parser.add_argument("--prompt")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--guidance_scale", type=float, help="default 3; 1 of models distilled to a few steps")
    parser.add_argument("--height", type=int, help="in pixels; the pipeline's own by default, 1024 with --explain")
    parser.add_argument("--width", type=int, help="likewise")
    parser.add_argument("--output", type=Path, help="PNG file to write; the next of outputs/ralu-N.png by default")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 by default")
    parser.add_argument(
        "--preset",
        help="4x, 5x, 7x (FLUX), 2x, 3x (SD3), turbo (4 steps); by default 4x, 2x of SD3, turbo of schnell; SD3.5 "
        "Large Turbo does not say what it is, so name it",
    )
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
    if given.preset is not None and (given.steps is not None or given.ends is not None):
        raise ValueError(f"--preset {given.preset}: --steps and --ends are a schedule of one's own; leave one out.")
    if given.guidance_scale is not None:
        check_guidance("--guidance_scale", given.guidance_scale)
    if given.explain:
        refuse_unused(given, PICTURE, "--explain plans a published model, --family")
        return explain(given)
    refuse_unused(given, PLAN, "said to --explain only")
    output = given.output or next_output("ralu")
    check_output(output)
    from evaluation.rendering import load_pipeline
    from evaluation.single import save_png, to_picture
    from solver.samplers.calls import guidance, is_distilled_to_few_steps, text_length
    from solver.samplers.latents import denoiser
    from solver.samplers.ralu.plan import default_guidance
    from solver.samplers.ralu.sampler import PUBLISHED, own_choices, own_preset, ralu

    facts, dtype = picture_facts(given), given.dtype or "float32"
    pipe = load_pipeline(facts["model"], dtype, given.device)
    if given.guidance_scale is None:
        told = bool(denoiser(pipe).config.get("guidance_embeds"))
        facts["guidance_scale"] = default_guidance(given.preset, is_distilled_to_few_steps(pipe), told)
    call = {**guidance(pipe, facts["guidance_scale"], [""]), **text_length(pipe)}
    choices = PUBLISHED if given.published else own_choices(pipe, call)
    preset = given.preset or own_preset(pipe)
    result = ralu(
        pipe,
        facts["prompt"],
        facts["seed"],
        preset,
        facts.get("height"),
        facts.get("width"),
        steps=given.steps,
        ends=given.ends,
        ratio=given.ratio,
        shift=given.shift,
        choices=choices,
        call=call,
    )
    image = to_picture(pipe, result.images_BCHW)
    name = preset if given.steps is None else "custom"
    facts |= {"solver": f"ralu {name}", "steps": sum(result.schedule.steps), "dtype": dtype}
    facts["ralu"] = json.dumps({**asdict(result.schedule), "published": given.published, "copy": choices.copy})
    save_png(image, output, facts)
    return output


def explain(given: Namespace) -> str:
    """The plan as a table or as JSON, of the run that these arguments make of the family's own scheduler."""
    from solver.samplers.cost import NETWORKS, image_tokens
    from solver.samplers.ralu.plan import as_schedule, as_table, default_guidance, default_preset, plan
    from solver.samplers.ralu.schedule import scheduler_shift

    if given.family is None:
        raise ValueError(f"--explain needs --family, one of {', '.join(FAMILIES)}.")
    family = FAMILIES[given.family]
    network = NETWORKS[family.network]
    height, width = (1024 if side is None else side for side in (given.height, given.width))
    own = scheduler_shift(SimpleNamespace(config=family.scheduler), image_tokens(network, height, width))
    solved = given.shift == "own" or (given.shift is None and given.steps is not None)
    preset = given.preset or default_preset(family.sd3, family.few_steps)
    guidance = given.guidance_scale
    if guidance is None:
        guidance = default_guidance(given.preset, family.few_steps, family.told)
    planned = plan(
        network,
        as_schedule(preset, given.steps, given.ends, given.ratio, own if solved else given.shift),
        height,
        width,
        family.plain_steps if given.plain_steps is None else given.plain_steps,
        given.text_tokens,
        attention=not given.without_attention,
        reference_tokens=family.reference // network.pixels**2,
        branches=2 if guidance > 1 and not family.told else 1,
        own_shift=own,
    )
    return json.dumps(planned, indent=2) if given.json else as_table(planned)


def _shift(text: str) -> float | str:
    try:
        return text if text == "own" else float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: expected a number, or own.") from None
