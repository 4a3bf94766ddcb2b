"""The config of `evaluate.py`, on one screen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from data.build_config import PUBLISHED_SCHEDULER, PUBLISHED_SCHEDULER_KWARGS

DTYPES = ("float32", "bfloat16", "float16")
KEPT_IMAGES = 8  # of a cell, for the contact sheet


def read_mapping(given: Mapping | str, name: str) -> dict:
    """An entry of a list of mappings, from the YAML file or as JSON from the command line."""
    try:
        return json.loads(given) if isinstance(given, str) else dict(given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {given!r} is no mapping: {error}.") from error


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
        listed = {name: tuple(given[name]) for name in ("steps", "only") if given.get(name) is not None}
        return cls(**{**given, **listed, "guidance_scale": float(given["guidance_scale"])})

    def __post_init__(self):
        if not self.steps or not all(isinstance(count, int) and count >= 1 for count in self.steps):
            raise ValueError(f"columns: steps={list(self.steps)}: expected whole numbers of at least 1.")
        if self.num_prompts < 2:
            raise ValueError(
                f"columns: num_prompts={self.num_prompts}: expected at least 2, an interval needs as many."
            )
        if not 0 <= self.ranked <= self.num_prompts:
            raise ValueError(f"columns: ranked={self.ranked}: expected 0 to num_prompts={self.num_prompts}.")
        if self.finalists is not None and self.finalists < 1:
            raise ValueError(f"columns: finalists={self.finalists}: expected at least 1, or none for all.")


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
            "none; scheduler (diffusers class), scheduler_kwargs, steps, guidance_scale"
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
        self.extra = [read_mapping(row, "extra") for row in self.extra]
        if isinstance(self.scheduler_kwargs, str):
            self.scheduler_kwargs = json.loads(self.scheduler_kwargs)
        if self.scheduler_kwargs is None:
            self.scheduler_kwargs = PUBLISHED_SCHEDULER_KWARGS if self.scheduler == PUBLISHED_SCHEDULER else {}
        models = self.reward_models or [None] * len(self.rewards)
        self.reward_models = [None if model == "null" else model for model in models]  # "null": from the command line
        self.columns = [given if isinstance(given, Columns) else Columns.read(given) for given in self.columns]
        self._check()

    @property
    def num_prompts(self) -> int:
        """The most prompts of any columns."""
        return max(columns.num_prompts for columns in self.columns)

    @property
    def guidance_scales(self) -> list[float]:
        """Those of the columns, each once."""
        return list(dict.fromkeys(columns.guidance_scale for columns in self.columns))

    def _check(self) -> None:
        for name in ("num_inference_steps", "batch_size", "resamples", "rank_candidates", "sheet_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.grid_prompts < 2:
            raise ValueError(f"grid_prompts={self.grid_prompts}: expected at least 2.")
        if self.sheet_rows > KEPT_IMAGES:
            raise ValueError(f"sheet_rows={self.sheet_rows}: of every cell {KEPT_IMAGES} pictures are kept.")
        if not self.columns:
            raise ValueError("columns is empty: there is nothing to measure.")
        cells = [(columns.guidance_scale, count) for columns in self.columns for count in columns.steps]
        if repeated := {cell for cell in cells if cells.count(cell) > 1}:
            raise ValueError(f"columns: (guidance_scale, steps) {sorted(repeated)} occur twice.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}.")
        if len(self.reward_models) != len(self.rewards):
            raise ValueError(f"reward_models={self.reward_models}: expected one for each of {self.rewards}.")
        wanted = {"main_metric": [self.main_metric], "trained_on": self.trained_on}
        wanted["frechet"] = [self.frechet] if self.frechet else []
        for name, rewards in wanted.items():
            if unknown := set(rewards).difference(self.rewards):
                raise ValueError(f"{name}={', '.join(unknown)}: expected some of the rewards {self.rewards}.")
        if any(columns.ranked for columns in self.columns) and not self.scorer:
            raise ValueError("columns: ranked needs a scorer, the CLIP model that ranks candidates.")
        if self.edit_check and self.caption_check:
            raise ValueError("caption_check and edit_check: an instruction is no caption, so it is one or the other.")
        edits = self.prompts.startswith("edits:")
        if edits and self.caption_check:
            raise ValueError(f"caption_check: prompts={self.prompts!r} are instructions, no captions; use edit_check.")
        if self.edit_check and not edits:
            raise ValueError(f"edit_check: prompts={self.prompts!r}: it knows only what edits:SPLIT should lead to.")
        if self.trainer_state and not Path(self.trainer_state).is_file():
            raise ValueError(f"trainer_state={self.trainer_state!r}: there is no such file.")
        if self.reference and not self.reference.startswith("scenes:") and not Path(self.reference).is_dir():
            raise ValueError(f"reference={self.reference!r}: expected scenes:SPLIT or a folder of images.")
