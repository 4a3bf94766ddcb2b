"""What a scene of the miniature world is made of, and how one is drawn from a seed.

A scene is a background and one to four solids. Everything lives in the unit square (x to the right, y down); a picture
that is not square shows more background. A solid that stands lower in the picture is nearer.

Three splits share the world and nothing else: a scene belongs to the split that its *combination* (background, and
what solids there are) hashes to, `HELD_OUT_PAIRS` of shape and colour never occur in training, and the random streams
of the splits differ.
"""

import math
import random
import zlib
from dataclasses import dataclass, replace

SHAPES = ("ball", "cube", "cone", "ring", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
FINISHES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = ("sky", "dusk", "sand", "studio", "brick", "grass")
SPLITS = ("train", "validation", "test")

# One pair per shape, each of another colour: a solid never seen in training, of a shape and a colour seen often.
HELD_OUT_PAIRS = frozenset(
    {("ball", "cyan"), ("cube", "purple"), ("cone", "red"), ("ring", "yellow"), ("star", "white"), ("cross", "green")}
)

NUM_CLASSES = 1 + len(SHAPES) * len(COLOURS)  # class 0 is the background

_RADIUS = {"small": (0.12, 0.14), "large": (0.20, 0.23)}
_LAYOUTS = (  # number of solids in each group of equal ones, and how often
    ((1,), 30),
    ((1, 1), 32),
    ((2,), 9),
    ((3,), 7),
    ((4,), 4),
    ((2, 1), 8),
    ((2, 2), 2),
    ((1, 1, 1), 8),
)


@dataclass(frozen=True)
class Solid:
    """One solid: what it is, and where.

    `x`, `y` are the centre and `radius` half the extent, in units of the picture's shorter side; `tilt` is in radians.
    """

    shape: str
    colour: str
    size: str
    finish: str
    x: float
    y: float
    radius: float
    tilt: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.colour

    @property
    def class_id(self) -> int:
        """Class in a segmentation map: 1 … 48."""
        return class_id(self.shape, self.colour)


@dataclass(frozen=True)
class Scene:
    """A background and its solids, farthest first. `texture` seeds what is random in the background's look."""

    background: str
    solids: tuple[Solid, ...]
    texture: int

    @classmethod
    def random(cls, seed: int, split: str = "train") -> "Scene":
        """Draws the scene number `seed` of a split: a pure function of both.

        Raises:
            ValueError: if `split` is not one of `SPLITS`.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
        rng = random.Random(f"{split}:{int(seed)}")
        while True:
            background = rng.choice(BACKGROUNDS)
            groups = _draw_groups(rng)
            if split_of(background, [group[:2] for group in groups for _ in range(group[-1])]) != split:
                continue
            solids = _place(groups, rng)
            if solids is not None:
                return cls(background, solids, rng.getrandbits(31))

    @property
    def split(self) -> str:
        """The split that this scene's combination belongs to."""
        return split_of(self.background, [solid.pair for solid in self.solids])

    def groups(self) -> list[list[Solid]]:
        """Solids that are alike (shape and colour), larger groups last: what a caption counts."""
        found: dict[tuple[str, str], list[Solid]] = {}
        for solid in self.solids:
            found.setdefault(solid.pair, []).append(solid)
        return sorted(found.values(), key=len)


def class_id(shape: str, colour: str) -> int:
    return 1 + SHAPES.index(shape) * len(COLOURS) + COLOURS.index(colour)


def split_of(background: str, pairs: list[tuple[str, str]]) -> str:
    """The split of a combination: eight in ten train, one validation, one test; held-out pairs never train."""
    combination = background + "|" + ",".join(sorted(f"{colour} {shape}" for shape, colour in pairs))
    bucket = zlib.crc32(combination.encode()) % 10
    if HELD_OUT_PAIRS.intersection(pairs):
        return SPLITS[1 + bucket % 2]
    return SPLITS[max(bucket - 7, 0)]


def fits(solid: Solid, others: tuple[Solid, ...] | list[Solid]) -> bool:
    """Whether a solid may stand among others: inside the picture, apart from its like, and at most touching one other.

    Solids that are alike keep a gap, so that they can be counted; different ones may overlap by a fifth, which hides
    little and cuts nothing in two.
    """
    margin = solid.radius + 0.01
    if not (margin <= solid.x <= 1 - margin and margin <= solid.y <= 1 - margin):
        return False
    overlaps = 0
    for other in others:
        reach = solid.radius + other.radius
        distance = math.hypot(solid.x - other.x, solid.y - other.y)
        if distance < (1.1 * reach + 0.03 if solid.pair == other.pair else 0.8 * reach):
            return False
        overlaps += distance < reach
    return overlaps <= 1 and (not overlaps or len(others) <= 2)


def place(solid: Solid, others: list[Solid], rng: random.Random, tries: int = 40) -> Solid | None:
    """Moves a solid to a random free place, or returns None where none was found."""
    margin = solid.radius + 0.01
    for _ in range(tries):
        moved = replace(solid, x=rng.uniform(margin, 1 - margin), y=rng.uniform(margin, 1 - margin))
        if fits(moved, others):
            return moved
    return None


def nearest_last(solids: list[Solid]) -> tuple[Solid, ...]:
    return tuple(sorted(solids, key=lambda solid: (solid.y, solid.x)))


def new_solid(shape: str, colour: str, size: str, finish: str, rng: random.Random) -> Solid:
    """A solid of exact radius and tilt that has no place yet."""
    return Solid(shape, colour, size, finish, 0.5, 0.5, rng.uniform(*_RADIUS[size]), rng.uniform(-0.25, 0.25))


def _draw_groups(rng: random.Random) -> list[tuple[str, str, str, str, int]]:
    """(shape, colour, size, finish, count) of each group; no two groups share shape and colour."""
    layouts, weights = zip(*_LAYOUTS, strict=True)
    counts = rng.choices(layouts, weights)[0]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < len(counts):
        pair = (rng.choice(SHAPES), rng.choice(COLOURS))
        if pair not in pairs:
            pairs.append(pair)
    room_for_large = 2 if sum(counts) <= 2 else 1 if sum(counts) == 3 else 0
    groups = []
    for (shape, colour), count in zip(pairs, counts, strict=True):
        size = rng.choice(SIZES) if count <= room_for_large else "small"
        room_for_large -= count * (size == "large")
        finish = rng.choices(FINISHES, (2, 1, 1))[0]
        groups.append((shape, colour, size, finish, count))
    return groups


def _place(groups: list[tuple[str, str, str, str, int]], rng: random.Random) -> tuple[Solid, ...] | None:
    placed: list[Solid] = []
    for shape, colour, size, finish, count in groups:
        for _ in range(count):
            solid = place(new_solid(shape, colour, size, finish, rng), placed, rng)
            if solid is None:
                return None
            placed.append(solid)
    return nearest_last(placed)
