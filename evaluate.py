"""Compares solvers on held-out prompts: consistency to the full-step picture, cost, ranks, all with intervals.

    python evaluate.py --config configs/eval_mini_sd.yaml
    python evaluate.py --config configs/eval_mini_sd.yaml --learned out/solver \\
        --columns '{"guidance_scale": 3, "steps": [5, 8], "num_prompts": 50}'

The first line says what it costs, in network evaluations (guidance counts once) and minutes.

Writes metrics.json, table.md, plots and contact_sheet.png into `output_dir`. Finished cells are kept in its `cache`:
the same command goes on after an interruption, and measures only what is new after a change of the config.
"""

import logging

from data.command_line import answer_help, errors_as_sentences
from evaluation.config import EvaluationConfig


def main(args: list[str] | None = None) -> dict:
    answer_help(args, __doc__, EvaluationConfig)
    from trl import TrlParser

    from evaluation.run import evaluate

    (config,) = TrlParser((EvaluationConfig,), allow_abbrev=False).parse_args_and_config(args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("evaluation").setLevel(logging.INFO)
    metrics = evaluate(config)
    print(f"{config.output_dir}/table.md, contact_sheet.png, metrics.json: {len(metrics['rows'])} rows.")
    return metrics


if __name__ == "__main__":
    with errors_as_sentences("evaluate.py"):
        main()
