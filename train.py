"""Trains a ConsistencySolver by PPO against the full-step pictures of an offline dataset.

    accelerate launch train.py --config configs/mini_sd.yaml
    accelerate launch train.py --config configs/mini_sd.yaml --seed 1 --output_dir runs/second
    accelerate launch train.py --config configs/mini_sd.yaml --resume_from_checkpoint last

Leaves in `output_dir`: checkpoint-N, each a solver that can be loaded and resumed; best, the solver of the highest
held-out reward; contact_sheets; trainer_state.json, the log; what `report_to` writes.
"""

from solver.run_config import SolverRunConfig


def main(arguments: list[str] | None = None) -> None:
    from trl import TrlParser

    from solver.trainer_config import ConsistencySolverConfig

    parser = TrlParser((SolverRunConfig, ConsistencySolverConfig))
    config, args = parser.parse_args_and_config(arguments)
    train(config, args)


def train(config: SolverRunConfig, args) -> None:
    """One run. `args` is a `ConsistencySolverConfig`."""
    from solver.run_config import load_datasets, load_pipeline, load_rewards, make_solver
    from solver.trainer import ConsistencySolverTrainer

    pipe = load_pipeline(config)
    train_dataset, eval_dataset = load_datasets(config)
    trainer = ConsistencySolverTrainer(
        pipe, make_solver(config, pipe), load_rewards(config), args, train_dataset, eval_dataset
    )
    # Trainer looks for the last checkpoint itself where it is told `True`.
    checkpoint = {"last": True}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
    finally:
        trainer.end()


if __name__ == "__main__":
    main()
