"""Pictures, depth and segmentation of scenes of the miniature world, at any size, batched.

Every solid is a signed distance field in its own coordinates p (in units of its radius, y down), so edges, stripes and
shadows are antialiased analytically and the same scene is the same picture at 64 and at 512 px. Fine texture is a sum
of octaves, of which a size shows those that it can resolve.

Shapes: S solids, B scenes, H height, W width.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from data.world import BACKGROUNDS, COLOURS, FINISHES, SHAPES

if TYPE_CHECKING:
    from data.world import Scene

_PIXELS_AT_ONCE = {"cpu": 1 << 18}  # keeps the intermediate maps of a chunk of scenes inside the cache
_PIXELS_ON_DEVICE = 1 << 23  # of a GPU: few and large kernels, some 2 GB of maps

_PAINT = torch.tensor(
    [
        (0.86, 0.13, 0.11),  # red
        (0.97, 0.53, 0.08),  # orange
        (0.96, 0.87, 0.14),  # yellow
        (0.13, 0.58, 0.17),  # green
        (0.13, 0.79, 0.84),  # cyan
        (0.13, 0.25, 0.84),  # blue
        (0.55, 0.16, 0.68),  # purple
        (0.95, 0.95, 0.95),  # white
    ]
)
_BACKDROP = {  # colour at the top and at the bottom of the picture
    "sky": ((0.36, 0.58, 0.88), (0.84, 0.91, 0.97)),
    "dusk": ((0.20, 0.16, 0.38), (0.89, 0.53, 0.40)),
    "sand": ((0.91, 0.83, 0.66), (0.73, 0.61, 0.42)),
    "studio": ((0.62, 0.62, 0.64), (0.32, 0.32, 0.35)),
    "brick": ((0.58, 0.31, 0.25), (0.50, 0.26, 0.21)),
    "grass": ((0.36, 0.52, 0.24), (0.25, 0.42, 0.16)),
}
_GROUND = ("sand", "grass")  # lie flat, and so come nearer towards the bottom; the others are walls
_LIGHT = (-0.45, -0.60)  # where light comes from, in the picture plane
_SHADOW_OFFSET, _SHADOW_SOFTNESS, _SHADOW_DARKNESS = 0.22, 0.35, 0.45


class Render(NamedTuple):
    """What `render` makes of a scene; `render_batch` puts a leading dimension B in front and channels first."""

    image: torch.Tensor
    depth: torch.Tensor
    segmentation: torch.Tensor


def render(scene: "Scene", size: int | tuple[int, int]) -> Render:
    """Renders one scene.

    Args:
        size: side in pixels, or (height, width). The unit square of the scene fits the shorter side, centred.

    Returns:
        `image` uint8 (H, W, 3), RGB; `depth` float32 (H, W), relative inverse depth in (0, 1], **nearer is larger**;
        `segmentation` int64 (H, W): 0 is background, 1 … 48 are shape × colour (`data.world.class_id`).

    Raises:
        ValueError: if a side is below 8 pixels.
    """
    batch = render_batch([scene], size)
    return Render(batch.image[0].permute(1, 2, 0).contiguous(), batch.depth[0], batch.segmentation[0])


def render_batch(scenes: list["Scene"], size: int | tuple[int, int], device: str | torch.device = "cpu") -> Render:
    """`render` for many scenes at once: image uint8 (B, 3, H, W), depth (B, H, W), segmentation (B, H, W)."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 8:
        raise ValueError(f"size={size} is too small: a scene needs at least 8 x 8 pixels.")
    step = max(1, _PIXELS_AT_ONCE.get(torch.device(device).type, _PIXELS_ON_DEVICE) // (height * width))
    chunks = [_render_chunk(scenes[i : i + step], height, width, device) for i in range(0, len(scenes), step)]
    return Render(*(torch.cat(maps) for maps in zip(*chunks, strict=True)))


def _render_chunk(scenes: list["Scene"], height: int, width: int, device: str | torch.device) -> Render:
    pixel = 1.0 / min(height, width)
    y_H1 = ((torch.arange(height, device=device) + 0.5) * pixel - (height * pixel - 1) / 2)[:, None]
    x_1W = ((torch.arange(width, device=device) + 0.5) * pixel - (width * pixel - 1) / 2)[None]

    rgb_B3HW, depth_BHW = _backgrounds(scenes, x_1W, y_H1, pixel)
    classes_BHW = torch.zeros_like(depth_BHW, dtype=torch.int64)
    solids = [(b, layer, solid) for b, scene in enumerate(scenes) for layer, solid in enumerate(scene.solids)]
    look = _Solids([solid for _, _, solid in solids], x_1W, y_H1, pixel)
    class_S = torch.tensor([solid.class_id for _, _, solid in solids], device=device)

    for layer in range(max((layer for _, layer, _ in solids), default=-1) + 1):  # farthest first
        s = torch.tensor([i for i, (_, at, _) in enumerate(solids) if at == layer], device=device)
        b = torch.tensor([b for b, at, _ in solids if at == layer], device=device)
        cover, shadow = look.cover_SHW[s], look.shadow_SHW[s]
        lit = rgb_B3HW[b] * (1 - _SHADOW_DARKNESS * shadow)[:, None]
        rgb_B3HW[b] = torch.lerp(lit, look.rgb_S3HW[s], cover[:, None])
        front = cover > 0.5
        depth_BHW[b] = torch.where(front, look.depth_SHW[s], depth_BHW[b])
        classes_BHW[b] = torch.where(front, class_S[s, None, None], classes_BHW[b])
    image = (rgb_B3HW * 255 + 0.5).clamp_(0, 255).to(torch.uint8)
    return Render(image, depth_BHW, classes_BHW)


# ---------------------------------------------------------------------------------------------------- solids


class _Solids:
    """Coverage, shadow, colour and depth of every solid on the whole picture."""

    def __init__(self, solids, x_1W: torch.Tensor, y_H1: torch.Tensor, pixel: float):
        device = x_1W.device
        numbers = [(s.x, s.y, s.radius, math.cos(s.tilt), math.sin(s.tilt)) for s in solids]
        x, y, r, cos, sin = torch.tensor(numbers, device=device).reshape(-1, 5).T[:, :, None, None]
        shapes = torch.tensor([SHAPES.index(s.shape) for s in solids], device=device)
        finishes = torch.tensor([FINISHES.index(s.finish) for s in solids], device=device)
        paint_S311 = _PAINT.to(device)[[COLOURS.index(s.colour) for s in solids]][:, :, None, None]

        def local(dx, dy):
            u, v = (x_1W - x - dx) / r, (y_H1 - y - dy) / r
            return cos * u + sin * v, cos * v - sin * u

        px, py = local(0.0, 0.0)
        qx, qy = local(_SHADOW_OFFSET * r, _SHADOW_OFFSET * r)
        distance, shade, bulge = (torch.empty_like(px) for _ in range(3))
        shadow_distance = torch.empty_like(px)
        for index, shape in enumerate(SHAPES):
            s = (shapes == index).nonzero()[:, 0]
            if len(s):
                distance[s] = _DISTANCE[shape](px[s], py[s])
                shadow_distance[s] = _DISTANCE[shape](qx[s], qy[s])
                shade[s], bulge[s] = _SHADE[shape](px[s], py[s], distance[s])

        w = pixel / r  # a pixel in units of the radius
        self.cover_SHW = (0.5 - distance / w).clamp_(0, 1)
        soft = (0.5 - shadow_distance / (2 * _SHADOW_SOFTNESS)).clamp_(0, 1)
        self.shadow_SHW = soft * soft * (3 - 2 * soft)
        self.depth_SHW = (0.35 + 0.5 * y + 0.25 * r * bulge).clamp_(0, 1)
        dark = torch.zeros_like(px)
        for index, pattern in ((1, _stripes), (2, _dots)):
            s = (finishes == index).nonzero()[:, 0]
            if len(s):
                dark[s] = pattern(px[s], py[s], w[s])
        shine = (shade - 1).clamp_(min=0)[:, None]
        matte = paint_S311 * (shade.clamp(max=1) * (1 - 0.5 * dark))[:, None]
        self.rgb_S3HW = matte + shine * (1 - matte)


def _ball_distance(x, y):
    return torch.hypot(x, y) - 0.95


def _cube_distance(x, y):
    """A hexagon that stands on a corner: a cube seen along its diagonal."""
    x, y = x.abs(), y.abs()
    return torch.maximum(x, 0.5 * x + 0.8660254 * y) - 0.86


def _cone_distance(x, y):
    """A triangle with its apex up, on an ellipse."""
    sides = (x.abs() * 1.62 - (y + 0.98)) / 1.904
    triangle = torch.maximum(sides, y - 0.55)
    ellipse = (torch.hypot(x / 0.945, (y - 0.55) / 0.30) - 1) * 0.30
    return torch.minimum(triangle, ellipse)


def _ring_distance(x, y):
    return (torch.hypot(x, y) - 0.70).abs() - 0.27


def _star_distance(x, y):
    """Five points: the plane is folded into a tenth, where the outline is one line."""
    sector = math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    rho = torch.hypot(x, y)
    u, v = rho * torch.cos(folded), rho * torch.sin(folded)
    (u0, v0), inner = (1.02, 0.0), 0.50
    u1, v1 = inner * math.cos(sector), inner * math.sin(sector)
    length = math.hypot(u1 - u0, v1 - v0)
    return ((u - u0) * (v1 - v0) - (v - v0) * (u1 - u0)) / length


def _cross_distance(x, y):
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 0.92, torch.minimum(x, y) - 0.33)


def _ball_shade(x, y, distance):
    z = (1 - (x * x + y * y) / 0.9025).clamp_(min=0).sqrt_()
    lambert = (0.66 * z + _LIGHT[0] * x + _LIGHT[1] * y).clamp_(min=0)
    return 0.42 + 0.62 * lambert + 0.45 * (lambert - 0.82).clamp_(min=0) / 0.18, z


def _cube_shade(x, y, distance):
    right = x > 0
    top = y < -0.57735 * x.abs()
    bulge = 1 - torch.hypot(x, y)
    return torch.where(top, 1.12, torch.where(right, 0.52, 0.80)), bulge.clamp_(min=0)


def _cone_shade(x, y, distance):
    width = ((y + 0.98) / 1.62).clamp_(min=0.05)
    across = (x / width).clamp_(-1, 1)
    return 0.86 - 0.36 * across + 0.20 * (0.25 - (across + 0.4).abs()).clamp_(min=0) * 4, (1 - across * across) * width


def _ring_shade(x, y, distance):
    rho = torch.hypot(x, y).clamp_(min=1e-3)
    slope = ((rho - 0.70) / 0.27).clamp_(-1, 1)  # -1 at the inner, 1 at the outer edge of the tube
    towards_light = (x * _LIGHT[0] + y * _LIGHT[1]) / rho
    z = (1 - slope * slope).sqrt()
    return 0.50 + 0.42 * z + 0.42 * slope * towards_light, 0.5 * z


def _star_shade(x, y, distance):
    """Ten facets, ridges from the centre: lighter where they face the light."""
    sector = math.pi / 5
    angle = torch.atan2(x, -y)
    facet = (torch.div(angle, sector, rounding_mode="floor") + 0.5) * sector
    facing = torch.sin(facet) * _LIGHT[0] - torch.cos(facet) * _LIGHT[1]
    side = torch.where(torch.remainder(torch.div(angle, sector, rounding_mode="floor"), 2) == 0, 0.10, -0.10)
    return 0.82 + 0.22 * facing + side, (-distance).clamp(min=0)


def _cross_shade(x, y, distance):
    """A flat face with a bevelled rim."""
    rim = (1 + distance / 0.14).clamp(0, 1)
    horizontal = x.abs() > y.abs()
    facing = torch.where(horizontal, x.sign() * _LIGHT[0], y.sign() * _LIGHT[1])
    return 0.92 + 0.45 * rim * facing, 0.4 * (1 - rim)


_DISTANCE = {
    "ball": _ball_distance,
    "cube": _cube_distance,
    "cone": _cone_distance,
    "ring": _ring_distance,
    "star": _star_distance,
    "cross": _cross_distance,
}
_SHADE = {
    "ball": _ball_shade,
    "cube": _cube_shade,
    "cone": _cone_shade,
    "ring": _ring_shade,
    "star": _star_shade,
    "cross": _cross_shade,
}


def _stripes(x, y, w):
    """Slanted dark stripes, box-filtered to a pixel of width w; 0 to 1."""
    period = 0.62
    phase = torch.remainder(0.6 * x + 0.8 * y, period)
    return (0.5 + (period / 4 - (phase - period / 2).abs()) / w).clamp_(0, 1)


def _dots(x, y, w):
    """Dark dots on a square lattice, 0 to 1."""
    period = 0.62
    u, v = (torch.remainder(z + period / 2, period) - period / 2 for z in (x, y))
    return (0.5 + (0.19 - torch.hypot(u, v)) / w).clamp_(0, 1)


# ----------------------------------------------------------------------------------------------- backgrounds


def _backgrounds(scenes, x_1W, y_H1, pixel):
    """RGB (B, 3, H, W) and depth (B, H, W) of the empty scenes."""
    device = x_1W.device
    top, bottom = (
        torch.tensor([_BACKDROP[scene.background][end] for scene in scenes], device=device)[:, :, None, None]
        for end in (0, 1)
    )
    texture_B = torch.tensor([scene.texture for scene in scenes], device=device)
    brightness = 0.92 + 0.16 * _hash(texture_B, 1)[:, None, None, None]
    down_HW = y_H1.clamp(0, 1).expand(len(y_H1), x_1W.shape[1])
    rgb_B3HW = torch.lerp(top, bottom, down_HW) * brightness
    ground_B11 = torch.tensor([scene.background in _GROUND for scene in scenes], device=device)[:, None, None]
    depth_BHW = torch.where(ground_B11, 0.15 + 0.25 * down_HW, 0.15)

    for kind, paint in (("studio", _vignette), ("sand", _grain), ("brick", _bricks), ("grass", _blades)):
        b = torch.tensor([i for i, scene in enumerate(scenes) if scene.background == kind], device=device)
        if len(b):
            rgb_B3HW[b] = rgb_B3HW[b] * paint(texture_B[b], x_1W, y_H1, pixel)
    return rgb_B3HW, depth_BHW


def _vignette(texture_B, x_1W, y_H1, pixel):
    centre = 0.3 + 0.4 * _hash(texture_B, 2)[:, None, None]
    return (1.12 - 0.5 * ((x_1W - centre) ** 2 + (y_H1 - 0.35) ** 2))[:, None]


def _grain(texture_B, x_1W, y_H1, pixel):
    """Sand: dunes, and grains that only a large picture shows."""
    dunes = _octave(texture_B, 3, x_1W, y_H1, (12, 3), pixel)
    grains = _octave(texture_B, 4, x_1W, y_H1, (140, 140), pixel) + _octave(
        texture_B, 5, x_1W, y_H1, (300, 300), pixel
    )
    return (1 + 0.10 * dunes + 0.16 * grains)[:, None]


def _blades(texture_B, x_1W, y_H1, pixel):
    """Grass: upright streaks in four octaves, the fine ones for large pictures."""
    octaves = ((7, 16, 0.22), (16, 40, 0.22), (36, 100, 0.30), (80, 230, 0.30))
    streaks = sum(
        amplitude * _octave(texture_B, 6 + i, x_1W, y_H1, (rows, columns), pixel)
        for i, (rows, columns, amplitude) in enumerate(octaves)
    )
    tint = torch.tensor([1.0, 0.8, 0.9], device=x_1W.device)[:, None, None]
    return 1 + tint * streaks[:, None]


def _bricks(texture_B, x_1W, y_H1, pixel):
    """A wall of staggered bricks with light mortar; every brick has a tint, and pores in large pictures."""
    rows, columns, joint = 8, 4, 0.011
    v = y_H1 * rows
    row = v.floor()
    u = x_1W * columns + 0.5 * torch.remainder(row, 2)
    column = u.floor()
    to_joint = torch.minimum(
        (0.5 - (torch.remainder(u, 1) - 0.5).abs()) / columns, (0.5 - (torch.remainder(v, 1) - 0.5).abs()) / rows
    )
    mortar_HW = (0.5 + (joint - to_joint) / max(pixel, 0.006)).clamp_(0, 1)
    brick_HW = ((row + 64) * 256 + column + 64).long()
    tint_BHW = 0.86 + 0.28 * _hash(texture_B[:, None, None] + brick_HW * 7919, 11)
    pores = _octave(texture_B, 12, x_1W, y_H1, (90, 60), pixel) + _octave(texture_B, 13, x_1W, y_H1, (220, 180), pixel)
    stone = torch.tensor([1.35, 2.2, 2.5], device=x_1W.device)[:, None, None]
    face = (tint_BHW + 0.22 * pores)[:, None]
    return torch.lerp(face, stone, mortar_HW)


def _octave(texture_B, channel: int, x_1W, y_H1, cells: tuple[int, int], pixel: float):
    """Value noise in [-0.5, 0.5] (B, H, W) with (rows, columns) cells to the unit square.

    Fades out where a cell gets smaller than two pixels, and costs nothing where it would vanish.
    """
    rows, columns = cells
    resolved = min(max(1.0 / (max(cells) * pixel) - 1.0, 0.0), 1.0)
    if resolved == 0.0:
        return torch.zeros(())
    y_at, x_at = y_H1 * rows, x_1W * columns
    y0, x0 = int(y_at.min().floor()), int(x_at.min().floor())
    lattice_rows = torch.arange(y0, int(y_at.max().floor()) + 2, device=x_1W.device)
    lattice_columns = torch.arange(x0, int(x_at.max().floor()) + 2, device=x_1W.device)
    points = (lattice_rows[:, None] + 4096) * 8192 + lattice_columns + 4096
    lattice_B1hw = _hash(texture_B[:, None, None] + points * 7919, channel)[:, None] - 0.5
    grid_y = (y_at - y0) / (len(lattice_rows) - 1) * 2 - 1
    grid_x = (x_at - x0) / (len(lattice_columns) - 1) * 2 - 1
    grid_HW2 = torch.stack([grid_x.expand(len(grid_y), -1), grid_y.expand(-1, grid_x.shape[1])], dim=-1)
    grid_BHW2 = grid_HW2.expand(len(texture_B), -1, -1, -1)
    return resolved * F.grid_sample(lattice_B1hw, grid_BHW2, align_corners=True)[:, 0]


def _hash(x: torch.Tensor, channel: int) -> torch.Tensor:
    """A number in [0, 1) for each integer: the same on every device."""
    x = (x * 0x9E3779B1 + channel * 0x85EBCA77) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return ((x ^ (x >> 15)) & 0xFFFFFF).float() / 0x1000000


assert tuple(_BACKDROP) == BACKGROUNDS and tuple(_DISTANCE) == SHAPES
