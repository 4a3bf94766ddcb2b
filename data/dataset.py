"""Reads the offline dataset: a torch dataset over the shards that `data.build` wrote.

    dataset = PreviewDataset("datasets/mini_sd")
    dataset.check_teacher(model="zoo/mini-sd", height=64)
    row = dataset[0]
    noise_BCHW = dataset.noise([row["seed"]])        # what the target was rendered from, bit for bit

`datasets` keeps a memory-mapped copy of the shards in its own cache, so they never have to fit into memory.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image

from data.noise import initial_noise, noise_check
from data.shards import from_bytes, is_intact, read_sidecar, shard_paths
from data.teacher import differences

NOISE_CHECKED_ROWS = 64


class PreviewDataset(Dataset):
    """Rows of an offline dataset.

    Row i is a dict:
        prompt: str
        source: uint8 (3, H, W), the picture that the prompt is to change; only in a dataset of edits
        seed: int
        guidance_scale: float
        target: uint8 (3, H, W)
        target_latents: float32 (C, h, w), scaled as the denoiser sees them
        features: {reward name: tensor}, each as the reward gave it

    Args:
        folder: the `output_dir` of a finished build.
        verify: compare all shards with their checksums, and the noise of some rows with what is recorded.
        ignore: keys of a row to leave out, such as "target": not decoding pictures saves time.

    Attributes:
        teacher: content of teacher.json.
        latent_shape: (C, h, w) of a row.

    Raises:
        FileNotFoundError: there is no dataset, or the build has not finished.
        ValueError: a shard is damaged, the noise generator drifts, or `ignore` names no key of a row.
    """

    KEYS = ("prompt", "source", "seed", "guidance_scale", "target", "target_latents", "features")

    def __init__(self, folder: str | Path, verify: bool = True, ignore: Sequence[str] = ()):
        if unknown := set(ignore).difference(self.KEYS):
            raise ValueError(f"ignore={sorted(unknown)}: expected some of {', '.join(self.KEYS)}.")
        self.folder = Path(folder)
        self.teacher = read_teacher(self.folder)
        self.latent_shape = tuple(self.teacher["latent_shape"])
        absent = () if self.teacher["prompts"].get("edits") else ("source",)
        self.keys = [key for key in self.KEYS if key not in (*ignore, *absent)]
        shards = find_shards(self.folder, self.teacher)
        if verify and (damaged := [path.name for path in shards if not is_intact(path)]):
            raise ValueError(f"{self.folder}: {', '.join(damaged)} differ from their checksums. Run the build again.")
        self.rows = _open_shards(shards)
        if verify:
            self._check_noise()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {key: self._read(row, key) for key in self.keys}

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """The initial noise of rows with these seeds, float32 (B, C, h, w) on the CPU."""
        return initial_noise(seeds, self.latent_shape)

    def check_teacher(self, **expected) -> None:
        """Compares keys of teacher.json with what a training run uses, e.g. `model="zoo/mini-sd", dtype="float32"`.

        Raises:
            ValueError: some differ; the message has both values of each.
        """
        if unknown := expected.keys() - self.teacher.keys():
            raise ValueError(f"teacher.json has no {', '.join(sorted(unknown))}; it has {', '.join(self.teacher)}.")
        if changed := differences(self.teacher, json.loads(json.dumps(expected))):
            raise ValueError(
                f"{self.folder} was rendered by another teacher. Build a dataset for this one, or use:\n  "
                + "\n  ".join(changed)
            )

    @staticmethod
    def collate(rows: Sequence[dict]) -> dict:
        """A batch: prompts in a list, features by reward, numbers as tensors (B,), tensors stacked."""
        batch = {key: [row[key] for row in rows] for key in rows[0]}
        for key, values in batch.items():
            if key == "features":
                batch[key] = {name: torch.stack([value[name] for value in values]) for name in values[0]}
            elif isinstance(values[0], torch.Tensor):
                batch[key] = torch.stack(values)
            elif key != "prompt":
                batch[key] = torch.tensor(values)
        return batch

    def _read(self, row: dict, key: str):
        if key in ("target", "source"):
            raw = torch.frombuffer(bytearray(row[key]["bytes"]), dtype=torch.uint8)
            return decode_image(raw, ImageReadMode.RGB)
        if key == "target_latents":
            return from_bytes(row[key], torch.float16, self.latent_shape).float()
        if key == "features":
            layouts = self.teacher["rewards"].items()
            return {name: _read_features(row[f"features_{name}"], layout) for name, layout in layouts}
        return row[key]

    def _check_noise(self) -> None:
        """Rows spread over the dataset: a generator that drifts does so for every seed."""
        step = math.ceil(len(self) / NOISE_CHECKED_ROWS)
        for row in self.rows.select_columns(["seed", "noise_check"]).select(range(0, len(self), step)):
            recorded, now = row["noise_check"], noise_check(self.noise([row["seed"]])[0])
            # Processors may differ in the last bit, which no picture shows.
            if not torch.allclose(torch.tensor(recorded), torch.tensor(now), rtol=0, atol=1e-5):
                raise ValueError(
                    f"{self.folder}: the noise of seed {row['seed']} began with {recorded} at the build, and begins "
                    f"with {now} now. Torch's generator has changed (torch {self.teacher['versions']['torch']} then, "
                    f"{torch.__version__} now): use that version, or build the dataset again."
                )


def read_teacher(folder: Path) -> dict:
    """teacher.json of a dataset. Raises FileNotFoundError where there is none, ValueError where it cannot be read."""
    path = folder / "teacher.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no teacher.json, so it is no dataset. `python -m data.build` makes one."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Bring it back, or build the dataset again.") from error


def find_shards(folder: Path, teacher: dict) -> list[Path]:
    """The shards that hold rows. Raises FileNotFoundError where some are missing."""
    rows = teacher["prompts"]["count"] * teacher["seeds_per_prompt"]
    shards = shard_paths(folder, rows, teacher["shard_size"])
    missing = [path.name for path in shards if not path.is_file() or read_sidecar(path) is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing ({missing[0]} ...). The build has not "
            "finished: run it again."
        )
    return shards


def _open_shards(shards: Sequence[Path]):
    from datasets import Image, load_dataset

    rows = load_dataset("parquet", data_files=[str(path) for path in shards], split="train")
    for name in {"target", "source"}.intersection(rows.column_names):
        rows = rows.cast_column(name, Image(decode=False))
    return rows


def _read_features(raw: bytes, layout: dict) -> torch.Tensor:
    return from_bytes(raw, getattr(torch, layout["dtype"]), layout["shape"])
