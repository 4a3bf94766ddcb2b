"""What one visitor has made: a folder of PNGs that nobody else is told of, the sheet, and the history.

Pictures and checkpoints wait on disk, so that a long visit takes no memory.
"""

import secrets
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evaluation.recipe import Recipe
from evaluation.single import save_png
from lighttable.table import Picture, Stopped
from solver.samplers.preview import Checkpoint

MOST_KEPT = 512  # pictures of a visit; the oldest are deleted


@dataclass(frozen=True)
class Kept:
    """A picture on disk.

    Attributes:
        path: of the PNG.
        recipe, facts, evaluations, seconds: as in `Picture`.
        has_checkpoint: whether its full-size run can go on.
    """

    path: Path
    recipe: Recipe
    facts: dict[str, str]
    evaluations: int
    seconds: float
    has_checkpoint: bool

    @property
    def name(self) -> str:
        """No other picture of the visit has it."""
        return self.path.stem

    def picture(self) -> Picture:
        """The picture, read back."""
        with Image.open(self.path) as image:
            pixels = image.convert("RGB")
        checkpoint = Checkpoint.load(_checkpoint_path(self.path)) if self.has_checkpoint else None
        return Picture(self.recipe, pixels, self.facts, self.evaluations, self.seconds, checkpoint)


class Visit:
    """One visitor's pictures.

    Args:
        output: folder in which the visit gets one of its own, with a name that cannot be guessed.
        session: gradio's name of the page.

    Attributes:
        folder: of its PNGs.
        sheet: the pictures of the last proof sheet, in order.
        refined: what has been refined of it, a `runs.Refined` each.
        history: all pictures, the oldest first.
        seen: the history as the page shows it, the newest first.
        stop: of the run that was last begun; set when it is to end.
    """

    def __init__(self, output: Path, session: str = ""):
        self.session = session
        self.folder = output / secrets.token_urlsafe(24)
        self.sheet: list[Kept] = []
        self.refined: list = []
        self.history: list[Kept] = []
        self.seen: list[Kept] = []
        self.stop = threading.Event()
        self._written, self._ended = 0, False

    def begin(self) -> threading.Event:
        """A new run; one that still goes on, or waits for its turn, ends."""
        self.stop.set()
        self.stop = threading.Event()
        return self.stop

    def keep(self, picture: Picture) -> Kept:
        """Writes a picture, and its checkpoint. Raises Stopped if the visit has ended."""
        if self._ended:
            raise Stopped
        self._written += 1
        path = self.folder / f"{self._written:03d}-{picture.recipe.method}-seed{picture.recipe.seed}.png"
        save_png(picture.image, path, picture.facts)
        if picture.checkpoint is not None:
            picture.checkpoint.save(_checkpoint_path(path))
        has_checkpoint = picture.checkpoint is not None
        kept = Kept(path, picture.recipe, picture.facts, picture.evaluations, picture.seconds, has_checkpoint)
        self.history.append(kept)
        needed = {one.path for one in self.sheet} | {one.path for pair in self.refined for one in pair[:2]}
        for old in [one for one in self.history[:-MOST_KEPT] if one.path not in needed]:
            self._delete(old)
            self.history.remove(old)
        return kept

    def look_back(self) -> list[Kept]:
        """The history, the newest first, as `seen` from now on."""
        self.seen = self.history[::-1]
        return self.seen

    def end(self) -> None:
        """The visitor is gone: the run stops, the files go."""
        self._ended = True
        self.stop.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _delete(self, kept: Kept) -> None:
        for path in self.folder.rglob(f"{kept.path.stem}.*"):
            path.unlink()


def _checkpoint_path(path: Path) -> Path:
    return path.parent / "checkpoints" / path.stem
