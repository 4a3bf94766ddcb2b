"""The knobs of PPO on a solver, beside those of `transformers.TrainingArguments`."""

from dataclasses import dataclass

from transformers import TrainingArguments

from solver.ppo_knobs import PPOKnobs


@dataclass
class ConsistencySolverConfig(PPOKnobs, TrainingArguments):
    """Arguments of [`~solver.trainer.ConsistencySolverTrainer`].

    An *iteration* is one batch of rollouts and `num_ppo_epochs` updates on it; `max_steps`, `logging_steps`,
    `save_steps` and `eval_steps` count updates, and the last two must be multiples of `num_ppo_epochs`: a checkpoint
    between two updates on one batch could not be resumed, because the policy that drew it is gone.

    Raises:
        ValueError: a value is out of range, or two of them do not fit; the message names them.
    """

    def __post_init__(self):
        self.check()
        updates = self.num_iterations * self.num_ppo_epochs
        if self.max_steps > 0 and self.max_steps != updates:
            raise ValueError(
                f"max_steps={self.max_steps} is set by num_iterations={self.num_iterations} times "
                f"num_ppo_epochs={self.num_ppo_epochs}; leave it out."
            )
        self.max_steps = updates
        super().__post_init__()
        self._check_intervals()

    def _check_intervals(self) -> None:
        if self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end: the best solver is kept in output_dir/best; load it from there.")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: an update sees all rollouts of its "
                "iteration at once; for memory lower rollout_batch_size."
            )
        epochs = self.num_ppo_epochs
        for strategy, name in ((self.save_strategy, "save_steps"), (self.eval_strategy, "eval_steps")):
            if strategy == "steps" and getattr(self, name) % epochs:
                raise ValueError(f"{name}={getattr(self, name)} is no multiple of num_ppo_epochs={epochs}.")
