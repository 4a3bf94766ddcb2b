"""The contact sheet: rows of prompts, a column for every solver and number of steps, the full-step picture last.

Edits have their sources in front.

Shape suffixes: H W.
"""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from data.prompts import source_picture
from evaluation.report import FULL, Measured, Results

TILE = 112  # pixels
GAP, GROUP_GAP, MARGIN, CAPTION, HEAD = 4, 20, 20, 190, 58
SOURCE = "source"
INK, FAINT, ACCENT, PAPER = "#1d232a", "#6b7680", "#d1495b", "#ffffff"


def draw_contact_sheet(results: Results, path: Path) -> None:
    """Writes the sheet: one block of rows a guidance scale."""
    blocks = [(measured, _groups(measured, results)) for measured in _by_guidance(results)]
    rows = results.config.sheet_rows
    width = max(_width(groups) for _, groups in blocks)
    block_height = HEAD + rows * (TILE + GAP) + GROUP_GAP
    sheet = Image.new("RGB", (width, MARGIN + len(blocks) * block_height), PAPER)
    for i, (measured, groups) in enumerate(blocks):
        _draw_block(sheet, MARGIN + i * block_height, measured, groups, rows)
    sheet.save(path)


def _by_guidance(results: Results) -> list[Measured]:
    """All cells of a guidance scale by their steps; columns of one guidance scale begin with the same prompts."""
    merged = []
    for guidance in results.config.guidance_scales:
        here = [measured for measured in results.measured if measured.task.samples.guidance_scale == guidance]
        most = max(here, key=lambda measured: len(measured.task.samples.prompts))
        cells = [cell for measured in here for cell in measured.cells]
        merged.append(Measured(most.task, sorted(cells, key=lambda cell: cell.steps)))
    return merged


def _groups(measured: Measured, results: Results) -> list[tuple[str, list[tuple[int | None, torch.Tensor]]]]:
    """Solver -> its (steps, pictures), in the order of the config; sources first, the full-step pictures last."""
    config = results.config
    names = [name for name in config.sheet_solvers if any(cell.solver == name for cell in measured.cells)]
    names = names or list(dict.fromkeys(cell.solver for cell in measured.cells))[:3]
    images = measured.task.target.images
    sources = (measured.task.samples.sources or ())[: config.sheet_rows]
    drawn = [source_picture(source, *images.shape[-2:]) for source in sources]
    groups = [(SOURCE, [(None, drawn)])] if drawn else []
    for name in names:
        cells = [cell for cell in measured.cells if cell.solver == name]
        chosen = [cell for cell in cells if cell.steps in config.sheet_steps] or cells
        groups.append((name, [(cell.steps, cell.images) for cell in chosen]))
    return [*groups, (FULL, [(config.num_inference_steps, images)])]


def _width(groups: list) -> int:
    tiles = sum(len(columns) for _, columns in groups)
    return 2 * MARGIN + CAPTION + tiles * (TILE + GAP) + len(groups) * GROUP_GAP


def _draw_block(sheet: Image.Image, top: int, measured: Measured, groups: list, rows: int) -> None:
    draw = ImageDraw.Draw(sheet)
    samples = measured.task.samples
    draw.text((MARGIN, top), f"guidance {samples.guidance_scale:g}", INK, _font(17))
    for row in range(min(rows, len(samples.prompts))):
        y = top + HEAD + row * (TILE + GAP)
        words = textwrap.wrap(samples.prompts[row], 29)[:5]
        draw.multiline_text((MARGIN, y + 4), "\n".join(words), INK, _font(12), spacing=3)
        draw.text((MARGIN, y + TILE - 18), f"seed {samples.seeds[row]}", FAINT, _font(11))
    x = MARGIN + CAPTION
    for name, columns in groups:
        x += GROUP_GAP
        right = x + len(columns) * (TILE + GAP) - GAP
        colour = ACCENT if name == "learned" else INK
        draw.text((x, top), "full steps" if name == FULL else name, colour, _font(17))
        draw.line((x, top + 27, right, top + 27), colour, 2)
        for steps, images in columns:
            if steps is not None:
                draw.text((x + TILE / 2, top + 43), f"{steps} steps", FAINT, _font(12), anchor="mm")
            for row in range(min(rows, len(images))):
                sheet.paste(_tile(images[row]), (x, top + HEAD + row * (TILE + GAP)))
            x += TILE + GAP
        x -= GAP


def _tile(image_CHW: torch.Tensor) -> Image.Image:
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
