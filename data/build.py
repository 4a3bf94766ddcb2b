"""Builds the offline dataset: prompts in; full-step pictures, their latents and reward features out.

    accelerate launch -m data.build --config configs/build_mini_sd.yaml
    accelerate launch -m data.build --config configs/build_mini_sd.yaml --num_prompts 64 --output_dir datasets/small

The same command goes on after an interruption: finished shards stay, a damaged one is made again, and the result is
byte for byte that of an uninterrupted run. So is that of any number of processes that compute alike (on CPUs: with the
same OMP_NUM_THREADS): batches are cut by row number, and process p of n renders shards p, p + n, p + 2n, ...
"""

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from data.build_config import BuildConfig
from data.command_line import answer_help, errors_as_sentences

if TYPE_CHECKING:
    from accelerate import PartialState
    from tqdm import tqdm

    from data.prompts import Prompts
    from data.teacher import Row, Teacher

logger = logging.getLogger("data.build")


@dataclass(frozen=True)
class Report:
    """What became of the prompts. `rendered` counts the shards made by this run; the others were there."""

    rows: int
    shards: int
    rendered: int
    not_finite: int
    empty: int
    duplicates: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows in {self.shards} shards, {self.rendered} of them rendered now. Left out: {self.empty} "
            f"empty and {self.duplicates} repeated prompts, {self.not_finite} rows with NaN or infinite latents."
        )


def build(config: BuildConfig) -> Report:
    """Builds the dataset of a config, or what is missing of it, together with the other processes of the launch.

    Raises:
        OSError: `output_dir` cannot be written, the disk is full, or a model is missing.
        ValueError: `output_dir` holds another teacher's shards, or the config does not fit the model or the prompts.
    """
    import torch
    from accelerate.utils import gather_object

    from data.card import dataset_card
    from data.prompts import read_prompts
    from data.shards import make_folder, write_whole

    folder = Path(config.output_dir)
    make_folder(folder)
    state = _join_launch()
    torch.backends.cudnn.deterministic = True

    prompts = read_prompts(
        config.prompts, config.num_prompts, config.prompt_column, config.prompt_split, config.image_column
    )
    rows = plan_rows(prompts.texts, config, prompts.sources)
    teacher = load_teacher(config, state.device)
    description = describe(config, teacher, prompts)
    claim_folder(folder, description, state.is_main_process)
    state.wait_for_everyone()

    rendered = sum(gather_object([render_missing(folder, rows, teacher, config, state)]))
    report = make_report(folder, len(rows), config.shard_size, rendered, prompts)
    if state.is_main_process:
        write_whole(folder / "README.md", dataset_card(description, report).encode())
        logger.info("%s: %s", folder, report)
    return report


def plan_rows(texts: Sequence[str], config: BuildConfig, sources: Sequence | None = None) -> "list[Row]":
    """All rows, in order. They depend on nothing but the arguments; `sources` are those of `Prompts`."""
    from data.teacher import Row

    def guidance_scale(i: int) -> float:
        if config.guidance_range is None:
            return float(config.guidance_scale[i % len(config.guidance_scale)])
        # In few values, so that rows can share a batch, and an iteration of training finds its prompts.
        low, high = config.guidance_range
        last = math.floor((high - low) / config.guidance_step + 1e-6)
        drawn = random.Random(f"guidance:{config.first_seed + i}").randint(0, last)
        return round(low + drawn * config.guidance_step, 6)

    k = config.seeds_per_prompt
    sources = sources or [None] * len(texts)
    rows = range(len(texts) * k)
    return [Row(texts[i // k], config.first_seed + i, guidance_scale(i), sources[i // k]) for i in rows]


def load_teacher(config: BuildConfig, device) -> "Teacher":
    """The pipeline, its solver and the rewards of a config."""
    import torch

    from data.teacher import Teacher, load_pipeline
    from rewards import load_reward

    dtype = getattr(torch, config.dtype)
    pipe = load_pipeline(config.model, config.scheduler, config.scheduler_kwargs, dtype, device, config.pipeline)
    names_and_models = zip(config.rewards, config.reward_models, strict=True)
    rewards = [load_reward(name, model=model, device=device) for name, model in names_and_models]
    return Teacher(pipe, rewards, config.num_inference_steps, config.height, config.width)


def describe(config: BuildConfig, teacher: "Teacher", prompts: "Prompts") -> dict:
    """The content of teacher.json: all that the bytes of the shards depend on."""
    from data.teacher import library_versions

    features = teacher.describe_features()
    models = zip(features.items(), config.reward_models, strict=True)
    source = {"source": config.prompts, "column": config.prompt_column, "split": config.prompt_split}
    if prompts.sources:
        source |= {"edits": True, "image_column": config.image_column}
    description = {
        "model": config.model,
        "dtype": config.dtype,
        **teacher.describe(),
        "guidance_scale": config.guidance_scale if config.guidance_range is None else None,
        "guidance_range": config.guidance_range,
        **({} if config.guidance_range is None else {"guidance_step": config.guidance_step}),
        "prompts": source | {"count": len(prompts.texts), "sha256": prompts.sha256},
        "seeds_per_prompt": config.seeds_per_prompt,
        "first_seed": config.first_seed,
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
        "rewards": {name: {"model": model, **layout} for (name, layout), model in models},
        "versions": library_versions(),
    }
    return json.loads(json.dumps(description))


def claim_folder(folder: Path, description: dict, is_main_process: bool) -> None:
    """Writes teacher.json, or compares with the one that is there. Other library versions only draw a warning.

    Raises:
        ValueError: the folder was built from another config, or has shards and no teacher.json that can be read.
    """
    from data.dataset import read_teacher
    from data.shards import write_json
    from data.teacher import differences

    path = folder / "teacher.json"
    if not path.exists():
        if any(folder.glob("shard-*.parquet")):
            raise ValueError(f"{folder} has shards but no teacher.json. Bring it back, or choose another output_dir.")
        if is_main_process:
            write_json(path, description)
        return
    recorded, expected = read_teacher(folder), dict(description)
    versions = differences(recorded.pop("versions", {}), expected.pop("versions"))
    if changed := differences(recorded, expected, complete=True):
        raise ValueError(
            f"{folder} was begun with another config. Choose another output_dir, or go back to:\n  "
            + "\n  ".join(changed)
        )
    if versions and is_main_process:
        logger.warning("%s was begun with other versions; last bits may differ between shards: %s", folder, versions)


def render_missing(
    folder: Path, rows: "Sequence[Row]", teacher: "Teacher", config: BuildConfig, state: "PartialState"
) -> int:
    """Renders the shards of this process that are missing or damaged; returns how many."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from data.shards import is_intact, shard_paths, write_shard

    size = config.shard_size
    paths = shard_paths(folder, len(rows), size)
    own = range(state.process_index, len(paths), state.num_processes)
    missing = [index for index in own if not is_intact(paths[index])]
    with logging_redirect_tqdm(), _progress_bar(rows, own, missing, size, state) as bar:
        for index in missing:
            shard_rows = rows[index * size : (index + 1) * size]
            rendered = _render_shard(shard_rows, teacher, config.batch_size, bar)
            skipped = [row.seed for row, columns in zip(shard_rows, rendered, strict=True) if columns is None]
            if skipped:
                logger.warning("Shard %d: seeds %s gave NaN or infinite latents and are left out.", index, skipped)
            kept = [columns for columns in rendered if columns is not None]
            edits = shard_rows[0].source is not None
            write_shard(paths[index], kept, list(teacher.rewards), skipped, edits)
    return len(missing)


def make_report(folder: Path, planned: int, shard_size: int, rendered: int, prompts: "Prompts") -> Report:
    """Adds up the sidecars of a finished dataset. Raises ValueError where no row is left."""
    from data.shards import read_sidecar, shard_paths

    sidecars = [read_sidecar(path) for path in shard_paths(folder, planned, shard_size)]
    kept = sum(sidecar["rows"] for sidecar in sidecars)
    if not kept:
        raise ValueError(
            f"{folder}: all {planned} rows came out with NaN or infinite latents. Delete it and build with "
            "dtype: float32, or a lower guidance scale."
        )
    return Report(kept, len(sidecars), rendered, planned - kept, prompts.empty, prompts.duplicates)


def _join_launch() -> "PartialState":
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without being told, accelerate takes each process of a launch on CPUs for the only one.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # Long, because a process whose shards are all there waits for those that still render.
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def _render_shard(rows: "Sequence[Row]", teacher: "Teacher", batch_size: int, bar: "tqdm") -> list[dict | None]:
    rendered: list[dict | None] = [None] * len(rows)
    for batch in _batches(rows, batch_size):
        for i, columns in zip(batch, teacher.render([rows[i] for i in batch]), strict=True):
            rendered[i] = columns
        bar.update(len(batch))
    return rendered


def _batches(rows: "Sequence[Row]", batch_size: int) -> Iterator[list[int]]:
    """Row numbers within a shard, in batches of one guidance scale."""
    groups: dict[float, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.guidance_scale, []).append(i)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _progress_bar(
    rows: Sequence, own: Sequence[int], missing: Sequence[int], shard_size: int, state: "PartialState"
) -> "tqdm":
    """Images of the main process: how many, how fast, how long still."""
    from tqdm import tqdm

    def images(indices: Sequence[int]) -> int:
        return sum(len(rows[index * shard_size : (index + 1) * shard_size]) for index in indices)

    return tqdm(
        total=images(own),
        initial=images(own) - images(missing),
        desc="Rendering" if state.num_processes == 1 else f"Rendering, process 1 of {state.num_processes}",
        unit=" images",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} images, {rate_noinv_fmt}, {remaining} left",
        disable=not state.is_main_process,
    )


def main(args: list[str] | None = None) -> Report:
    answer_help(args, __doc__, BuildConfig)
    from trl import TrlParser

    (config,) = TrlParser((BuildConfig,), allow_abbrev=False).parse_args_and_config(args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("data").setLevel(logging.INFO)
    return build(config)


if __name__ == "__main__":
    with errors_as_sentences("data.build"):
        main()
