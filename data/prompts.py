"""Prompts, from wherever they are.

| source                                  | what it is                                                      |
|-----------------------------------------|-----------------------------------------------------------------|
| `scenes:train` (`validation`, `test`)   | captions of the miniature world, as many as are asked for       |
| `prompts.txt`                           | a text file, one prompt a line                                  |
| `captions.parquet`, `.json(l)`, `.csv`  | one column of a table                                           |
| `some/folder`                           | a dataset folder, or one written by `save_to_disk`              |
| `user/name`                             | a dataset of the Hugging Face hub                               |

Empty and repeated prompts are left out, and counted: `num_prompts` is the number of those that stay.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts in the order of their source, and how many others were left out on the way.

    Attributes:
        texts: the prompts; prompt number n is `texts[n]`.
        empty: prompts without a visible character.
        duplicates: prompts that had come before.
    """

    texts: tuple[str, ...]
    empty: int = 0
    duplicates: int = 0

    @property
    def sha256(self) -> str:
        """Identifies the prompts and their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def read_prompts(source: str, num_prompts: int | None = None, column: str = "text", split: str = "train") -> Prompts:
    """Reads the first `num_prompts` distinct prompts of a source.

    Args:
        source: see the table above. What exists as a file or folder is one; anything else is a hub id.
        num_prompts: how many; all of them where it is None, which `scenes:` does not allow.
        column: of a table or dataset.
        split: of a dataset folder or hub id.

    Raises:
        ValueError: the source has no such column or split, no prompts at all, or fewer than `num_prompts`.
        FileNotFoundError: the source looks like a file, but is none.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts}: expected at least 1, or none for all prompts of the source.")
    prompts = _keep(_open(source, num_prompts, column, split), num_prompts)
    if len(prompts.texts) < (num_prompts or 1):
        raise ValueError(
            f"{source!r} has {len(prompts.texts)} usable prompts ({prompts.empty} empty and {prompts.duplicates} "
            f"repeated ones left out), expected {num_prompts or 'at least 1'}. Lower num_prompts, or add prompts."
        )
    return prompts


def _keep(candidates: Iterable[str | None], num_prompts: int | None) -> Prompts:
    kept: dict[str, None] = {}  # an ordered set
    empty = duplicates = 0
    for candidate in candidates:
        text = (candidate or "").strip()
        if not text:
            empty += 1
        elif text in kept:
            duplicates += 1
        else:
            kept[text] = None
        if len(kept) == num_prompts:
            break
    return Prompts(tuple(kept), empty, duplicates)


def _open(source: str, num_prompts: int | None, column: str, split: str) -> Iterator[str | None]:
    if source.startswith("scenes:"):
        return _scene_captions(source.removeprefix("scenes:"), num_prompts)
    path = Path(source)
    if path.suffix not in FORMATS and path.is_file():
        return iter(path.read_text(encoding="utf-8").splitlines())
    if not path.exists() and (path.suffix in {*FORMATS, ".txt"} or source.count("/") > 1 or path.is_absolute()):
        raise FileNotFoundError(f"prompts={source!r}: there is no such file or folder.")
    return _dataset_column(source, column, split)


def _scene_captions(split: str, num_prompts: int | None) -> Iterator[str]:
    from data.scenes import Scene, caption

    if num_prompts is None:
        raise ValueError(f"prompts='scenes:{split}' never end: say how many with num_prompts.")
    return (caption(Scene.random(seed, split), random.Random(seed)).text for seed in count())


def _dataset_column(source: str, column: str, split: str) -> Iterator[str | None]:
    rows = _open_dataset(source, split)
    columns = rows.column_names or list(next(iter(rows), {}))
    if column not in columns:
        raise ValueError(f"{source!r} has no column {column!r}; it has {', '.join(columns) or 'no rows'}.")
    values = (row[column] for row in rows.select_columns([column]))
    return (_checked(value, source, column) for value in values)


def _checked(value: object, source: str, column: str) -> str | None:
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
