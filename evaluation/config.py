"""The config of `evaluate.py`, on one screen."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from data.build_config import PUBLISHED_SCHEDULER, PUBLISHED_SCHEDULER_KWARGS
from data.command_line import DTYPES, as_list, check_dtype, check_whole

KEPT_IMAGES = 8  # of a cell, for the contact sheet
MOST_STEPS = 999  # noise schedules have 1000 timesteps; with as many steps as that some solvers divide by zero
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


def read_mapping(given: object, name: str) -> dict:
    """A mapping of the YAML file, or of JSON from the command line. Raises ValueError for anything else."""
    try:
        mapping = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"{name}: {given!r} is no mapping: {error}.") from error
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{name}: {given!r} is no mapping.")
    return dict(mapping)


def is_step_count(count: object) -> bool:
    """Whether a run can have so many steps."""
    return isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= MOST_STEPS


def check_step_list(name: str, steps: object) -> tuple[int, ...]:
    """Some numbers of steps as a tuple. Raises ValueError for anything but a list of them."""
    if not isinstance(steps, list | tuple) or not steps or not all(map(is_step_count, steps)):
        raise ValueError(f"{name}={steps!r}: expected whole numbers from 1 to {MOST_STEPS}, in a list.")
    return tuple(steps)


def check_guidance(name: str, scale: object) -> float:
    """A guidance scale. Raises ValueError for anything but a finite number that is not negative."""
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < math.inf:
        raise ValueError(f"{name}={scale!r}: expected a number of at least 0.")
    return float(scale)


def _fits(value: object, hint: type) -> bool:
    """Whether a value, as YAML gives it, is one of a field's type."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


@dataclass(frozen=True)
class Columns:
    """Cells that are measured on the same prompts: the first ones of the config.

    Attributes:
        guidance_scale: of the full-step pictures and of all rows that have none of their own.
        steps: numbers of steps.
        num_prompts: how many. Columns of one guidance scale share full-step pictures by whole batches.
        ranked: prompts of which several candidates are ranked, and tried in the workflow; the first of `num_prompts`.
        finalists: how many classical solvers are measured, for each number of steps: the best on the grid prompts.
            All of them where it is None.
        only: names of the rows that are measured; all where it is None.

    Raises:
        ValueError: unknown or missing keys, or numbers out of range.
    """

    guidance_scale: float
    steps: tuple[int, ...]
    num_prompts: int
    ranked: int = 0
    finalists: int | None = None
    only: tuple[str, ...] | None = None

    @classmethod
    def read(cls, given: Mapping | str) -> "Columns":
        """From a mapping of the YAML file, or JSON of the command line."""
        given = read_mapping(given, "columns")
        names = [knob.name for knob in fields(cls)]
        missing = {"guidance_scale", "steps", "num_prompts"} - given.keys()
        if missing or given.keys() - set(names):
            raise ValueError(
                f"columns {given}: expected the keys guidance_scale, steps, num_prompts and any of {names[3:]}."
            )
        only = as_list(given.get("only"))
        if only is not None:
            if not isinstance(only, list) or not only or not all(isinstance(name, str) for name in only):
                raise ValueError(f"columns: only={only!r}: expected a list of names of rows.")
            given["only"] = tuple(only)
        given["steps"] = check_step_list("columns: steps", as_list(given["steps"]))
        given["guidance_scale"] = check_guidance("columns: guidance_scale", given["guidance_scale"])
        return cls(**given)

    def __post_init__(self):
        check_whole("columns: num_prompts", self.num_prompts, 2)  # an interval needs as many
        check_whole("columns: ranked", self.ranked, 0)
        if self.ranked > self.num_prompts:
            raise ValueError(f"columns: ranked={self.ranked}: expected 0 to num_prompts={self.num_prompts}.")
        if self.finalists is not None:
            check_whole("columns: finalists", self.finalists)

    def measures(self, name: str) -> bool:
        """Whether a row of this name is measured in them."""
        return self.only is None or name in self.only


@dataclass
class EvaluationConfig:
    """Prompt number i has seed first_seed + i; every solver starts from the same noise."""

    model: str = field(metadata={"help": "pipeline: hub id or local folder"})
    output_dir: str = field(metadata={"help": "folder of the table, the plots and the cache"})
    pipeline: str | None = field(
        default=None, metadata={"help": "diffusers class; the model's own by default. Edits: FluxKontextPipeline"}
    )
    # Rows
    learned: str | None = field(default=None, metadata={"help": "solver folder or hub id; compared with all others"})
    solvers: list[str] = field(
        default_factory=lambda: ["ddim", "ipndm", "ab2", "deis", "unipc", "dpm2m", "dpmpp2m"],
        metadata={"help": "classical solvers; 'base' is the learned one untrained"},
    )
    extra: list[str] = field(
        default_factory=list,
        metadata={
            "help": "more rows, mappings in YAML or JSON: name; one of solver, lora, unet, pipeline (path or id) or "
            "none; subfolder, weight_name of lora and unet; scheduler (diffusers class), scheduler_kwargs, steps, "
            "guidance_scale"
        },
    )
    columns: list[str] = field(
        default_factory=lambda: ['{"guidance_scale": 3.0, "steps": [4, 5, 6, 8], "num_prompts": 500}'],
        metadata={
            "help": "cells, mappings in YAML or JSON: guidance_scale, steps, num_prompts; ranked, finalists, only"
        },
    )
    # Prompts
    prompts: str = field(
        default="scenes:test",
        metadata={
            "help": "held-out: scenes:SPLIT, edits:SPLIT, a text file, a .parquet, .json or .csv, a folder or hub id"
        },
    )
    prompt_column: str = field(default="text", metadata={"help": "column of the prompts in a table or dataset"})
    image_column: str | None = field(default=None, metadata={"help": "column of the pictures to edit, if any"})
    prompt_split: str = field(default="test", metadata={"help": "split of a dataset"})
    first_seed: int = field(default=1_000_000, metadata={"help": "seed of the first prompt"})
    # Full-step pictures
    scheduler: str = field(default=PUBLISHED_SCHEDULER, metadata={"help": "diffusers class of their solver"})
    scheduler_kwargs: dict | str | None = field(default=None, metadata={"help": "changes to its config"})
    num_inference_steps: int = field(default=40, metadata={"help": "their steps"})
    height: int | None = field(default=None, metadata={"help": "in pixels; the pipeline's own by default"})
    width: int | None = field(default=None, metadata={"help": "in pixels; the pipeline's own by default"})
    # Metrics
    rewards: list[str] = field(default_factory=lambda: ["pixels"], metadata={"help": "consistency metrics"})
    reward_models: list[str] = field(
        default_factory=list, metadata={"help": "hub id or folder for each reward; null is the published one"}
    )
    main_metric: str = field(default="pixels", metadata={"help": "the reward that chooses each solver's grid"})
    trained_on: list[str] = field(default_factory=list, metadata={"help": "rewards that the learned solver has seen"})
    frechet: str | None = field(default=None, metadata={"help": "reward whose features a Fréchet distance compares"})
    fid: bool = field(default=False, metadata={"help": "Inception FID; needs the metrics extra and its weights"})
    reference: str | None = field(
        default=None, metadata={"help": "of Fréchet distances: a folder of images or scenes:SPLIT; full-step pictures"}
    )
    caption_check: str | None = field(
        default=None, metadata={"help": "segmentation network that checks captions of the miniature world"}
    )
    edit_check: str | None = field(
        default=None, metadata={"help": "segmentation network that checks edits of it: done, and the rest untouched"}
    )
    scorer: str | None = field(default=None, metadata={"help": "CLIP model that ranks candidates by their prompt"})
    rank_candidates: int = field(default=8, metadata={"help": "seeds of each ranked prompt"})
    # Work
    grid_prompts: int = field(
        default=16, metadata={"help": "prompts behind those of the table, on which each solver's grid is chosen"}
    )
    batch_size: int = field(default=25, metadata={"help": "images rendered together"})
    device: str | None = field(default=None, metadata={"help": "the GPU if there is one, by default"})
    dtype: str = field(default="float32", metadata={"help": f"of the weights: {', '.join(DTYPES)}; the VAE: float32"})
    autocast: bool = field(default=False, metadata={"help": "the denoiser computes in bfloat16, the rest in float32"})
    resamples: int = field(default=2000, metadata={"help": "of the bootstrap"})
    cache_dir: str | None = field(default=None, metadata={"help": "finished work; output_dir/cache by default"})
    # Pictures
    sheet_rows: int = field(default=6, metadata={"help": "prompts on the contact sheet"})
    sheet_steps: list[int] = field(default_factory=lambda: [3, 4, 5, 8, 10], metadata={"help": "its columns"})
    sheet_solvers: list[str] = field(
        default_factory=lambda: ["ddim", "dpm2m", "learned"], metadata={"help": "its groups of columns"}
    )
    trainer_state: str | None = field(default=None, metadata={"help": "trainer_state.json, for the reward curve"})

    def __post_init__(self):
        self._check_types()
        self.extra = [read_mapping(row, "extra") for row in self.extra]
        if self.scheduler_kwargs is None:
            self.scheduler_kwargs = PUBLISHED_SCHEDULER_KWARGS if self.scheduler == PUBLISHED_SCHEDULER else {}
        self.scheduler_kwargs = read_mapping(self.scheduler_kwargs, "scheduler_kwargs")
        models = self.reward_models or [None] * len(self.rewards)
        self.reward_models = [None if model == "null" else model for model in models]  # "null": from the command line
        self.columns = [given if isinstance(given, Columns) else Columns.read(given) for given in self.columns]
        self._check_numbers()
        self._check_columns()
        self._check_metrics()

    def _check_types(self) -> None:
        """YAML gives whatever stands there. What `columns` and `extra` hold is read later."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is list:
                (kind,) = get_args(hint)
                kind = kind | None if name == "reward_models" else kind
                value = as_list(value)
                setattr(self, name, value)
                if name not in ("columns", "extra") and not all(_fits(entry, kind) for entry in value):
                    raise ValueError(f"{name}={value!r}: expected a list of {KINDS[get_args(hint)[0]]} each.")
            elif not _fits(value, hint):
                kinds = [KINDS[kind] for kind in get_args(hint) or [hint] if kind in KINDS]
                raise ValueError(f"{name}={value!r}: expected {' or '.join(kinds)}.")

    @property
    def num_prompts(self) -> int:
        """The most prompts of any columns."""
        return max(columns.num_prompts for columns in self.columns)

    @property
    def guidance_scales(self) -> list[float]:
        """Those of the columns, each once."""
        return list(dict.fromkeys(columns.guidance_scale for columns in self.columns))

    def _check_numbers(self) -> None:
        if not is_step_count(self.num_inference_steps):
            raise ValueError(f"num_inference_steps={self.num_inference_steps}: expected 1 to {MOST_STEPS}.")
        for name in ("batch_size", "resamples", "rank_candidates", "sheet_rows"):
            check_whole(name, getattr(self, name))
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_whole("grid_prompts", self.grid_prompts, 2)
        if self.sheet_rows > KEPT_IMAGES:
            raise ValueError(f"sheet_rows={self.sheet_rows}: of every cell {KEPT_IMAGES} pictures are kept.")
        check_dtype(self.dtype)

    def _check_columns(self) -> None:
        if not self.columns:
            raise ValueError("columns is empty: there is nothing to measure.")
        cells = [(columns.guidance_scale, count) for columns in self.columns for count in columns.steps]
        if repeated := {cell for cell in cells if cells.count(cell) > 1}:
            raise ValueError(f"columns: (guidance_scale, steps) {sorted(repeated)} occur twice.")
        if any(columns.ranked for columns in self.columns) and not self.scorer:
            raise ValueError("columns: ranked needs a scorer, the CLIP model that ranks candidates.")

    def _check_metrics(self) -> None:
        if len(self.reward_models) != len(self.rewards):
            raise ValueError(f"reward_models={self.reward_models}: expected one for each of {self.rewards}.")
        wanted = {"main_metric": [self.main_metric], "trained_on": self.trained_on}
        wanted["frechet"] = [self.frechet] if self.frechet else []
        for name, rewards in wanted.items():
            if unknown := set(rewards).difference(self.rewards):
                raise ValueError(f"{name}={', '.join(unknown)}: expected some of the rewards {self.rewards}.")
        if self.edit_check and self.caption_check:
            raise ValueError("caption_check and edit_check: an instruction is no caption, so it is one or the other.")
        edits = self.prompts.startswith("edits:")
        if edits and self.caption_check:
            raise ValueError(f"caption_check: prompts={self.prompts!r} are instructions, no captions; use edit_check.")
        if self.edit_check and not edits:
            raise ValueError(f"edit_check: prompts={self.prompts!r}: it knows only what edits:SPLIT should lead to.")
