"""What one visitor has made: a folder of PNGs that nobody else is told of, the sheet, and the history.

Pictures and checkpoints wait on disk, so that a long visit takes no memory. A visit ends an hour after its page was
closed, or a day after it was last heard of, when somebody arrives; all of them end with the server.
"""

import atexit
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evaluation.recipe import Recipe
from evaluation.single import save_png
from lighttable.table import Picture, Stopped
from solver.samplers.preview import Checkpoint

MOST_KEPT = 512  # pictures of a visit; the oldest are deleted
MOST_VISITS = 256
CLOSED_SECONDS, SILENT_SECONDS = 3600, 24 * 3600  # after which a visit ends: of a closed page, of one that is open


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

    Attributes:
        folder: of its PNGs.
        sheet: the pictures of the last proof sheet, in order.
        refined: what has been refined of it, a `runs.Refined` each.
        history: all pictures, the oldest first.
        seen: the history as the page shows it, the newest first.
        running: name and stop of the run that goes on.
    """

    def __init__(self, output: Path):
        self.folder = output / secrets.token_urlsafe(24)
        self.sheet: list[Kept] = []
        self.refined: list = []
        self.history: list[Kept] = []
        self.seen: list[Kept] = []
        self.running: tuple[str, threading.Event] | None = None
        self._tickets: dict[str, str] = {}  # of runs that were asked for and have not begun
        self._written, self._ended = 0, False

    def ask(self, run: str) -> str:
        """A ticket for a run, which its beginning takes. An earlier one of the same name ends, or never begins."""
        if self.running and self.running[0] == run:
            self.running[1].set()
        self._tickets[run] = secrets.token_hex(8)
        return self._tickets[run]

    def begin(self, run: str, ticket: str) -> threading.Event | None:
        """The stop of a run that begins; None where the ticket is used, replaced, or void since a stop."""
        if not ticket or self._tickets.get(run) != ticket:
            return None
        del self._tickets[run]
        self.running = (run, threading.Event())
        return self.running[1]

    def finish(self, stop: threading.Event) -> None:
        """The run with this stop is over."""
        if self.running and self.running[1] is stop:
            self.running = None

    def halt(self) -> list[str]:
        """Ends the run that goes on, voids all tickets, and tells the names of both."""
        ended = [*self._tickets, *([self.running[0]] if self.running else [])]
        self._tickets.clear()
        if self.running:
            self.running[1].set()
        return ended

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
        self.halt()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _delete(self, kept: Kept) -> None:
        for path in self.folder.rglob(f"{kept.path.stem}.*"):
            path.unlink()


class Visits:
    """The visits of all pages, by gradio's name of their session.

    Args:
        output: folder in which this server gets one of its own, which is deleted when the process ends.
    """

    def __init__(self, output: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="visits-", dir=output))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self._visits: dict[str, Visit] = {}
        self._heard: dict[str, float] = {}  # when, of each
        self._closed: set[str] = set()
        self._sweeping = threading.Lock()

    def arrive(self, session: str) -> Visit:
        """A new visit. Those that were over by now end, as does an earlier one of this session, and the one that was
        silent longest where there are too many. Raises ValueError for a session without a name."""
        if not session:
            raise ValueError("A page without a session has no visit.")
        now = time.monotonic()
        with self._sweeping:
            for one, heard in list(self._heard.items()):
                if one == session or now - heard > (CLOSED_SECONDS if one in self._closed else SILENT_SECONDS):
                    self._forget(one)
            if len(self._heard) >= MOST_VISITS:
                self._forget(min(self._heard, key=self._heard.get))
            self._visits[session] = Visit(self.folder)
            return self.of(session)

    def _forget(self, session: str) -> None:
        self._closed.discard(session)
        del self._heard[session]
        self._visits.pop(session).end()

    def of(self, session: str) -> Visit:
        """The visit of a page, which is open if it asks. Raises ValueError for one that is not known, or no longer."""
        if session not in self._visits:
            raise ValueError("The server does not know this page any more; please reload it.")
        self._heard[session] = time.monotonic()
        self._closed.discard(session)
        return self._visits[session]

    def leave(self, session: str) -> None:
        """A closed page frees the device; its files stay for a while, in case it comes back."""
        if session in self._visits:
            self.of(session).halt()
            self._closed.add(session)


def _checkpoint_path(path: Path) -> Path:
    return path.parent / "checkpoints" / path.stem
