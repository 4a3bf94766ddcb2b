"""Trains a ConsistencySolver by PPO against the full-step pictures of an offline dataset.

    accelerate launch train.py --config configs/mini_sd.yaml
    accelerate launch train.py --config configs/mini_sd.yaml --seed 1 --output_dir runs/second
    accelerate launch train.py --config configs/mini_sd.yaml --resume_from_checkpoint last

Leaves in `output_dir`: checkpoint-N, each a solver that can be loaded and resumed; best, the solver of the highest
held-out reward; final, that of the last update; contact_sheets; trainer_state.json, the log; what `report_to` writes.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import answer_help, errors_as_sentences
from solver.ppo_knobs import PPOKnobs
from solver.run_config import SolverRunConfig, find_checkpoint

if TYPE_CHECKING:
    from solver.trainer import ConsistencySolverTrainer

OTHERS = """
and everything in transformers.TrainingArguments, among it:
  --output_dir, --seed, --eval_strategy, --eval_steps, --save_strategy, --save_total_limit, --report_to, --use_cpu,
  --resume_from_checkpoint (a folder, or "last")"""
RESULTS = ("best", "final")  # folders of solvers in output_dir


def main(arguments: list[str] | None = None) -> None:
    answer_help(arguments, __doc__, SolverRunConfig, PPOKnobs, more=OTHERS)
    with errors_as_sentences("train.py"):
        trainer, checkpoint = prepare(arguments)
    try:  # what goes wrong from here on is worth a traceback
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(Path(trainer.args.output_dir) / "final")
        trainer.save_state()
    finally:
        trainer.end()


def prepare(arguments: list[str] | None) -> "tuple[ConsistencySolverTrainer, str | None]":
    """The trainer of a command line, and what it is to resume from."""
    from trl import TrlParser

    from solver.run_config import load_datasets, load_pipeline, load_rewards, make_solver
    from solver.trainer import ConsistencySolverTrainer
    from solver.trainer_config import ConsistencySolverConfig

    config, args = TrlParser((SolverRunConfig, ConsistencySolverConfig), allow_abbrev=False).parse_args_and_config(
        arguments
    )
    checkpoint = check_output(Path(args.output_dir), args.resume_from_checkpoint)
    pipe = load_pipeline(config)
    train_dataset, eval_dataset = load_datasets(config)
    solver, rewards = make_solver(config, pipe), load_rewards(config)
    solver.register_to_config(trained_model=config.model)
    trainer = ConsistencySolverTrainer(pipe, solver, rewards, args, train_dataset, eval_dataset)
    if checkpoint:
        trainer.check_checkpoint(checkpoint)
    return trainer, checkpoint


def check_output(folder: Path, checkpoint: str | None) -> str | None:
    """The checkpoint to resume from. Raises ValueError without one, or if a new run would mix with an earlier one."""
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    kept = checkpoints + [name for name in RESULTS if (folder / name).exists()]
    if checkpoint is None and kept:
        going_on = (
            "Go on with it by --resume_from_checkpoint last, or choose" if checkpoints else "Delete it, or choose"
        )
        raise ValueError(
            f"output_dir={str(folder)!r} has {', '.join(kept)} of an earlier run. {going_on} another folder."
        )
    return checkpoint and find_checkpoint(checkpoint, folder)


if __name__ == "__main__":
    main()
