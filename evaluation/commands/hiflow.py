"""Pictures larger than the model knows, 1K to 2K and 4K, without training.

    python sample.py hiflow --model black-forest-labs/FLUX.1-dev --dtype bfloat16 --sizes 1024 2048 4096 \\
        --prompt "a lighthouse at dusk" --seed 7 --output large.png
    python sample.py hiflow --model zoo/mini-sd --sizes 64 128 --steps 20 --image small.png \\
        --prompt "a small red ring above a blue cube" --seed 7 --output large.png
    python sample.py hiflow --explain --family flux --sizes 1024 2048 4096 --preset code --json

The PNG remembers in its text chunks how it was made. `--explain` prints sizes, steps, noise levels, FLOPs and memory
of a published model, and loads no weights.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import asdict
from pathlib import Path

from evaluation.commands import check_output, check_steps, next_output
from evaluation.config import check_guidance


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", help="pipeline: hub id or local folder")
    parser.add_argument("--prompt")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, help="PNG file to write; the next of outputs/hiflow-N.png by default")
    parser.add_argument("--sizes", type=_size, nargs="+", default=[1024, 2048, 4096], help="pixels, or HEIGHTxWIDTH")
    parser.add_argument("--all_sizes", action="store_true", help="write the smaller pictures too, as NAME_SIZE.png")
    parser.add_argument("--image", type=Path, help="picture of the first size to enlarge, instead of rendering it")
    parser.add_argument("--preset", default="code", help="code or paper: whose numbers")
    parser.add_argument("--steps", type=int, help="of the base; the larger stages keep their share of it")
    parser.add_argument("--stage_steps", type=int, nargs="+", help="one a larger stage; the last one serves the rest")
    parser.add_argument("--tau", type=float, nargs="+", help="instead: share of the base's steps")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="one, or one a stage")
    parser.add_argument("--cutoff", type=float, nargs="+", help="of the low band, in Nyquist frequencies")
    parser.add_argument("--alpha", type=float, nargs="+", help="strength of the direction alignment")
    parser.add_argument("--beta", type=float, nargs="+", help="strength of the acceleration alignment")
    parser.add_argument("--start", help="image or prediction: what is enlarged and noised")
    parser.add_argument("--acceleration", help="code, eq10 or fixed-noise: the rule")
    parser.add_argument(
        "--edges_first", type=float, nargs=2, metavar=("STEPS", "RATIO"),
        help="experiment on FLUX: in this share of the last stage's steps, its first, only this share of the picture "
        "has all its tokens",
    )  # fmt: skip
    parser.add_argument("--alignment", default="full", help="none, init, init+direction or full")
    parser.add_argument("--explain", action="store_true", help="print the plan and stop")
    parser.add_argument("--family", default="flux", help="published model of --explain")
    parser.add_argument("--json", action="store_true", help="of --explain")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])


def run(given: Namespace) -> Path | str:
    """Writes the picture, or answers the plan. Raises ValueError or OSError."""
    check_steps(given.steps)
    check_steps(*given.stage_steps or (), option="--stage_steps")
    for scale in given.guidance_scale or ():
        check_guidance("--guidance_scale", scale)
    if given.explain:
        if unused := [
            f"--{name}" for name in ("model", "image", "prompt", "seed") if getattr(given, name) is not None
        ]:
            raise ValueError(f"{', '.join(unused)}: --explain plans a published model, --family; leave it out.")
        from solver.samplers.hiflow.explain import FAMILIES, as_table, explain

        known = FAMILIES.get(given.family)
        recipe = _recipe(given, known and known.steps)
        report = explain(given.family, given.sizes, recipe, _guidance(given), given.alignment)
        return json.dumps(report, indent=1) if given.json else as_table(report)
    return _render(given)


def _recipe(given: Namespace, few_steps: int | None):
    """The preset with what was given; `few_steps` are those of a distilled model."""
    from solver.samplers.hiflow.plan import as_recipe, with_changes, with_steps

    recipe, steps = as_recipe(given.preset), few_steps if given.steps is None else given.steps
    if steps is not None:
        recipe = with_steps(recipe, steps)
    tuples = {name: getattr(given, name) for name in ("stage_steps", "tau", "cutoff", "alpha", "beta")}
    tuples = {name: tuple(values) for name, values in tuples.items() if values}
    for name, values in tuples.items():
        if len(values) >= len(given.sizes):
            raise ValueError(f"--{name} {values}: expected at most {len(given.sizes) - 1}, one a larger stage.")
    edges_first = tuple(given.edges_first) if given.edges_first else None
    return with_changes(recipe, **tuples, start=given.start, acceleration=given.acceleration, edges_first=edges_first)


def _guidance(given: Namespace) -> float | list[float] | None:
    scales = given.guidance_scale
    return scales[0] if scales and len(scales) == 1 else scales


def _render(given: Namespace) -> Path:
    if missing := [f"--{key}" for key in ("model", "prompt", "seed") if getattr(given, key) is None]:
        raise ValueError(f"{', '.join(missing)}: needed to render. --explain needs none of them.")
    output = given.output or next_output("hiflow")
    check_output(output)
    _recipe(given, None)  # raises before the model is loaded
    from PIL import Image

    from evaluation.rendering import load_pipeline
    from evaluation.single import save_png, to_picture
    from solver.samplers.calls import text_length
    from solver.samplers.hiflow.inputs import FEW_STEPS, is_distilled_to_few_steps
    from solver.samplers.hiflow.sampler import hiflow

    image = Image.open(given.image) if given.image else None
    pipe = load_pipeline(given.model, given.dtype, given.device)
    recipe, guidance = _recipe(given, FEW_STEPS if is_distilled_to_few_steps(pipe) else None), _guidance(given)
    result = hiflow(
        pipe,
        given.prompt,
        given.seed,
        given.sizes,
        recipe,
        image=image,
        guidance_scale=guidance,
        alignment=given.alignment,
        call=text_length(pipe),
    )
    facts = {"model": given.model, "prompt": given.prompt, "seed": given.seed, "dtype": given.dtype}
    facts["hiflow"] = json.dumps(
        {"sizes": given.sizes, "guidance_scale": guidance, "alignment": given.alignment, **asdict(recipe)}
    )
    if given.image:
        facts["enlarged"] = str(given.image)
    pictures = result.images if given.all_sizes else result.images[-1:]
    for image_BCHW in pictures:
        picture = to_picture(pipe, image_BCHW)
        path = output
        if image_BCHW is not result.images[-1]:
            path = path.with_stem(f"{path.stem}_{picture.height}")
        save_png(picture, path, {**facts, "height": picture.height, "width": picture.width})
    return output


def _size(text: str) -> int | tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ArgumentTypeError(f"{text!r}: expected pixels, or HEIGHTxWIDTH.")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
