"""HiFlow's table and contact sheet, from what was seen of each row."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.hiflow_measures import estimates
from benchmarks.hiflow_rows import BICUBIC, DIRECT, FULL, STOCK
from evaluation.contact_sheet import FAINT, GAP, INK, MARGIN, PAPER

RENDERED, OTHERS = "rendered", "other scenes"
COLUMNS = {  # name -> heading, digits, factor
    "frechet": ("Fréchet ↓", 2, 1),
    "frechet_patches": ("Fréchet, patches ↓", 2, 1),
    "caption_check": ("caption check, % ↑", 1, 100),
    "low_band": ("low band ↑", 4, 1),
    "wide_band": ("wide band ↑", 4, 1),
    "edge_sharpness": ("edge sharpness ↑", 3, 1),
}
TILE, CAPTION, HEAD = 256, 170, 40  # pixels


def summary(seen: dict[str, dict[str, Tensor]], size: int) -> dict[str, dict]:
    """The numbers of each row at a size: value, its interval, and the paired difference to the full method.

    Distances are to the rendered scenes of other captions. With as few pictures as here they are far above 0 for any
    two sets of true pictures; so the row of the captions' own scenes, rendered, is what a faultless model would have.
    """
    here = {name: _at(size, row) for name, row in seen.items()}
    reference = here.pop(OTHERS)
    numbers = {name: estimates(row, reference) for name, row in here.items()}
    report = {}
    for row, values in numbers.items():
        report[row] = {}
        for name, estimate in values.items():
            less = estimate - numbers[FULL][name]
            difference = {} if row == FULL else {"minus_full": less.value, "minus_full_ci95": less.ci95}
            report[row][name] = {"value": estimate.value, "ci95": estimate.ci95, **difference}
    return report


def _at(size: int, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{size}."): value for key, value in seen.items() if key.startswith(f"{size}.")}


def table(report: dict) -> str:
    """A Markdown table a size; in brackets the 95 % interval of the row less the full method."""
    parts = [f"# HiFlow on {report['model']}, {report['sizes'][0]} px and larger", _explained(report)]
    for size, rows in report["results"].items():
        costs = {row: value for row, value in report["gflops"][size].items() if value is not None}
        head = ["row", *(heading for heading, _, _ in COLUMNS.values()), *(["GFLOPs"] if costs else [])]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += [
            "| " + " | ".join([row, *(_cell(name, values) for name in COLUMNS), *_cost(costs, row)]) + " |"
            for row, values in rows.items()
        ]
        parts += [f"## {size} px", "\n".join(lines)]
    return "\n\n".join(parts)


def _explained(report: dict) -> str:
    """What the rows and columns that are there mean."""
    rows = next(iter(report["results"].values()))
    looked_at = " and ".join(f"{size} ({name})" for name, size in report["looked_at"].items())
    said = [
        f"{report['num_prompts']} captions of test scenes, preset {report['preset']}, guidance "
        f"{report['guidance_scale']}; in brackets the 95 % interval of the row less `{FULL}`, of a paired bootstrap "
        "over captions. Distances are to the rendered scenes of as many other captions; the captions' own, the row "
        f"`{RENDERED}`, is what a faultless model would have. The networks look at {looked_at} pixels a side: whole "
        "pictures are shrunk to that, patches are cut out. Low band: correlation with the shared run's base picture "
        "in the band that is aligned; wide band: in one as many times as wide as a latent has pixels."
    ]
    if any(name.startswith(f"{FULL}, ") for name in rows):
        said.append(
            "Rows in other numbers of steps have bases of their own, and how far those are from the shared one counts "
            "here too."
        )
    if any(value is not None for costs in report["gflops"].values() for value in costs.values()):
        said.append(
            "GFLOPs: of one branch of the network, at this size, for one picture. "
            f"`{DIRECT}` has the recipe's changes inside the network."
        )
    if STOCK in rows:
        said.append(f"`{STOCK}` is the pipeline's own call.")
    said.append(f"On {report['device']}, {report['dtype']}, torch {report['torch']}, diffusers {report['diffusers']}.")
    return " ".join(said)


def _cost(costs: dict[str, float], row: str) -> list[str]:
    """Its cell, where the network's cost is counted at all; scenes that are rendered have none."""
    return [f"{costs[row]:.2f}" if row in costs else ""] if costs else []


def _cell(name: str, values: dict[str, dict]) -> str:
    if name not in values:
        return ""
    _, digits, factor = COLUMNS[name]
    number = f"{round(factor * values[name]['value'], digits) + 0.0:.{digits}f}"  # no minus zero
    if "minus_full_ci95" not in values[name]:
        return f"**{number}**"
    low, high = (f"{factor * end:+.{digits}f}" for end in values[name]["minus_full_ci95"])
    return f"{number} [{low}, {high}]"


def draw_sheet(seen: dict[str, dict[str, Tensor]], size: int, prompts: Sequence[str], path: Path) -> None:
    """Base, bicubic, direct, full and the rendered scene, a row a prompt; pixels stay pixels where a tile has room."""
    columns = {"base": seen[BICUBIC]["base.shown"]}
    columns |= {name: seen[name][f"{size}.shown"] for name in (BICUBIC, DIRECT, FULL, RENDERED)}
    rows = min(len(prompts), len(columns["base"]))
    width = 2 * MARGIN + CAPTION + len(columns) * (TILE + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + rows * (TILE + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(columns.items()):
        x = MARGIN + CAPTION + i * (TILE + GAP)
        title = ImageFont.load_default(17)
        draw.text((x, MARGIN), name, INK, title)
        after = x + draw.textlength(name, title) + 8
        draw.text((after, MARGIN + 4), f"{pictures.shape[-1]} px", FAINT, ImageFont.load_default(12))
        for row in range(rows):
            sheet.paste(_tile(pictures[row]), (x, MARGIN + HEAD + row * (TILE + GAP)))
    for row in range(rows):
        words = "\n".join(textwrap.wrap(prompts[row], 25))
        draw.multiline_text((MARGIN, MARGIN + HEAD + row * (TILE + GAP)), words, INK, ImageFont.load_default(12))
    sheet.save(path)


def _tile(image_CHW: Tensor) -> Image.Image:
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    sampling = Image.Resampling.NEAREST if picture.width <= TILE else Image.Resampling.LANCZOS
    return picture.resize((TILE, TILE), sampling)
