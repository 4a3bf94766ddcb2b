"""From rows and tables to scores: previews and reward functions, shared out among the processes.

Shape suffixes: B rows, R reward functions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rewards import Reward, load_reward
from solver.rollout import Previews, Renderer, rows_of, stopwatch
from solver.scheduling_consistency_solver import SolverTable

RewardFunction = Callable[..., Tensor]


class Scores(NamedTuple):
    """Scores of all rows, the same in all processes.

    Attributes:
        rewards_B: weighted sum over the reward functions, on the CPU.
        scores_RB: of each function; NaN for "not scored".
        broken_B: whether a preview has NaN or infinite values. Its reward is the lowest of all rows.
        images_BCHW: previews of this process' share of the rows only.
        network_evaluations: of all processes.
        seconds: by phase, of this process: `"rollout"`, `"decode"`, `"reward"`.
    """

    rewards_B: Tensor
    scores_RB: Tensor
    broken_B: Tensor
    images_BCHW: Tensor
    network_evaluations: int
    seconds: dict[str, float]


class Scorer:
    """Renders rows and calls the reward functions on them.

    Args:
        renderer: makes the previews.
        reward_funcs: one or several, callable or a short name of `rewards.REWARDS`; see `ConsistencySolverTrainer`.
        weights: one a function; all 1 where it is None.
        accelerator: of the run.

    Raises:
        ValueError: no functions, or weights that do not fit.
    """

    def __init__(
        self,
        renderer: Renderer,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str],
        weights: Sequence[float] | None,
        accelerator: Accelerator,
    ):
        self.renderer, self.accelerator = renderer, accelerator
        single = callable(reward_funcs) or isinstance(reward_funcs, str)
        self.functions = [
            load_reward(f) if isinstance(f, str) else f for f in ([reward_funcs] if single else reward_funcs)
        ]
        self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]  # partial functions have none
        for function in self.functions:
            if isinstance(function, Reward):
                function.to(accelerator.device)
        if not self.functions:
            raise ValueError("reward_funcs is empty; there is nothing to learn from.")
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights={weights}: expected {len(self.functions)} numbers, one for each of {self.names}."
            )
        self.weights_R = torch.tensor(weights, dtype=torch.float32)

    def score(self, rows: Sequence[dict], guidance_scale: float, table: SolverTable) -> Scores:
        """Previews of rows and their scores. Every process renders its share, and gets all scores.

        Args:
            rows: as in `data.dataset.PreviewDataset`; a row may appear several times.
            guidance_scale: of the previews.
            table: one for each row, or one for all.

        Raises:
            ValueError: all previews are broken, or one that is whole has no score.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = slice(len(rows) * process // processes, len(rows) * (process + 1) // processes)
        scores_RB, images_BCHW = torch.zeros(len(self.functions), 0), torch.zeros(0, 3, 1, 1)
        broken_B, evaluations, seconds = torch.zeros(0, dtype=torch.bool), 0, {}
        if mine := rows[share]:
            prompts, seeds = [row["prompt"] for row in mine], [row["seed"] for row in mine]
            sources = [row["source"] for row in mine] if "source" in mine[0] else None
            previews = self.renderer.render(prompts, seeds, guidance_scale, rows_of(table, share), sources)
            previews, broken_B = mended(previews)
            images_BCHW, evaluations, seconds = previews.images_BCHW, previews.network_evaluations, previews.seconds
            with stopwatch(seconds, "reward", images_BCHW.device):
                scores_RB = self._reward(mine, previews)
            scores_RB[:, broken_B] = math.nan
        gathered = gather_object([(scores_RB, broken_B, evaluations)])
        scores_RB = torch.cat([scores for scores, _, _ in gathered], dim=1)
        broken_B = torch.cat([broken for _, broken, _ in gathered])
        evaluations = sum(count for _, _, count in gathered)
        return Scores(self.total(scores_RB, broken_B), scores_RB, broken_B, images_BCHW, evaluations, seconds)

    def total(self, scores_RB: Tensor, broken_B: Tensor) -> Tensor:
        """Weighted sum of the scores, (B,); of broken previews the lowest. Raises ValueError as `score` says."""
        if broken_B.all():
            raise ValueError("All previews are NaN or infinite: explore less (exploration_std), or use float32.")
        if scores_RB[:, ~broken_B].isnan().all(dim=0).any():
            raise ValueError(f"{', '.join(self.names)}: NaN for the same preview, so that nothing is known of it.")
        rewards_B = (scores_RB * self.weights_R[:, None]).nansum(dim=0)
        rewards_B[broken_B] = rewards_B[~broken_B].min()
        return rewards_B

    def _reward(self, rows: Sequence[dict], previews: Previews) -> Tensor:
        """The reward functions on previews of `rows`, (R, B) on the CPU."""
        device = previews.images_BCHW.device
        columns = {
            "images": previews.images_BCHW,
            "latents": previews.latents_BCHW,
            "target_images": torch.stack([row["target"] for row in rows]).to(device).float() / 255,
            "target_latents": torch.stack([row["target_latents"] for row in rows]).to(device),
            "prompts": [row["prompt"] for row in rows],
            "seeds": [row["seed"] for row in rows],
        }
        scores = []
        for name, function in zip(self.names, self.functions, strict=True):
            cached = name in rows[0]["features"]
            features = torch.stack([row["features"][name] for row in rows]).to(device) if cached else None
            scores.append(_checked(function(**columns, target_features=features), name, len(rows)))
        return torch.stack(scores)


def mended(previews: Previews) -> tuple[Previews, Tensor]:
    """Previews with zeros in place of those that have NaN or infinite values, and which these are, (B,) on the CPU."""
    latents_BCHW, images_BCHW = previews.latents_BCHW, previews.images_BCHW
    whole_B = images_BCHW.isfinite().flatten(1).all(1) & latents_BCHW.isfinite().flatten(1).all(1)
    latents_BCHW, images_BCHW = (x.where(whole_B[:, None, None, None], 0.0) for x in (latents_BCHW, images_BCHW))
    return previews._replace(latents_BCHW=latents_BCHW, images_BCHW=images_BCHW), ~whole_B.cpu()


def _checked(answer: Tensor | Sequence[float | None], name: str, count: int) -> Tensor:
    """What a reward function answered, float32 (B,) on the CPU; None in a list is NaN.

    Raises:
        ValueError: it is no number a row, or one is infinite.
    """
    if not isinstance(answer, Tensor):
        try:
            answer = torch.tensor([math.nan if score is None else float(score) for score in answer])
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {name!r} answered {answer!r:.80}: expected {count} numbers.") from error
    if answer.shape != (count,):
        raise ValueError(f"reward {name!r} answered a tensor {tuple(answer.shape)}: expected ({count},).")
    if answer.isinf().any():
        raise ValueError(f"reward {name!r} answered infinity, which cannot be averaged. Clamp it.")
    return answer.float().cpu()
