"""Contact sheets: the same pictures by several hands, side by side."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 4
SMALLEST = 128  # pixels; smaller pictures are enlarged by a whole factor


def contact_sheet(columns: Mapping[str, Tensor]) -> Image.Image:
    """One column a name, one row a picture.

    Args:
        columns: title -> (B, 3, H, W) float in [0, 1]; the same shape everywhere.
    """
    pictures_CBHWD = torch.stack([_enlarge(images) for images in columns.values()])
    _, rows, height, width, _ = pictures_CBHWD.shape
    font = ImageFont.load_default(size=max(12, width // 10))
    header = 2 * MARGIN + sum(font.getmetrics())
    size = (len(columns) * (width + MARGIN) + MARGIN, header + rows * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(columns):
        left = MARGIN + c * (width + MARGIN)
        draw.text((left, MARGIN), title, fill="black", font=font)
        for b in range(rows):
            sheet.paste(Image.fromarray(pictures_CBHWD[c, b].numpy()), (left, header + b * (height + MARGIN)))
    return sheet


def save_contact_sheet(columns: Mapping[str, Tensor], path: Path) -> None:
    """Writes `contact_sheet(columns)` as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns).save(path)


def _enlarge(images_BCHW: Tensor) -> Tensor:
    """uint8 (B, H, W, C), on the CPU."""
    factor = max(1, SMALLEST // images_BCHW.shape[-1])
    images = F.interpolate(images_BCHW.float().cpu(), scale_factor=factor, mode="nearest")
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
