"""The knobs of PPO on a solver; `solver.trainer_config` adds those of `transformers`, which take seconds to import."""

import math
from dataclasses import dataclass, field

from data.command_line import are_numbers, as_list, check_whole, is_number


@dataclass
class PPOKnobs:
    """What [`~solver.trainer_config.ConsistencySolverConfig`] has beyond `transformers.TrainingArguments`.

    Raises:
        ValueError: a value is out of range, or two of them do not fit; the message names them.
    """

    # Rollouts
    num_iterations: int = field(default=100, metadata={"help": "batches of rollouts; sets max_steps"})
    prompts_per_iteration: int = field(default=4, metadata={"help": "groups of an iteration, one (prompt, seed) each"})
    group_size: int = field(default=16, metadata={"help": "rollouts of a group, compared with each other"})
    rollout_batch_size: int = field(default=64, metadata={"help": "rows of a pipeline call, for memory"})
    inference_steps: list[int] | None = field(default=None, metadata={"help": "numbers of steps to train on"})
    min_inference_steps: int = field(default=2, metadata={"help": "in place of inference_steps: the lowest"})
    max_inference_steps: int = field(default=15, metadata={"help": "in place of inference_steps: the highest"})

    guidance_scales: list[float] | None = field(
        default=None, metadata={"help": "those of the datasets to train and evaluate on; all by default"}
    )

    # Exploration of the Gaussian head
    exploration_std: float = field(default=0.12, metadata={"help": "standard deviation in the first iteration"})
    final_exploration_std: float = field(default=0.04, metadata={"help": "and in the last; geometric in between"})
    antithetic: bool = field(default=True, metadata={"help": "draw deviations in pairs of opposite sign"})

    # PPO
    num_ppo_epochs: int = field(default=8, metadata={"help": "updates on each batch of rollouts"})
    clip_range: float = field(default=0.2, metadata={"help": "of the ratio of new to old probability"})
    scale_rewards: str = field(
        default="group", metadata={"help": "divide by the std of each group, or of the batch: of all its groups"}
    )
    anchor_coef: float = field(
        default=1.0, metadata={"help": "holds the policy's answers for other numbers of steps and guidance scales"}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "bonus of the categorical head's entropy"})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "one a reward function; default 1"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the optimiser"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "see TrainingArguments; it decays to 0"})

    # Held-out reward
    eval_inference_steps: list[int] = field(
        default_factory=lambda: [5, 8], metadata={"help": "numbers of steps, at every guidance scale of eval_dataset"}
    )
    contact_sheet_rows: int = field(default=8, metadata={"help": "pictures of the sheet of an evaluation; 0: none"})

    logging_steps: float = field(default=10, metadata={"help": "updates between two logs"})
    save_steps: float = field(default=200, metadata={"help": "updates between two checkpoints"})

    @property
    def step_counts(self) -> list[int]:
        """The numbers of steps K to train on."""
        if self.inference_steps is not None:
            return self.inference_steps
        return list(range(self.min_inference_steps, self.max_inference_steps + 1))

    def check(self) -> None:
        """Makes lists of single values, and raises ValueError for what is out of range."""
        for name in ("inference_steps", "guidance_scales", "reward_weights", "eval_inference_steps"):
            setattr(self, name, as_list(getattr(self, name)))
        for name in ("num_iterations", "prompts_per_iteration", "rollout_batch_size", "num_ppo_epochs"):
            check_whole(name, getattr(self, name))
        check_whole("group_size", self.group_size, lowest=2)  # a rollout is compared with others
        check_whole("contact_sheet_rows", self.contact_sheet_rows, lowest=0)
        if self.scale_rewards not in ("group", "batch"):
            raise ValueError(f"scale_rewards={self.scale_rewards!r}: expected group or batch.")
        if self.antithetic and self.group_size % 2:
            raise ValueError(f"group_size={self.group_size} is odd, but antithetic=True draws pairs.")
        self._check_steps()
        self._check_numbers()

    def _check_steps(self) -> None:
        for name in ("min_inference_steps", "max_inference_steps"):
            check_whole(name, getattr(self, name))
        if not self.step_counts or not all(isinstance(steps, int) and steps >= 2 for steps in self.step_counts):
            raise ValueError(
                f"inference_steps={self.inference_steps}, min_inference_steps={self.min_inference_steps}, "
                f"max_inference_steps={self.max_inference_steps}: expected whole numbers of at least 2 (in a single "
                "step there is nothing to learn), the lower one first."
            )
        if not self.eval_inference_steps:
            raise ValueError(
                f"eval_inference_steps={self.eval_inference_steps}: expected whole numbers of at least 1."
            )
        for steps in self.eval_inference_steps:
            check_whole("eval_inference_steps", steps)

    def _check_numbers(self) -> None:
        for name in ("guidance_scales", "reward_weights"):
            values = getattr(self, name)
            if values is not None and not (values and are_numbers(values)):
                raise ValueError(f"{name}={values}: expected finite numbers.")
        for name in ("anchor_coef", "entropy_coef"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate={self.learning_rate}: expected a number above 0.")
        if not 0 < self.final_exploration_std <= self.exploration_std < math.inf:
            raise ValueError(
                f"exploration_std={self.exploration_std} must not be below "
                f"final_exploration_std={self.final_exploration_std}, and both must be above 0."
            )
        if not 0 < self.clip_range < 1:
            raise ValueError(f"clip_range={self.clip_range}: expected a number between 0 and 1.")
