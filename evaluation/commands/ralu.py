"""A full-size picture in a fraction of the compute: small first, then its edges, then all of it.

    python sample.py ralu --model zoo/mini-flux --prompt "a red ring above a blue cube" --seed 7 --preset 4x \\
        --output picture.png
    python sample.py ralu --explain --family flux --width 1024 --height 1024 --preset 4x --json
    python sample.py ralu --explain --family sd3 --steps 5 6 9 --ends .2 .3 1 --ratio .3 --shift 3

`--explain` prints stages, tokens, sigmas and FLOPs, and loads no weights.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from evaluation.commands import check_output, check_steps, next_output, picture_facts

# --family: the network of the cost model, and the steps of its plain run
PLAIN_STEPS = {
    "flux": 50,
    "flux-schnell": 4,
    "sd3": 28,
    "sd3.5-medium": 28,
    "sd3.5-large": 28,
    "sd3.5-large-turbo": 4,
    "qwen-image": 50,
}
NETWORK = {"flux": "flux-dev", "sd3": "sd3-medium"}  # where the cost model has another name


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
    parser.add_argument("--preset", default="4x", help="4x, 5x, 7x (FLUX), 2x, 3x (SD3), turbo (4 steps)")
    parser.add_argument("--steps", type=int, nargs="+", help="of each of the three stages, instead of a preset")
    parser.add_argument("--ends", type=float, nargs="+", help="time at which each stage ends, the last 1")
    parser.add_argument("--ratio", type=float, help="share of tokens with the full resolution in the second stage")
    parser.add_argument("--shift", type=float, help="of the plain run, whose timesteps are matched")
    parser.add_argument("--published", action="store_true", help="do as the public code does, defects included")
    parser.add_argument("--explain", action="store_true", help="print the plan and its cost, render nothing")
    parser.add_argument("--family", choices=PLAIN_STEPS, help="with --explain, which it needs: a published model")
    parser.add_argument("--plain_steps", type=int, help="of the run that the cost is compared with")
    parser.add_argument("--text_tokens", type=int, help="length of the prompt for the cost; the family's by default")
    parser.add_argument("--without_attention", action="store_true", help="count FLOPs as most publications do")
    parser.add_argument("--json", action="store_true", help="with --explain, JSON instead of a table")


def run(given: Namespace) -> Path | str:
    """Writes the picture, or answers with the plan. Raises ValueError or OSError as `ralu` and `plan` say."""
    check_steps(*given.steps or ())
    check_steps(given.plain_steps, option="--plain_steps")
    from solver.samplers.ralu.plan import as_schedule

    if given.explain:
        schedule = as_schedule(given.preset, given.steps, given.ends, given.ratio, given.shift)
        return explain(given, schedule)
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
        given.preset,
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
    name = given.preset if given.steps is None else "custom"
    save_png(image, output, {**facts, "solver": f"ralu {name}", "steps": sum(result.schedule.steps)})
    return output


def explain(given: Namespace, schedule) -> str:
    """The plan as a table or as JSON."""
    from solver.samplers.cost import NETWORKS
    from solver.samplers.ralu.plan import as_table, plan

    if given.family is None:
        raise ValueError(f"--explain needs --family, one of {', '.join(PLAIN_STEPS)}.")
    planned = plan(
        NETWORKS[NETWORK.get(given.family, given.family)],
        schedule,
        1024 if given.height is None else given.height,
        1024 if given.width is None else given.width,
        PLAIN_STEPS[given.family] if given.plain_steps is None else given.plain_steps,
        given.text_tokens,
        attention=not given.without_attention,
    )
    return json.dumps(planned, indent=2) if given.json else as_table(planned)
