"""Shards on disk: whole or not at all, and checked.

    shard-00000.parquet    the rows; appears in one step, after everything else about it is on disk
    shard-00000.json       its sha256, its number of rows, the seeds of rows that were left out
    teacher.json           who rendered them

Files hold no times and no machine names: the same rows make the same bytes.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def shard_paths(folder: Path, num_rows: int, shard_size: int) -> list[Path]:
    """The shards of a dataset of so many planned rows, whether they are there or not."""
    return [folder / f"shard-{index:05d}.parquet" for index in range(math.ceil(num_rows / shard_size))]


def write_shard(
    path: Path, rows: Sequence[dict], reward_names: Sequence[str], skipped: Sequence[int], edits: bool = False
) -> None:
    """Writes a shard and, before it, its sidecar.

    Args:
        path: one of `shard_paths`.
        rows: values by column, see `columns`.
        reward_names: rewards whose features are cached.
        skipped: seeds of the rows that have no picture.
        edits: whether the rows have a source picture.

    Raises:
        OSError: the disk is full, or the folder cannot be written. Nothing half-written is left.
    """
    payload = _to_parquet(rows, reward_names, edits)
    sidecar = {"sha256": hashlib.sha256(payload).hexdigest(), "rows": len(rows), "skipped": list(skipped)}
    write_json(path.with_suffix(".json"), sidecar)
    write_whole(path, payload)


def read_sidecar(path: Path) -> dict | None:
    """A shard's sidecar, or None where it is missing or unreadable."""
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return sidecar if isinstance(sidecar, dict) and {"sha256", "rows", "skipped"} <= sidecar.keys() else None


def is_intact(path: Path) -> bool:
    """Whether a shard is there and is what was written. A warning names one that is there and is not."""
    if not path.is_file():
        return False
    sidecar = read_sidecar(path)
    with path.open("rb") as file:
        intact = sidecar is not None and hashlib.file_digest(file, "sha256").hexdigest() == sidecar["sha256"]
    if not intact:
        logger.warning("%s does not match its checksum: it was truncated or altered.", path)
    return intact


def columns(reward_names: Sequence[str], edits: bool = False):
    """The columns of a shard, as `datasets.Features`."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "prompt": Value("string"),
            **({"source": Image()} if edits else {}),  # PNG, the picture that the prompt is to change
            "seed": Value("int64"),
            "guidance_scale": Value("float64"),
            "target": Image(),  # PNG
            "target_latents": Value("binary"),  # raw float16
            "latent_shape": List(Value("int32")),  # C, H, W
            "noise_check": List(Value("float32")),
            **{f"features_{name}": Value("binary") for name in reward_names},  # shape and dtype: teacher.json
        }
    )


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The raw values of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def from_bytes(raw: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `to_bytes`."""
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(*shape)


def write_json(path: Path, content: dict) -> None:
    """Writes JSON whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file whole or not at all: aside, to the disk, then renamed.

    Raises:
        OSError: with the system's error number and what to do about it.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{error.strerror}: {len(payload):,} bytes could not be written. Finished shards are safe; make room and "
            "run the same command again",
            str(path),
        ) from error


def make_folder(folder: Path) -> None:
    """Makes a folder and tries to write in it, before hours are spent on what is to go there.

    Raises:
        OSError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: output_dir must be a folder that can be written", str(folder)
        ) from error


def _to_parquet(rows: Sequence[dict], reward_names: Sequence[str], edits: bool) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    # Pictures and raw floats do not compress; a small row group lets a viewer show the first rows without the rest.
    table = pa.Table.from_pylist(list(rows), schema=columns(reward_names, edits).arrow_schema)
    pq.write_table(table, buffer, compression="none", row_group_size=64)
    return buffer.getvalue()


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
