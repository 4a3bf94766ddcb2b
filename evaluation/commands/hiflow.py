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
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data.command_line import DTYPES
from data.prompts import source_identity
from evaluation.commands import GUIDANCE_SCALE, check_output, check_steps, next_output, refuse_unused
from evaluation.config import check_guidance

TUPLES = ("stage_steps", "tau", "cutoff", "alpha", "beta", "ntk_factor")  # of a recipe, a number a larger stage
SIZES = (
    "pixels, or HEIGHTxWIDTH; by default the model's or the given picture's, twice and four times it a side, as far "
    "as the model has positions"
)
SWITCHES = {
    "proportional_attention": "on FLUX, whether logits grow with the number of keys",
    "text_copies": "on FLUX, whether the text comes once a base-size tile",
    "shifted_patches": "on FLUX, whether the patch grid moves at every other step",
}
OF_A_PICTURE = (
    *("model", "prompt", "negative_prompt", "seed", "image", "solver", "output", "all_sizes", "device", "dtype"),
    *("offload", "ignore_memory"),
)  # without a use beside --explain


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", help="pipeline: hub id or local folder")
    parser.add_argument("--prompt")
    parser.add_argument("--negative_prompt", help="what the picture shall not show; needs guidance above 1")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, help="PNG file to write; the next of outputs/hiflow-N.png by default")
    parser.add_argument("--sizes", type=_size, nargs="+", help=SIZES)
    parser.add_argument("--all_sizes", action="store_true", help="write the smaller pictures too, as NAME_SIZE.png")
    parser.add_argument("--solver", help="a learned one for all stages: folder or hub id; told the first scale")
    parser.add_argument("--image", type=Path, help="picture of the first size to enlarge, instead of rendering it")
    parser.add_argument("--preset", default="code", help="code or paper: whose numbers")
    parser.add_argument("--steps", type=int, help="of the base; the larger stages keep their share of it")
    parser.add_argument("--stage_steps", type=int, nargs="+", help="one a larger stage; the last one serves the rest")
    parser.add_argument("--tau", type=float, nargs="+", help="instead: share of the base's steps")
    parser.add_argument(
        "--guidance_scale", type=float, nargs="+",
        help="one, or one a stage; default 3, with --solver that of the solver; the preset's for models that are told "
        "their scale (FLUX.1-dev), none for models distilled to a few steps",
    )  # fmt: skip
    parser.add_argument("--cutoff", type=float, nargs="+", help="of the low band, in Nyquist frequencies")
    parser.add_argument("--alpha", type=float, nargs="+", help="strength of the direction alignment")
    parser.add_argument("--beta", type=float, nargs="+", help="strength of the acceleration alignment")
    parser.add_argument("--ntk_factor", type=float, nargs="+", help="on FLUX, of the base of rotary positions")
    for name, words in SWITCHES.items():
        parser.add_argument(f"--{name}", action=BooleanOptionalAction, help=words)
    parser.add_argument("--start", help="image or prediction: what is enlarged and noised")
    parser.add_argument("--acceleration", help="code, eq13, eq10 or fixed-noise: the rule")
    parser.add_argument(
        "--edges_first", type=float, nargs=2, metavar=("STEPS", "RATIO"),
        help="experiment on FLUX: in this share of the last stage's steps, its first, only this share of the picture "
        "has all its tokens",
    )  # fmt: skip
    parser.add_argument("--alignment", default="full", help="none, init, init+direction or full")
    parser.add_argument("--explain", action="store_true", help="print the plan and stop")
    parser.add_argument("--family", help="published model of --explain; flux by default")
    parser.add_argument("--json", action="store_true", help="of --explain")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 by default")
    parser.add_argument("--offload", action="store_true", help="networks wait in main memory until the GPU needs them")
    parser.add_argument("--ignore_memory", action="store_true", help="go on where the estimate says it cannot fit")


def run(given: Namespace) -> Path | str:
    """Writes the picture, or answers the plan. Raises ValueError or OSError."""
    check_steps(given.steps)
    check_steps(*given.stage_steps or (), option="--stage_steps")
    for scale in given.guidance_scale or ():
        check_guidance("--guidance_scale", scale)
    if given.explain:
        refuse_unused(given, OF_A_PICTURE, "--explain plans a published model, --family")
        from solver.samplers.hiflow.explain import FAMILIES, as_table, explain

        family = given.family or "flux"
        known = FAMILIES.get(family)
        sizes = given.sizes or (known and known.sizes)
        recipe = _recipe(given, known and known.steps, sizes)
        scale = _guidance(given)
        if scale is None and known and not (known.distilled or known.steps):
            scale = GUIDANCE_SCALE
        report = explain(family, sizes, recipe, scale, given.alignment)
        return json.dumps(report, indent=1) if given.json else as_table(report)
    refuse_unused(given, ("family", "json"), "only --explain has a use for it")
    return _render(given)


def _recipe(given: Namespace, few_steps: int | None, sizes: Sequence | None):
    """The preset with what was given; `few_steps` are those of a distilled model, sizes None where not known yet."""
    from solver.samplers.hiflow.plan import as_recipe, with_changes, with_steps

    recipe, steps = as_recipe(given.preset), few_steps if given.steps is None else given.steps
    if steps is not None:
        recipe = with_steps(recipe, steps)
    tuples = {name: getattr(given, name) for name in TUPLES}
    tuples = {name: tuple(values) for name, values in tuples.items() if values}
    for name, values in tuples.items():
        if sizes is not None and len(values) >= len(sizes):
            raise ValueError(f"--{name} {values}: expected at most {len(sizes) - 1}, one a larger stage.")
    edges_first = tuple(given.edges_first) if given.edges_first else None
    chosen = {name: getattr(given, name) for name in (*SWITCHES, "start", "acceleration")}
    return with_changes(recipe, **tuples, **chosen, edges_first=edges_first)


def _guidance(given: Namespace) -> float | list[float] | None:
    scales = given.guidance_scale
    return scales[0] if scales and len(scales) == 1 else scales


def _render(given: Namespace) -> Path:
    if missing := [f"--{key}" for key in ("model", "prompt", "seed") if getattr(given, key) is None]:
        raise ValueError(f"{', '.join(missing)}: needed to render. --explain needs none of them.")
    output = given.output or next_output("hiflow")
    check_output(output)
    if given.negative_prompt and max(given.guidance_scale or (GUIDANCE_SCALE,)) <= 1:
        raise ValueError("--negative_prompt: it needs --guidance_scale above 1.")
    from solver.samplers.hiflow.plan import as_size, plan_stages

    # What can be said without the model is said before it is loaded.
    scale = _guidance(given) if given.sizes else None
    plan_stages(given.sizes or (1, 2, 4), _recipe(given, None, given.sizes), None, scale, given.alignment)
    from PIL import Image

    from evaluation.single import save_png, solver_scheduler, to_picture
    from solver.samplers.calls import guidance, is_distilled_to_few_steps, text_length
    from solver.samplers.hiflow.inputs import (
        FEW_STEPS,
        as_pixels,
        given_image,
        usual_sizes,
    )
    from solver.samplers.hiflow.sampler import hiflow
    from solver.samplers.latents import as_seeds, denoiser

    as_seeds(given.seed)
    image = as_pixels(Image.open(given.image)) if given.image else None
    if image is not None and given.sizes:
        given_image(image, as_size(given.sizes[0]), 1)  # raises where it is of another size
    pipe = _pipeline(given)
    few, told = is_distilled_to_few_steps(pipe), denoiser(pipe).config.get("guidance_embeds")
    sizes = given.sizes or usual_sizes(pipe, image)
    recipe, scale = _recipe(given, FEW_STEPS if few else None, sizes), _guidance(given)
    scales = given.guidance_scale or (recipe.guidance_scales if told else None)
    solver = solver_scheduler(given.solver, pipe.scheduler, scales and scales[0]) if given.solver else None
    if scales is None and not few:
        scale = GUIDANCE_SCALE if solver is None else solver.guidance_scale
    call = text_length(pipe)
    if given.negative_prompt:
        guidance(pipe, max(scales or [scale or 1]), [given.negative_prompt])  # raises where it has no use for it
        call["negative_prompt"] = given.negative_prompt
    result = hiflow(
        pipe,
        given.prompt,
        given.seed,
        sizes,
        recipe,
        image=image,
        guidance_scale=scale,
        alignment=given.alignment,
        scheduler=solver,
        call=call,
        ignore_memory=given.ignore_memory,
    )
    facts = {name: getattr(given, name) for name in ("model", "prompt", "negative_prompt", "seed", "solver")}
    facts = {name: value for name, value in facts.items() if value is not None} | {"dtype": _dtype(given)}
    walked = {"stages": [[stage.height, stage.width, stage.guidance_scale] for stage in result.stages]}
    facts["hiflow"] = json.dumps({"sizes": sizes, "alignment": given.alignment, **asdict(recipe), **walked})
    if given.image:
        facts |= {"enlarged": str(given.image), "enlarged_sha256": source_identity(given.image.read_bytes()).hex()}
    pictures = result.images if given.all_sizes else result.images[-1:]
    for image_BCHW in pictures:
        picture = to_picture(pipe, image_BCHW)
        path = output
        if image_BCHW is not result.images[-1]:
            height, width = picture.height, picture.width
            path = path.with_stem(f"{path.stem}_{height if height == width else f'{height}x{width}'}")
        save_png(picture, path, {**facts, "height": picture.height, "width": picture.width})
    return output


def _pipeline(given: Namespace):
    """The model on its device, or, with --offload, where its networks wait for it."""
    from evaluation.rendering import load_pipeline

    if not given.offload:
        return load_pipeline(given.model, _dtype(given), given.device)
    import torch

    device = given.device or "cuda"
    if device.startswith("cpu") or not torch.cuda.is_available():
        raise ValueError("--offload: networks wait in main memory for a GPU, and here is none; leave it out.")
    pipe = load_pipeline(given.model, _dtype(given), "cpu")
    pipe.enable_model_cpu_offload(device=device)
    return pipe


def _dtype(given: Namespace) -> str:
    return given.dtype or "float32"


def _size(text: str) -> int | tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ArgumentTypeError(f"{text!r}: expected pixels, or HEIGHTxWIDTH.")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
