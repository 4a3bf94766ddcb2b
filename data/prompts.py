"""Prompts, from wherever they are.

| source                                  | what it is                                                      |
|-----------------------------------------|-----------------------------------------------------------------|
| `scenes:train` (`validation`, `test`)   | captions of the miniature world, as many as are asked for       |
| `edits:train` (`validation`, `test`)    | instructions for scenes of it, and pictures of these            |
| `prompts.txt`                           | a text file, one prompt a line                                  |
| `captions.parquet`, `.json(l)`, `.csv`  | one column of a table                                           |
| `some/folder`                           | a dataset folder, or one written by `save_to_disk`              |
| `user/name`                             | a dataset of the Hugging Face hub                               |

Empty and repeated prompts are left out, and counted: `num_prompts` is the number of those that stay. A prompt may come
with a picture that it is to change; then only the same prompt with the same picture is a repeated one.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from data.scenes import Scene

    Source = Scene | bytes  # of a picture: a scene, which is drawn at any size, or an encoded image

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts in the order of their source, and how many others were left out on the way.

    Attributes:
        texts: the prompts; prompt number n is `texts[n]`.
        sources: what each of them is to change, for `source_picture`; None if they are not instructions.
        empty: prompts without a visible character.
        duplicates: prompts that had come before.
        edited: the scenes that they should lead to, where that is known: of `edits:`; else None.
    """

    texts: tuple[str, ...]
    empty: int = 0
    duplicates: int = 0
    sources: "tuple[Source, ...] | None" = None
    edited: "tuple[Scene, ...] | None" = None

    @property
    def sha256(self) -> str:
        """Identifies the prompts, their pictures, and their order."""
        digest = hashlib.sha256(json.dumps(self.texts).encode())
        for source in self.sources or ():
            digest.update(source_identity(source))
        return digest.hexdigest()


def read_prompts(
    source: str,
    num_prompts: int | None = None,
    column: str = "text",
    split: str = "train",
    image_column: str | None = None,
) -> Prompts:
    """Reads the first `num_prompts` distinct prompts of a source.

    Args:
        source: see the table above. What exists as a file or folder is one; anything else is a hub id.
        num_prompts: how many; all of them where it is None, which `scenes:` does not allow.
        column: of a table or dataset; of a list of prompts in it, the first counts.
        split: of a dataset folder or hub id.
        image_column: of the pictures to edit.

    Raises:
        ValueError: the source has no such column or split, no prompts at all, or fewer than `num_prompts`.
        FileNotFoundError: the source looks like a file, but is none.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1, or none for all prompts of the source.")
    prompts = _keep(_open(source, num_prompts, column, split, image_column), num_prompts)
    if len(prompts.texts) < (num_prompts or 1):
        raise ValueError(
            f"{source!r} has {len(prompts.texts)} usable prompts ({prompts.empty} empty and {prompts.duplicates} "
            f"repeated ones left out), expected {num_prompts or 'at least 1'}. Lower num_prompts, or add prompts."
        )
    return prompts


def source_picture(source: "Source", height: int, width: int) -> "torch.Tensor":
    """The picture to edit, uint8 (3, H, W): a scene drawn at that size; an image cut to its shape, and scaled."""
    from io import BytesIO

    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    if isinstance(source, bytes):
        image = ImageOps.exif_transpose(Image.open(BytesIO(source))).convert("RGB")
        return pil_to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    from data.scenes import render_batch

    return render_batch([source], (height, width)).image[0]


def source_identity(source: "Source") -> bytes:
    """32 bytes that tell pictures to edit apart."""
    return hashlib.sha256(source if isinstance(source, bytes) else repr(source).encode()).digest()


def _keep(candidates: "Iterable[tuple[str | None, Source | None, Scene | None]]", num_prompts: int | None) -> Prompts:
    kept: dict[tuple, tuple] = {}
    empty = duplicates = 0
    for candidate, source, edited in candidates:
        text = (candidate or "").strip()
        key = (text, source if source is None else source_identity(source))
        if not text:
            empty += 1
        elif key in kept:
            duplicates += 1
        else:
            kept[key] = text, source, edited
        if len(kept) == num_prompts:
            break
    texts, *others = zip(*kept.values(), strict=True) if kept else ((), (), ())
    sources, edited = (None if None in values or not values else values for values in others)
    return Prompts(texts, empty, duplicates, sources, edited)


def _open(
    source: str, num_prompts: int | None, column: str, split: str, image_column: str | None
) -> "Iterator[tuple[str | None, Source | None, Scene | None]]":
    path, (kind, colon, world_split) = Path(source), source.partition(":")
    is_world = colon and kind in ("scenes", "edits")
    is_text = path.suffix not in FORMATS and path.is_file()
    if image_column is not None and (is_world or is_text):
        raise ValueError(f"image_column={image_column!r}: {source!r} has no columns; leave it out.")
    if is_world and kind == "edits":
        return _scene_edits(world_split, num_prompts)
    if is_world:
        texts = _scene_captions(world_split, num_prompts)
    elif is_text:
        texts = _read_lines(path)
    elif not path.exists() and (path.suffix in {*FORMATS, ".txt"} or source.count("/") > 1 or path.is_absolute()):
        raise FileNotFoundError(f"prompts={source!r}: there is no such file or folder.")
    elif image_column is not None:
        return _edit_columns(source, column, image_column, split)
    else:
        texts = _dataset_column(source, column, split)
    return ((text, None, None) for text in texts)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _scene_captions(split: str, num_prompts: int | None) -> Iterator[str]:
    from data.scenes import Scene, caption

    if num_prompts is None:
        raise ValueError(f"prompts='scenes:{split}' never end: say how many with num_prompts.")
    return (caption(Scene.random(seed, split), random.Random(seed)).text for seed in count())


def _scene_edits(split: str, num_prompts: int | None) -> "Iterator[tuple[str, Scene, Scene]]":
    from data.scenes import numbered_edit

    if num_prompts is None:
        raise ValueError(f"prompts='edits:{split}' never end: say how many with num_prompts.")
    return (numbered_edit(n, split) for n in count())


def _edit_columns(source: str, column: str, image_column: str, split: str) -> Iterator[tuple[str | None, bytes, None]]:
    from datasets import Image

    rows = _select(source, split, [column, image_column]).cast_column(image_column, Image(decode=False))
    for row in rows:
        image = row[image_column]
        if image is None:
            raise ValueError(f"{source!r}: column {image_column!r} has no picture for {row[column]!r}.")
        encoded = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        yield _checked(row[column], source, column), encoded, None


def _dataset_column(source: str, column: str, split: str) -> Iterator[str | None]:
    rows = _select(source, split, [column])
    return (_checked(row[column], source, column) for row in rows)


def _select(source: str, split: str, wanted: list[str]):
    """Some columns of a dataset. Raises ValueError if it has no such columns."""
    rows = _open_dataset(source, split)
    columns = rows.column_names or list(next(iter(rows), {}))
    for column in wanted:
        if column not in columns:
            raise ValueError(f"{source!r} has no column {column!r}; it has {', '.join(columns) or 'no rows'}.")
    return rows.select_columns(wanted)


def _checked(value: object, source: str, column: str) -> str | None:
    if isinstance(value, list):
        value = next(iter(value), None)
    if not isinstance(value, str | None):
        raise ValueError(f"{source!r}: column {column!r} holds {type(value).__name__}, expected strings.")
    return value


def _open_dataset(source: str, split: str):
    """A table as a stream, so that nothing is copied and a hub dataset is read only as far as it is needed."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(source)
    if path.is_file():
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(source)
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"{source!r} has no split {split!r}; it has {', '.join(saved)}.")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(source, split=split, streaming=True)
