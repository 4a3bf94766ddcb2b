"""How much better one number of steps could get than training left it: gradients of the PSNR through whole runs.

    python -m benchmarks.headroom --solver runs/mini_sd/best --steps 6        # 5 minutes of one thread

The residuals of one (steps, guidance) are taken from the solver, freed from its network, and improved by Adam on the
PSNR to the full-step pictures of the offline dataset, backpropagated through the autoencoder, every step and every
evaluation of the denoiser. Where that finds nothing, the limit is the family of solvers and not the search. Prints the
gain on rows that no gradient saw, with its 95 % interval.
"""

import argparse
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from data.dataset import PreviewDataset
from evaluation.bootstrap import Estimate, mean
from evaluation.rendering import load_pipeline
from rewards.base import psnr
from solver import ConsistencySolverScheduler
from solver.prompt_embeddings import PromptEmbeddings
from solver.rollout import solving_rows
from solver.samplers.calls import guidance
from solver.samplers.cascade import call_at_size
from solver.samplers.latents import decode, pack, unpack
from solver.training_data import rows_by_guidance

LARGEST_GRADIENT = 20.0  # norm, dB a unit of the residuals: single rows have spikes
PRINTED = 10  # iterations between two lines


class Cell:
    """Runs of one number of steps at one guidance scale.

    Args:
        pipe: with frozen weights.
        scheduler: the solver.
        dataset: full-step pictures and their noise.
        steps, guidance_scale: of the cell.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scheduler: ConsistencySolverScheduler,
        dataset: PreviewDataset,
        steps: int,
        guidance_scale: float,
    ):
        self.pipe, self.scheduler, self.dataset = pipe, scheduler, dataset
        self.steps, self.guidance_scale = steps, guidance_scale
        self.embeddings = PromptEmbeddings(pipe)

    def scores(self, actions_KD: Tensor, rows: Sequence[int]) -> Tensor:
        """PSNR of some rows of the dataset, (B,); differentiable in the residuals, unlike a call of the pipeline."""
        picked = [self.dataset[row] for row in rows]
        prompts, seeds = [row["prompt"] for row in picked], [row["seed"] for row in picked]
        actions_BKD = actions_KD.expand(len(rows), -1, -1)
        table = self.scheduler.table_from_actions(actions_BKD, self.steps)
        call = {
            **self.embeddings(prompts),
            **guidance(self.pipe, self.guidance_scale),
            "latents": pack(self.pipe, self.dataset.noise(seeds)),
            "num_inference_steps": self.steps,
        }
        height, width = picked[0]["target"].shape[1:]
        call = call_at_size(self.pipe, call, height, width)
        with solving_rows(self.pipe, self.scheduler, table, list(rows)):
            latents = type(self.pipe).__call__.__wrapped__(self.pipe, **call)[0]  # what torch.no_grad is around
        images = decode.__wrapped__(self.pipe, unpack(self.pipe, latents, self.dataset.latent_shape))
        return psnr(images, torch.stack([row["target"] for row in picked]).to(images) / 255, floor=1e-8)


def gain(cell: Cell, actions_KD: Tensor, before_N: Tensor, rows: Sequence[int], batch_size: int) -> Estimate:
    """By how many dB the residuals are better than before, on these rows."""
    return mean(evaluate(cell, actions_KD, rows, batch_size) - before_N)


@torch.no_grad()
def evaluate(cell: Cell, actions_KD: Tensor, rows: Sequence[int], batch_size: int) -> Tensor:
    """PSNR of each row, (N,)."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return torch.cat([cell.scores(actions_KD, batch) for batch in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/mini-sd")
    parser.add_argument("--dataset", default="datasets/mini_sd")
    parser.add_argument("--solver", default="runs/mini_sd/best", help="to begin with")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="one of the dataset's")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8, help="rows an iteration")
    parser.add_argument("--learning_rate", type=float, default=0.005, help="of Adam, falls to a tenth")
    parser.add_argument("--held_out", type=int, default=56, help="rows that no gradient sees: the last ones")
    parser.add_argument("--seed", type=int, default=0, help="of the rows' order")
    parser.add_argument("--device", help="cuda where there is one, if it is left out")
    args = parser.parse_args()

    pipe = load_pipeline(args.model, "float32", args.device)
    for part in (pipe.unet, pipe.vae) if "unet" in pipe.components else (pipe.transformer, pipe.vae):
        part.requires_grad_(False)
    scheduler = ConsistencySolverScheduler.from_pretrained(args.solver)
    dataset = PreviewDataset(args.dataset)
    rows = rows_by_guidance(dataset, [args.guidance_scale], args.held_out + args.batch_size)[args.guidance_scale]
    seen, held_out = rows[: -args.held_out], rows[-args.held_out :]
    cell = Cell(pipe, scheduler, dataset, args.steps, args.guidance_scale)

    inputs = scheduler.policy_inputs(args.steps, args.guidance_scale).float()
    learned_KD = scheduler.policy.deterministic_actions(inputs).detach()
    actions_KD, mean_KD = learned_KD.clone().requires_grad_(), torch.zeros_like(learned_KD)
    optimizer = torch.optim.Adam([actions_KD], lr=args.learning_rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, args.iterations)
    before = evaluate(cell, learned_KD, held_out, args.batch_size)
    base = evaluate(cell, torch.zeros_like(learned_KD), held_out, args.batch_size)
    print(f"{len(held_out)} held-out rows: base rule {base.mean():.2f} dB, learned {before.mean():.2f} dB", flush=True)

    generator = torch.Generator().manual_seed(args.seed)
    half = args.iterations // 2
    for iteration in range(args.iterations):
        batch = [seen[i] for i in torch.randperm(len(seen), generator=generator)[: args.batch_size].tolist()]
        optimizer.zero_grad()
        (-cell.scores(actions_KD, batch).mean()).backward()
        torch.nn.utils.clip_grad_norm_([actions_KD], LARGEST_GRADIENT)
        optimizer.step()
        falling.step()
        if iteration >= half:
            mean_KD += actions_KD.detach() / (args.iterations - half)
        if (iteration + 1) % PRINTED == 0:
            now = gain(cell, actions_KD, before, held_out, args.batch_size)
            print(line(f"{iteration + 1} iterations", now), flush=True)
    print(line("mean of their second half", gain(cell, mean_KD, before, held_out, args.batch_size)))


def line(name: str, estimate: Estimate) -> str:
    low, high = estimate.ci95
    return f"{name}: {estimate.value:+.2f} dB [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
