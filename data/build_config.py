"""The config of `data.build`, on one screen."""

import json
import math
from dataclasses import dataclass, field

from data.command_line import DTYPES, are_numbers, as_list, check_dtype, check_whole

PUBLISHED_SCHEDULER = "DPMSolverMultistepScheduler"
PUBLISHED_SCHEDULER_KWARGS = {
    "algorithm_type": "dpmsolver",
    "solver_order": 2,
    "final_sigmas_type": "sigma_min",
    "timestep_spacing": "linspace",
}


@dataclass
class BuildConfig:
    """Every knob of a build. Row number i is prompt i // seeds_per_prompt with seed first_seed + i."""

    model: str = field(metadata={"help": "teacher pipeline: hub id or local folder"})
    output_dir: str = field(metadata={"help": "folder of the dataset"})
    pipeline: str | None = field(
        default=None, metadata={"help": "diffusers class; the model's own by default. Edits: FluxKontextPipeline"}
    )
    # Rows
    prompts: str = field(
        default="scenes:train",
        metadata={
            "help": "scenes:SPLIT, edits:SPLIT, a text file, a .parquet, .json or .csv, a dataset folder or hub id"
        },
    )
    prompt_column: str = field(default="text", metadata={"help": "column of the prompts in a table or dataset"})
    image_column: str | None = field(default=None, metadata={"help": "column of the pictures to edit, if any"})
    prompt_split: str = field(default="train", metadata={"help": "split of a dataset"})
    num_prompts: int | None = field(default=None, metadata={"help": "distinct prompts to use; all by default"})
    seeds_per_prompt: int = field(default=1, metadata={"help": "rows of a prompt, each with a seed of its own"})
    first_seed: int = field(default=0, metadata={"help": "seed of the first row"})
    guidance_scale: list[float] = field(default_factory=lambda: [7.5], metadata={"help": "cycled over the rows"})
    guidance_range: list[float] | None = field(
        default=None, metadata={"help": "low and high, in place of guidance_scale: drawn for each row"}
    )
    guidance_step: float = field(
        default=0.5, metadata={"help": "between the scales of guidance_range; an iteration of training stays at one"}
    )
    # Teacher
    scheduler: str = field(default=PUBLISHED_SCHEDULER, metadata={"help": "diffusers class of its solver"})
    scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "changes to the solver's config, a mapping or JSON"}
    )
    num_inference_steps: int = field(default=40, metadata={"help": "steps of the solver"})
    height: int | None = field(default=None, metadata={"help": "in pixels; the pipeline's own by default"})
    width: int | None = field(default=None, metadata={"help": "in pixels; the pipeline's own by default"})
    dtype: str = field(default="float32", metadata={"help": f"{', '.join(DTYPES)}; the VAE stays in float32"})
    rewards: list[str] = field(default_factory=list, metadata={"help": "rewards whose features are cached"})
    reward_models: list[str] = field(
        default_factory=list, metadata={"help": "hub id or folder for each reward; null is the published one"}
    )
    # Work
    batch_size: int = field(default=16, metadata={"help": "rows of one guidance scale rendered together"})
    shard_size: int = field(default=256, metadata={"help": "rows of a shard: what an interruption may cost"})

    def __post_init__(self):
        if isinstance(self.scheduler_kwargs, str):
            try:
                self.scheduler_kwargs = json.loads(self.scheduler_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"scheduler_kwargs={self.scheduler_kwargs!r} is not JSON: {error}.") from error
        if self.scheduler_kwargs is None:
            self.scheduler_kwargs = PUBLISHED_SCHEDULER_KWARGS if self.scheduler == PUBLISHED_SCHEDULER else {}
        self.model = self.model.rstrip("/")
        self.guidance_scale, self.rewards = as_list(self.guidance_scale), as_list(self.rewards)
        models = as_list(self.reward_models) or [None] * len(self.rewards)
        self.reward_models = [None if model == "null" else model for model in models]  # "null": from the command line
        self._check()

    def _check(self) -> None:
        for name in ("seeds_per_prompt", "num_inference_steps", "batch_size", "shard_size"):
            check_whole(name, getattr(self, name))
        check_dtype(self.dtype)
        if not are_numbers(self.guidance_scale) or not self.guidance_scale:
            raise ValueError(f"guidance_scale={self.guidance_scale!r}: expected a list of numbers.")
        span = self.guidance_range
        if span is not None and not (are_numbers(span) and len(span) == 2 and span[0] < span[1]):
            raise ValueError(f"guidance_range={span!r}: expected two numbers, the lower one first.")
        step = self.guidance_step
        if not are_numbers([step]) or not 0 < step <= (math.inf if span is None else span[1] - span[0]):
            raise ValueError(f"guidance_step={step!r}: expected more than 0, and no more than guidance_range spans.")
        if not isinstance(self.scheduler_kwargs, dict):
            raise ValueError(f"scheduler_kwargs={self.scheduler_kwargs!r}: expected a mapping.")
        if len(self.reward_models) != len(self.rewards):
            raise ValueError(f"reward_models={self.reward_models!r}: expected one for each of {self.rewards!r}.")
