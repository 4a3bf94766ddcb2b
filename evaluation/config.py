"""The config of `evaluate.py`, on one screen."""

import json
from dataclasses import dataclass, field

from data.build_config import PUBLISHED_SCHEDULER, PUBLISHED_SCHEDULER_KWARGS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EvaluationConfig:
    """Prompt number i has seed first_seed + i; every solver starts from the same noise."""

    model: str = field(metadata={"help": "pipeline: hub id or local folder"})
    output_dir: str = field(metadata={"help": "folder of the table, the plots and the cache"})
    # Rows
    learned: str | None = field(default=None, metadata={"help": "solver folder or hub id; compared with all others"})
    distilled: str | None = field(default=None, metadata={"help": "solver folder fitted to teacher trajectories"})
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
    # Columns
    steps: list[int] = field(default_factory=lambda: [3, 4, 5, 6, 8, 10], metadata={"help": "numbers of steps"})
    guidance_scale: list[float] = field(default_factory=lambda: [3.0], metadata={"help": "guidance scales"})
    # Prompts
    prompts: str = field(
        default="scenes:test",
        metadata={"help": "held-out: scenes:SPLIT, a text file, a .parquet, .json or .csv, a folder or hub id"},
    )
    prompt_column: str = field(default="text", metadata={"help": "column of the prompts in a table or dataset"})
    prompt_split: str = field(default="test", metadata={"help": "split of a dataset"})
    num_prompts: list[int] = field(default_factory=lambda: [500], metadata={"help": "one, or one a guidance scale"})
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
    scorer: str | None = field(default=None, metadata={"help": "CLIP model that ranks candidates by their prompt"})
    rank_prompts: list[int] = field(default_factory=lambda: [0], metadata={"help": "one, or one a guidance scale"})
    rank_candidates: int = field(default=8, metadata={"help": "seeds of each of these prompts"})
    # Work
    grid_prompts: int = field(default=32, metadata={"help": "prompts on which all grids of a solver are tried"})
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
        self.extra = [json.loads(row) if isinstance(row, str) else dict(row) for row in self.extra]
        if isinstance(self.scheduler_kwargs, str):
            self.scheduler_kwargs = json.loads(self.scheduler_kwargs)
        if self.scheduler_kwargs is None:
            self.scheduler_kwargs = PUBLISHED_SCHEDULER_KWARGS if self.scheduler == PUBLISHED_SCHEDULER else {}
        models = self.reward_models or [None] * len(self.rewards)
        self.reward_models = [None if model == "null" else model for model in models]  # "null": from the command line
        self.num_prompts, self.rank_prompts = self._per_guidance("num_prompts"), self._per_guidance("rank_prompts")
        self._check()

    def _per_guidance(self, name: str) -> list[int]:
        values = [values] if isinstance(values := getattr(self, name), int) else list(values)
        values = values * len(self.guidance_scale) if len(values) == 1 else values
        if len(values) != len(self.guidance_scale):
            raise ValueError(f"{name}={values}: expected one number, or one for each of {self.guidance_scale}.")
        return values

    def _check(self) -> None:
        for name in ("num_inference_steps", "batch_size", "resamples", "rank_candidates", "sheet_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1.")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps={self.steps}: expected whole numbers of at least 1.")
        if not self.guidance_scale or min(self.num_prompts) < 2:
            raise ValueError(f"num_prompts={self.num_prompts}: expected at least 2, an interval needs as many.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}.")
        if len(self.reward_models) != len(self.rewards):
            raise ValueError(f"reward_models={self.reward_models}: expected one for each of {self.rewards}.")
        wanted = {"main_metric": [self.main_metric], "trained_on": self.trained_on}
        wanted["frechet"] = [self.frechet] if self.frechet else []
        for name, rewards in wanted.items():
            if unknown := set(rewards).difference(self.rewards):
                raise ValueError(f"{name}={', '.join(unknown)}: expected some of the rewards {self.rewards}.")
        if any(self.rank_prompts) and not self.scorer:
            raise ValueError(f"rank_prompts={self.rank_prompts} needs a scorer, the CLIP model that ranks candidates.")
