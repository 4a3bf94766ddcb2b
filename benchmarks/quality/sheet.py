"""The contact sheet: a prompt a row, a column for each row of the table that wants to be seen, the full run first."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.quality.study import Measured
from evaluation.rendering import Samples

TILE, GAP, MARGIN, CAPTION, HEAD = 128, 8, 20, 190, 52
INK, FAINT, PAPER = "#1d232a", "#6b7680", "#ffffff"


def draw_sheet(measured: Sequence[Measured], samples: Samples, path: Path, prompts: int = 8) -> None:
    """Writes a PNG file with the first prompts; the seeds of one prompt count as one each."""
    columns = [one for i, one in enumerate(measured) if i == 0 or one.row.in_sheet]
    prompts = min(prompts, len(samples.prompts))
    width = 2 * MARGIN + CAPTION + len(columns) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + prompts * (TILE + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, one in enumerate(columns):
        x = MARGIN + CAPTION + i * (TILE + GAP)
        name = "\n".join(textwrap.wrap(one.row.name, 19)[:3])
        draw.multiline_text((x, MARGIN + HEAD - 8), name, INK, _font(13), anchor="ld", spacing=2)
        for n in range(prompts):
            sheet.paste(_tile(one.images[n]), (x, MARGIN + HEAD + n * (TILE + GAP)))
    for n in range(prompts):
        y = MARGIN + HEAD + n * (TILE + GAP)
        draw.multiline_text((MARGIN, y), "\n".join(textwrap.wrap(samples.prompts[n], 28)[:6]), INK, _font(12))
        draw.text((MARGIN, y + TILE), f"seed {samples.seeds[n]}", FAINT, _font(11), anchor="ld")
    sheet.save(path)


def _tile(image_CHW: Tensor) -> Image.Image:
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    return picture.resize((TILE, TILE), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
