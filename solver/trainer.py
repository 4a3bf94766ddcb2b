"""Proximal policy optimisation of a solver's policy, on `transformers.Trainer`.

    trainer = ConsistencySolverTrainer(pipe, scheduler, [reward], args, train_dataset, eval_dataset)
    trainer.train()

An iteration is a batch of rollouts, all in one number of steps K and at one guidance scale:

1. draw a few (prompt, seed) rows, and for each a group of action tables around the policy's answer;
2. render their previews, score them against the full-step targets;
3. compare scores within a group: advantages;
4. a few updates on the clipped ratio of new to old probability of the drawn actions.

The trained model is the MLP `scheduler.policy`; pipeline and rewards are frozen. The reward is terminal, and there is
no value function: the group is the baseline.

Everything random comes from CPU generators seeded by (args.seed, iteration). Each process renders its share, and all
of them compute the same update on all rewards; so a resumed run, or one of many processes, is the same run.

Shape suffixes: B rollouts, K steps, D actions, F policy inputs, R reward functions.
Source: arXiv 2512.13592.
"""

import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from solver.contact_sheet import save_contact_sheet
from solver.exploration import actions_of, draw_choices, log_probability
from solver.ppo import Elsewhere, Rollouts, anchor_loss, group_advantages, ppo_loss
from solver.rollout import Renderer
from solver.samplers.calls import branches
from solver.scheduling_consistency_solver import ConsistencySolverScheduler, SolverTable
from solver.scoring import RewardFunction, Scorer, Scores
from solver.trainer_config import ConsistencySolverConfig
from solver.training_data import check_features, check_teacher, image_size, rows_by_guidance

logger = logging.get_logger(__name__)
# What a checkpoint and the run that goes on from it must share.
SOLVER_KIND = ("solver_order", "base_rule", "learn_weights", "learn_grid", "head", "num_bins", "inputs", "grid")


class ConsistencySolverTrainer(Trainer):
    """Trains a solver so that its previews are the pictures that many steps would make.

    Args:
        pipeline: stock pipeline, the one that rendered the targets. It is moved to the training device.
        scheduler: the solver; its policy is trained in place.
        reward_funcs: one or several functions in TRL's sense: called with `images`, `target_images`, `latents`,
            `target_latents`, `target_features` (None where the dataset has none by the function's name), `prompts`
            and `seeds` by keyword, they answer (B,), higher is better, NaN (None in a list) for "not scored". Short
            names of `rewards.REWARDS` stand for their published models.
        args: [`ConsistencySolverConfig`].
        train_dataset: rows as in `data.dataset.PreviewDataset`.
        eval_dataset: like it; its rows are previewed at the deterministic action at each evaluation.
        callbacks: as in `transformers.Trainer`.
        encode: as in `solver.prompt_embeddings.PromptEmbeddings`.

    Raises:
        ValueError: a baked solver, a dataset of another teacher or other reward networks, an empty one, a noise
            schedule that is not the pipeline's, more steps than it has, too few rows, or weights that do not fit the
            rewards.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        scheduler: ConsistencySolverScheduler,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str],
        args: ConsistencySolverConfig,
        train_dataset,
        eval_dataset=None,
        callbacks: list[TrainerCallback] | None = None,
        encode: Callable[[str], dict[str, Tensor]] | None = None,
    ):
        _check_solver(scheduler, pipeline)
        _check_steps(scheduler, args)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None and not len(dataset):
                raise ValueError(f"{name} is empty.")
            check_teacher(dataset, pipeline)
        super().__init__(
            model=scheduler.policy,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.scheduler = scheduler
        pipeline.to(self.accelerator.device)
        self.renderer = Renderer(pipeline, scheduler, *image_size(train_dataset), args.rollout_batch_size, encode)
        self.scorer = Scorer(self.renderer, reward_funcs, args.reward_weights, self.accelerator)
        for dataset in (train_dataset, eval_dataset):
            check_features(dataset, self.scorer.functions)
        self.train_rows = rows_by_guidance(train_dataset, args.guidance_scales, args.prompts_per_iteration)
        self.eval_rows = None if eval_dataset is None else rows_by_guidance(eval_dataset, args.guidance_scales)
        scales = sorted(self.train_rows)
        scheduler.extend_training(args.step_counts, scales)
        scheduler.register_to_config(guidance_scale=scales[(len(scales) - 1) // 2])  # for users who name none
        scheduler.guidance_scale = scheduler.config.guidance_scale
        self._rollouts: Rollouts | None = None
        self._rollout_seconds = 0.0  # within the running update
        self._base_evaluation: tuple[dict, dict] | None = None
        self._metrics: dict[str, list[float]] = defaultdict(list)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A clock: the rows of an iteration follow from its number, see `_roll_out`."""
        return DataLoader([{"update": update} for update in range(self.args.max_steps)])

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> Tensor:
        start, self._rollout_seconds = time.perf_counter(), 0.0
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._record({"seconds/update": time.perf_counter() - start - self._rollout_seconds})
        return loss

    def _prepare_inputs(self, inputs: dict) -> Rollouts:
        """The rollouts of this iteration: new ones, or those of the last update."""
        iteration = self.state.global_step // self.args.num_ppo_epochs
        if self._rollouts is None or self._rollouts.iteration != iteration:
            start, is_first = time.perf_counter(), self._rollouts is None
            self._rollouts = self._roll_out(iteration)
            self._rollout_seconds = time.perf_counter() - start
            if is_first:
                self._log_budget(iteration)
        return self._rollouts

    def compute_loss(self, model: nn.Module, inputs: Rollouts, return_outputs: bool = False, num_items_in_batch=None):
        """The clipped loss of PPO; `model` is the policy, or its distributed wrapper."""
        args, policy, elsewhere = self.args, self.scheduler.policy, inputs.elsewhere
        seen = inputs.inputs_KF if elsewhere is None else torch.cat([inputs.inputs_KF, elsewhere.inputs_SF])
        outputs, outputs_elsewhere = model(seen).tensor_split([len(inputs.inputs_KF)])
        loss, metrics = ppo_loss(policy, outputs, inputs, args.clip_range, args.entropy_coef)
        if elsewhere is not None:
            anchor = anchor_loss(policy, outputs_elsewhere, elsewhere, inputs.std)
            metrics["kl_elsewhere"] = anchor.detach()
            loss = loss + args.anchor_coef * anchor
        self._record(metrics)
        return (loss, outputs) if return_outputs else loss

    # -- rollouts -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _roll_out(self, iteration: int) -> Rollouts:
        """One batch of rollouts; all processes return the same."""
        args, policy, device = self.args, self.scheduler.policy, self.accelerator.device
        generator = seeded_generator(args.seed, "rollout", iteration)
        steps, guidance_scale = self.draw_cell(iteration)
        std = self.exploration_std(iteration)

        # Rows: one a group
        candidates = self.train_rows[guidance_scale]
        chosen = torch.randperm(len(candidates), generator=generator)[: args.prompts_per_iteration]
        groups = [self.train_dataset[candidates[i]] for i in chosen.tolist()]
        rows = [row for row in groups for _ in range(args.group_size)]

        # Actions: all of them before the first step
        grid = self.renderer.grid(steps, rows[0]["prompt"])
        inputs_KF = self.scheduler.policy_inputs(steps, guidance_scale, **grid).to(device)
        outputs = policy(inputs_KF)
        choices_BKD = draw_choices(policy, outputs, len(rows), std, args.antithetic, generator)
        table = self.scheduler.table_from_actions(actions_of(policy, choices_BKD), steps, **grid)

        # Previews, rewards, advantages
        scores = self.scorer.score(rows, guidance_scale, table)
        advantages_B, constant_groups = group_advantages(scores.rewards_B, args.group_size, args.scale_rewards)
        spread = scores.rewards_B.view(-1, args.group_size).std(dim=1).mean()
        self._record(
            {"reward": scores.rewards_B.mean(), "reward_std": spread, "frac_reward_zero_std": constant_groups}
        )
        self._record({"exploration_std": std, "inference_steps": steps, "guidance_scale": guidance_scale})
        self._record({"frac_previews_broken": scores.broken_B.float().mean()})
        self._record_scores(scores)

        choices_BKD = choices_BKD.to(device)
        old_log_prob_BKD = log_probability(policy, outputs, choices_BKD, std)
        mask_KD = self.scheduler.action_mask(steps).to(device)
        return Rollouts(
            iteration,
            inputs_KF,
            mask_KD,
            choices_BKD,
            old_log_prob_BKD,
            advantages_B.to(device),
            std,
            self._elsewhere(steps, guidance_scale, rows[0]["prompt"]),
        )

    def _elsewhere(self, steps: int, guidance_scale: float, prompt: str) -> Elsewhere | None:
        """All cells but this one, with the policy's present answers; None where there are no others."""
        cells = [cell for cell in self.cells if cell != (steps, guidance_scale)]
        if not cells or not self.args.anchor_coef:
            return None
        device = self.accelerator.device
        inputs = [self.scheduler.policy_inputs(k, scale, **self.renderer.grid(k, prompt)) for k, scale in cells]
        inputs_SF = torch.cat(inputs).to(device)
        mask_SD = torch.cat([self.scheduler.action_mask(k) for k, _ in cells]).to(device)
        return Elsewhere(inputs_SF, mask_SD, self.scheduler.policy(inputs_SF))

    @property
    def cells(self) -> list[tuple[int, float]]:
        """All pairs of a number of steps K and a guidance scale to train on."""
        return [(steps, scale) for steps in self.args.step_counts for scale in self.train_rows]

    def draw_cell(self, iteration: int) -> tuple[int, float]:
        """K and guidance scale of an iteration: all pairs in random order, then all in another, and so on."""
        sweep, place = divmod(iteration, len(self.cells))
        order = torch.randperm(len(self.cells), generator=seeded_generator(self.args.seed, "cells", sweep))
        return self.cells[order[place]]

    def exploration_std(self, iteration: int) -> float:
        """From `exploration_std` to `final_exploration_std`, geometrically."""
        first, last = self.args.exploration_std, self.args.final_exploration_std
        return first * (last / first) ** (iteration / max(1, self.args.num_iterations - 1))

    # -- held-out reward ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean reward of the deterministic previews of all rows, in each of `eval_inference_steps`.

        `eval_reward` is the mean over the cells (K, guidance scale), `eval_base_reward` that of the base rule (zero
        actions). The best solver so far is kept in `output_dir/best`, a contact sheet in `output_dir/contact_sheets`.
        """
        if self.eval_rows is None or eval_dataset is not None:
            raise ValueError("evaluate needs the eval_dataset that the trainer was made with, and no other.")
        start = time.time()
        if self._base_evaluation is None:
            self._base_evaluation = self._evaluate_cells(zero_actions=True)
        base_metrics, base_pictures = self._base_evaluation
        metrics, pictures = self._evaluate_cells()
        metrics["base_reward"] = base_metrics["reward"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, start)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.accelerator.is_main_process and pictures:
            self._save_contact_sheet(base_pictures, pictures)
        self._keep_best(metrics[f"{metric_key_prefix}_reward"])
        return metrics

    def _evaluate_cells(self, zero_actions: bool = False) -> tuple[dict[str, float], dict[int, Tensor]]:
        """Metrics over all cells; and pictures for the contact sheet, row number -> (3, H, W)."""
        cells, scores, pictures, evaluations = {}, [], {}, 0
        sheet_rows = math.ceil(self.args.contact_sheet_rows / len(self.eval_rows))
        for steps in self.args.eval_inference_steps:
            for guidance_scale, numbers in self.eval_rows.items():
                rows = [self.eval_dataset[i] for i in numbers]
                table = self._deterministic_table(steps, guidance_scale, rows[0]["prompt"], zero_actions)
                scored = self.scorer.score(rows, guidance_scale, table)
                cells[f"reward_{steps}_steps_cfg_{guidance_scale:g}"] = scored.rewards_B.mean().item()
                scores.append(scored.scores_RB.nanmean(dim=1))
                evaluations += scored.network_evaluations
                if steps == self.args.eval_inference_steps[0]:
                    # The main process, which writes the sheet, has the first rows.
                    pictures |= zip(numbers[:sheet_rows], scored.images_BCHW.cpu(), strict=False)
        metrics = {"reward": sum(cells.values()) / len(cells), "network_evaluations": evaluations, **cells}
        for name, score in zip(self.scorer.names, torch.stack(scores).nanmean(dim=0), strict=True):
            metrics[f"rewards/{name}/mean"] = score.item()
        return metrics, pictures

    def _deterministic_table(self, steps: int, guidance_scale: float, prompt: str, zero_actions: bool) -> SolverTable:
        grid = self.renderer.grid(steps, prompt)
        if zero_actions:
            return self.scheduler.table_from_actions(torch.zeros(steps, self.scheduler.num_actions), steps, **grid)
        return self.scheduler.coefficients(steps, guidance_scale, **grid)

    def _save_contact_sheet(self, base_pictures: dict[int, Tensor], pictures: dict[int, Tensor]) -> None:
        """Target, base rule and learned solver, in the first of `eval_inference_steps`."""
        shown = list(pictures)[: self.args.contact_sheet_rows]
        steps = self.args.eval_inference_steps[0]
        columns = {
            "target": torch.stack([self.eval_dataset[i]["target"].float() / 255 for i in shown]),
            f"base, {steps}": torch.stack([base_pictures[i] for i in shown]),
            f"learned, {steps}": torch.stack([pictures[i] for i in shown]),
        }
        folder = Path(self.args.output_dir) / "contact_sheets"
        save_contact_sheet(columns, folder / f"step-{self.state.global_step:06d}.png")

    def _keep_best(self, reward: float) -> None:
        """Writes the solver to `output_dir/best` if it is the best so far; checkpoints remember the reward."""
        if not self.is_in_train or (self.state.best_metric is not None and reward <= self.state.best_metric):
            return
        self.state.best_metric, self.state.best_global_step = reward, self.state.global_step
        if self.args.should_save:
            self.scheduler.save_pretrained(Path(self.args.output_dir) / "best")

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raises ValueError where a checkpoint is of another kind of solver, whose weights may well fit."""
        path = Path(checkpoint) / self.scheduler.config_name
        if not path.is_file():
            return
        recorded, own = json.loads(path.read_text()), self.scheduler.config
        others = [
            f"{key} {recorded.get(key)!r} against {own[key]!r}" for key in SOLVER_KIND if recorded.get(key) != own[key]
        ]
        if others:
            raise ValueError(f"{checkpoint} is of another solver than this run: {', '.join(others)}.")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.check_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # -- files and logs -----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint is a solver that `ConsistencySolverScheduler.from_pretrained` loads."""
        super()._save(output_dir, state_dict)
        self.scheduler.save_config(output_dir or self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means, since the last call, of what was recorded."""
        if not any(name.startswith("eval_") for name in logs):
            logs = logs | {name: sum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)

    def _record(self, metrics: dict[str, float | Tensor]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def _record_scores(self, scores: Scores) -> None:
        for name, scores_B in zip(self.scorer.names, scores.scores_RB, strict=True):
            scored = scores_B[~scores_B.isnan()]
            self._record({f"rewards/{name}/mean": scored.mean()})
            if len(scored) > 1:
                self._record({f"rewards/{name}/std": scored.std()})
        self._record({f"seconds/{phase}": value for phase, value in scores.seconds.items()})
        self._record({"network_evaluations": scores.network_evaluations})

    def budget(self, first: int = 0) -> tuple[int, int]:
        """Network evaluations, guidance counting twice, from an iteration to the end of the run, by one process:
        of the rollouts, and of the held-out evaluations, the base rule's included.
        """
        args = self.args
        groups, size, batch = args.prompts_per_iteration, args.group_size, args.rollout_batch_size
        # The first evaluation is that of a group, where no pipeline call cuts it in two.
        shared = groups + sum(row % size != 0 for row in range(batch, groups * size, batch))
        rollouts = 0
        for iteration in range(first, args.num_iterations):
            steps, guidance_scale = self.draw_cell(iteration)
            rollouts += branches(self.renderer.pipe, guidance_scale) * (shared + (steps - 1) * groups * size)
        if self.eval_rows is None or args.eval_strategy == "no":
            return rollouts, 0
        rows = sum(branches(self.renderer.pipe, scale) * len(rows) for scale, rows in self.eval_rows.items())
        every = args.eval_steps if args.eval_strategy == "steps" else args.max_steps
        times = args.max_steps // every - first * args.num_ppo_epochs // every
        times += 1  # the base rule
        times += bool(args.eval_on_start and not first)
        return rollouts, int(times * rows * sum(args.eval_inference_steps))

    def _log_budget(self, first: int) -> None:
        """One line on what the run will cost, in time by the measure of its first batch of rollouts."""
        if not self.accelerator.is_main_process:
            return
        args, (rollouts, held_out) = self.args, self.budget(first)
        iterations, rows = args.num_iterations - first, args.prompts_per_iteration * args.group_size
        minutes = self._rollout_seconds / self._metrics["network_evaluations"][-1] / 60  # an evaluation
        more = f" On held-out rows {held_out:,} more, {held_out * minutes:,.1f} minutes." if held_out else ""
        logger.warning(
            f"{iterations:,} iterations of {args.prompts_per_iteration} x {args.group_size} rollouts: "
            f"{iterations * rows:,} rollouts, {rollouts:,} network evaluations (guidance counts twice), about "
            f"{rollouts * minutes:,.1f} minutes.{more}"
        )


def seeded_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(random.Random(":".join(map(str, (seed, *purpose)))).getrandbits(63))


def _check_solver(scheduler: ConsistencySolverScheduler, pipe: DiffusionPipeline) -> None:
    if scheduler.policy is None:
        raise ValueError("This solver is baked: it has no policy to train. Load the one that it was baked from.")
    if not scheduler.num_actions:
        raise ValueError("This solver has no actions: set learn_grid, or learn_weights and an order above 1.")
    scheduler.check_compatible(pipe.scheduler)


def _check_steps(scheduler: ConsistencySolverScheduler, args: ConsistencySolverConfig) -> None:
    """Now, and not when the run comes to them: held-out evaluations are far apart."""
    for name, counts in (("inference_steps", args.step_counts), ("eval_inference_steps", args.eval_inference_steps)):
        if max(counts) > len(scheduler):
            raise ValueError(f"{name}: {max(counts)} steps are more than the {len(scheduler)} of the noise schedule.")
