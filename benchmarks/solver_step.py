"""What the solver, the rollouts and the dataset builder cost beside the network evaluations that they are made of.

    python -m benchmarks.solver_step --output runs/solver_step.json    # GPU: published shapes; CPU: tiny networks
    python -m benchmarks.solver_step --output runs/solver_step.json --families sd15 flux-dev

Pipelines of the published shapes, or tiny ones, with random weights (`benchmarks.shapes`). One row a family:

* `evaluation_ms`: the denoiser on a batch, guidance included where it doubles the rows;
* `step_ms`, `step_percent`: the learned solver of order 4, one table for all rows, its making included; of an
  evaluation (bar: below 1 %);
* `rollouts_per_s`: groups of one prompt and seed under tables of their own, decoded, as the trainer renders them;
* `images_per_s`, `builder_percent`: the dataset builder, decoding and shards included, and what the bare evaluations
  would take of its time (bar: 95 % at the teacher's number of steps). Prompts are encoded already, and there are no
  rewards: text encoders and reward networks come on top of it.

Medians after a warm-up.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.clock import command_line, evaluation_s, median_s, parse, print_row, write_report
from benchmarks.shapes import FAMILIES, build_pipeline
from data.shards import shard_paths, write_shard
from data.teacher import Row, Teacher
from solver import ConsistencySolverScheduler
from solver.rollout import Renderer, replaced
from solver.samplers.latents import denoiser

IMAGES = ("sd15", "sdxl", "sd35-large", "flux-dev")


def step_s(scheduler: ConsistencySolverScheduler, sample: torch.Tensor, steps: int, repeats: int, **grid) -> float:
    """Seconds of a step of the solver: those of whole runs, asking the policy included, divided by their steps."""
    output = torch.randn_like(sample)

    def run():
        scheduler.set_timesteps(steps, device=sample.device, **grid)
        scheduler.set_begin_index(0)
        for t in scheduler.timesteps:
            scheduler.step(output, t, sample, return_dict=False)

    return median_s(run, repeats, sample.device) / steps


@torch.no_grad()
def measure(family: str, given: argparse.Namespace) -> dict:
    """A row of the table."""
    device, dtype = given.device, given.dtype
    pipe = build_pipeline(family, given.tiny, device, dtype)
    size = 64 if given.tiny else FAMILIES[family].size[0]
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=4)
    renderer = Renderer(pipe, solver, size, size, batch_size=given.group)
    grid = renderer.grid(given.steps, "x")

    # The builder, against its evaluations alone
    teacher = Teacher(pipe, (), given.teacher_steps, size, size)
    rows = [Row("x", seed, 3.5) for seed in range(given.batch)]
    call = {"prompt": ["x"] * given.batch, "guidance_scale": 3.5, "height": size, "width": size}
    evaluation = evaluation_s(pipe, {**call, "num_inference_steps": 2}, given.repeats)
    with tempfile.TemporaryDirectory() as folder:
        (shard,) = shard_paths(Path(folder), len(rows), len(rows))
        builder = median_s(lambda: write_shard(shard, teacher.render(rows), [], []), given.repeats, device)

    # The solver and the rollouts
    latents = torch.randn(given.batch, *renderer.latent_shape, device=device, dtype=dtype)
    with replaced(pipe, "scheduler", solver):
        step = step_s(solver, latents, given.steps, 10 * given.repeats, **grid)
    actions = 0.1 * torch.randn(given.group, given.steps, solver.num_actions)
    table = solver.table_from_actions(actions, given.steps, **grid)
    rollouts = median_s(
        lambda: renderer.render(["x"] * given.group, [0] * given.group, 3.5, table), given.repeats, device
    )
    return {
        "family": family,
        "parameters_B": sum(p.numel() for p in denoiser(pipe).parameters()) / 1e9,
        "pixels": size,
        "evaluation_ms": 1000 * evaluation,
        "step_ms": 1000 * step,
        "step_percent": 100 * step / evaluation,
        "rollouts_per_s": given.group / rollouts,
        "images_per_s": given.batch / builder,
        "builder_percent": 100 * given.teacher_steps * evaluation / builder,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", choices=IMAGES, default=IMAGES)
    parser.add_argument("--batch", type=int, default=4, help="images of an evaluation and of the builder's batch")
    parser.add_argument("--group", type=int, default=8, help="rollouts of one prompt and seed")
    parser.add_argument("--steps", type=int, default=5, help="of the solver and the rollouts")
    parser.add_argument("--teacher_steps", type=int, default=40, help="of the builder")
    given = parse(parser, arguments)
    rows = []
    for family in given.families:
        rows.append(measure(family, given))
        if given.device.type == "cuda":
            torch.cuda.empty_cache()
        print_row(rows[-1])
    write_report(given, {"rows": rows})


if __name__ == "__main__":
    main()
