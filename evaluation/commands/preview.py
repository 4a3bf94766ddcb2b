"""Small pictures that match the large ones later: a numbered proof sheet, of which one is finished.

    python sample.py preview --model zoo/mini-flux --prompt "a red ring above a blue cube" --seed 7 --candidates 8
    python sample.py preview --model zoo/mini-flux --prompt "a red ring" --seed 7 --solver FOLDER --small_steps 8
    python sample.py refine --pick 3
    python sample.py preview --explain --family flux --width 1024 --height 1024 --json

The output is a folder, the next of outputs/preview-N by default: sheet.png, N.png (N.gif of a video), N.safetensors
with N.json, where `refine` goes on, and previews.json. Candidate N has the seed `--seed` + N - 1. `--explain` prints
phases and FLOPs of a published model, and loads no weights.
"""

import inspect
import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from data.command_line import DTYPES
from evaluation.commands import GUIDANCE_SCALE, OUTPUTS, check_output, check_steps, next_output, refuse_unused
from evaluation.config import check_guidance

# option of `PreviewOptions` -> type of the flag; what it means is in that class
NUMBERS = {"guided_steps": float, "switch": float, "scale": int, "kappa": float, "alpha": float, "small_steps": int}
CHOICES = ("method", "candidates_from", "selection", "unit", "target", "grid", "positions")
OF_A_PICTURE = ("model", "prompt", "negative_prompt", "seed", "solver", "output", "device", "dtype")  # not of a plan
SHEET, FACTS = "sheet.png", "previews.json"
PREVIEWS = "preview"  # of the folders' names where none is given
SHEET_COLUMNS = 4
FRAMES_A_SECOND = 16


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", help="pipeline of a flow model: hub id or local folder")
    parser.add_argument("--prompt")
    parser.add_argument("--seed", type=int, help="of the first candidate")
    parser.add_argument("--candidates", type=int, default=1, help="how many seeds are tried")
    parser.add_argument("--output", type=Path, help="folder to write; the next of outputs/preview-N by default")
    parser.add_argument("--height", type=int, help="of the full-size picture; the pipeline's own by default")
    parser.add_argument("--width", type=int, help="likewise")
    parser.add_argument("--steps", type=int, default=30, help="of the full-size run")
    parser.add_argument("--solver", help="folder or hub id of a learned solver for the small steps")
    parser.add_argument("--guidance_scale", type=float, help=f"default {GUIDANCE_SCALE:g}")
    parser.add_argument("--negative_prompt", help="what the picture shall not show; needs guidance above 1")
    parser.add_argument("--true_cfg_scale", type=float, help="of models that are told a guidance scale besides")
    parser.add_argument("--num_frames", type=int, help="of a video")
    options = parser.add_argument_group("options of the method, see solver/samplers/preview/options.py")
    for name, kind in NUMBERS.items():
        options.add_argument(f"--{name}", type=kind)
    for name in CHOICES:
        words = "mean by default; subsample is the paper's" if name == "method" else None
        options.add_argument(f"--{name}", help=words)
    options.add_argument("--fading", action="store_true", default=None)
    options.add_argument("--reevaluate", action="store_true", default=None)
    options.add_argument("--corrections", type=int)
    options.add_argument("--guide_at_switch", action="store_true", default=None)
    parser.add_argument("--explain", action="store_true", help="print the plan and stop")
    parser.add_argument("--family", help="published model of --explain, default flux")
    parser.add_argument("--json", action="store_true", help="of --explain")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 by default")


def run(given: Namespace) -> Path | str:
    """Writes the folder and answers the sheet's path, or answers the plan. Raises ValueError or OSError."""
    check_steps(given.steps)
    check_steps(given.small_steps, option="--small_steps")
    if given.alpha is not None and given.kappa is not None:
        raise ValueError("--alpha, --kappa: the same strength in two units; give one of them.")
    if given.candidates < 1:
        raise ValueError(f"--candidates {given.candidates}: expected at least 1.")
    for name in ("guidance_scale", "true_cfg_scale"):
        if getattr(given, name) is not None:
            check_guidance(f"--{name}", getattr(given, name))
    from solver.samplers.preview import PreviewOptions

    names = (*NUMBERS, *CHOICES, "fading", "reevaluate", "corrections", "guide_at_switch")
    chosen = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if "candidates_from" in chosen:  # --candidates is their number
        chosen["candidates"] = chosen.pop("candidates_from")
    options = PreviewOptions(num_inference_steps=given.steps, **chosen)
    if given.explain:
        refuse_unused(given, OF_A_PICTURE, "--explain makes no picture")
        given.family = given.family or "flux"
        from solver.samplers.preview.explain import as_table, branches_at, explain

        branches = branches_at(given.family, given.guidance_scale, given.true_cfg_scale)
        size = (given.height, given.width, given.num_frames)
        report = explain(given.family, *size, options, given.candidates, branches)
        return json.dumps(report) if given.json else as_table(report)
    refuse_unused(given, ("family", "json"), "only --explain has that")
    return _render(given, options)


def last_previews() -> Path:
    """The last folder of previews that were made without `--output`. Raises ValueError if there is none."""
    numbers = [path.parent.name.removeprefix(f"{PREVIEWS}-") for path in OUTPUTS.glob(f"{PREVIEWS}-*/{FACTS}")]
    if not (numbers := [int(number) for number in numbers if number.isdecimal()]):
        raise ValueError(
            f"--pick: there is no {OUTPUTS}/{PREVIEWS}-N; name the folder of the previews with --preview."
        )
    return OUTPUTS / f"{PREVIEWS}-{max(numbers)}"


def _render(given: Namespace, options) -> Path:
    if missing := [f"--{key}" for key in ("model", "prompt", "seed") if getattr(given, key) is None]:
        raise ValueError(f"{', '.join(missing)}: needed to make previews. --explain needs none of them.")
    output = given.output or next_output(PREVIEWS, suffix="")
    check_output(output / SHEET)
    from evaluation.rendering import load_pipeline
    from evaluation.single import solver_scheduler
    from solver.samplers.calls import text_length
    from solver.samplers.cascade import encoded_once
    from solver.samplers.latents import as_seeds
    from solver.samplers.preview import preview

    as_seeds((given.seed, given.seed + given.candidates - 1))  # raises before the work
    dtype = given.dtype or "float32"
    pipe = load_pipeline(given.model, dtype, given.device)
    call = text_length(pipe) | _guidance(pipe, given)
    if given.num_frames is not None:
        call["num_frames"] = given.num_frames
    if unknown := [f"--{name}" for name in call if name not in inspect.signature(pipe.__call__).parameters]:
        raise ValueError(f"{', '.join(unknown)}: not an argument of {type(pipe).__name__}.")
    scale = call.get("true_cfg_scale", call.get("guidance_scale", 1.0))
    stepper = solver_scheduler(given.solver, pipe.scheduler, scale) if given.solver else None
    size = {"height": given.height, "width": given.width}
    # What the previews have in common, in their PNGs and in previews.json.
    common = {"model": given.model, "prompt": given.prompt, "negative_prompt": given.negative_prompt, **size}
    common |= {"dtype": dtype, "solver": given.solver, **_numbers(call)}
    common = {name: value for name, value in common.items() if value is not None}
    for name in (FACTS, SHEET):  # of an earlier run: should this one be interrupted, they would be of other previews
        (output / name).unlink(missing_ok=True)
    shown = []
    with encoded_once(pipe):
        for number in range(1, given.candidates + 1):
            # One by one: a batch would differ from the picture's own run in the last bits.
            made = preview(pipe, given.prompt, given.seed + number - 1, options, stepper=stepper, **size, **call)
            made.checkpoint.save(output / str(number))
            of_this = {"seed": made.checkpoint.seed, "preview": number, "options": json.dumps(asdict(options))}
            save_picture(made.image, output / f"{number}.png", common | of_this)
            shown.append(made)
    facts = common | {"options": asdict(options), "versions": made.checkpoint.made_by["versions"]}
    facts["candidates"] = [{"seed": made.checkpoint.seed, **made.report} for made in shown]
    (output / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    sheet = output / SHEET
    proof_sheet([made.image for made in shown]).save(sheet)
    return sheet


def _guidance(pipe, given: Namespace) -> dict:
    """What the call says of guidance. Raises ValueError for what would be without effect."""
    from solver.samplers.calls import guidance, guides_by_true_cfg

    scale, true_cfg, negative = given.guidance_scale, given.true_cfg_scale, given.negative_prompt or ""
    if true_cfg is not None and guides_by_true_cfg(pipe):
        if scale is not None:
            raise ValueError("--guidance_scale, --true_cfg_scale: the same of this model; give one of them.")
        scale, true_cfg = true_cfg, None
    scale = GUIDANCE_SCALE if scale is None else scale
    if true_cfg is None:
        call = guidance(pipe, scale, [negative])
        return call | ({"negative_prompt": negative} if "negative_prompt" in call else {})
    if negative and true_cfg <= 1:
        raise ValueError(f"--true_cfg_scale {true_cfg:g}: a negative prompt needs more than 1.")
    return guidance(pipe, scale) | {"true_cfg_scale": true_cfg, "negative_prompt": negative}


def _numbers(call: dict) -> dict:
    """Guidance and frames of a call, the guidance under the name that the other commands remember it by."""
    numbers = {name: call[name] for name in ("guidance_scale", "true_cfg_scale", "num_frames") if name in call}
    if "guidance_scale" not in numbers and "true_cfg_scale" in numbers:
        numbers["guidance_scale"] = numbers.pop("true_cfg_scale")
    return numbers


def save_picture(image, path: Path, facts: dict) -> Path:
    """Writes a picture that remembers facts, or the frames of a video, as a GIF of the same name; returns the path."""
    from evaluation.single import save_png

    if not isinstance(image, list):
        save_png(image, path, facts)
        return path
    path = path.with_suffix(".gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    image[0].save(path, save_all=True, append_images=image[1:], duration=1000 // FRAMES_A_SECOND, loop=0)
    return path


def proof_sheet(images: list):
    """Numbered pictures in rows of four; of a video, its middle frame."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    from solver.contact_sheet import contact_sheet

    stills = [image[len(image) // 2] if isinstance(image, list) else image for image in images]
    numbered = {str(number): to_tensor(still)[None] for number, still in enumerate(stills, start=1)}
    keys = list(numbered)
    rows = [keys[start : start + SHEET_COLUMNS] for start in range(0, len(keys), SHEET_COLUMNS)]
    strips = [contact_sheet({key: numbered[key] for key in row}) for row in rows]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, i * strip.height))
    return sheet
