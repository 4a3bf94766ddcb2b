"""Hands a learned solver to others: as a solver folder, as a baked table, or inside a whole pipeline.

    python -m solver.export runs/mini_sd/best --to solver out/solver
    python -m solver.export runs/mini_sd/best --to table out/table --guidance_scale 3
    python -m solver.export runs/mini_sd/best --to pipeline out/pipeline --guidance_scale 3
    python -m solver.export --from-public model.ckpt --to solver out/published

| to       | what is in the folder                                | what it needs to load                            |
|----------|------------------------------------------------------|--------------------------------------------------|
| solver   | config and weights, for any guidance scale           | this package, or the `.py` file beside it        |
| table    | config with the numbers of one guidance scale        | the `.py` file beside it: torch, diffusers       |
| pipeline | the model with such a table as its scheduler         | diffusers with `trust_remote_code=True`          |

A table has the numbers of steps that the solver was trained on, unless `--steps` names others. Each has a model card
that says how to load it, with the evaluation table if `--metrics` names a metrics.json.
"""

import argparse
import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.command_line import errors_as_sentences

if TYPE_CHECKING:
    from solver import ConsistencySolverScheduler

KINDS = ("solver", "table", "pipeline")
CLASS_NAME = "ConsistencySolverScheduler"
MODULE = "solver.scheduling_consistency_solver"  # what model_index.json records; it never moves

CARD = """\
---
library_name: diffusers
license: apache-2.0
tags: [diffusers, scheduler, consistency-solver, proofsheet]
{base_model}---

# ConsistencySolver{for_model}

A linear multistep solver of order {order} whose {learned} learned, so that few steps give the picture \
that many steps give: same prompt, same seed, same picture. It stands on the rule `{rule}`. {trained} {what}

```python
{usage}
```

## Coefficients

{steps} steps, guidance {guidance:g}: where the network is asked, and the weights on its predictions, newest first.

{coefficients}
{evaluation}
Made with Proofsheet, after "Image Diffusion Preview with Consistency Solver", \
[arXiv 2512.13592](https://huggingface.co/papers/2512.13592).
"""
WHAT = {
    "solver": "Tell it the guidance scale, pipelines do not.",
    "published": "It does not look at the guidance scale.",
    "table": "The numbers for guidance {guidance:g} and {counts} steps are in `scheduler_config.json`; "
    "there are no weights. Any other number of steps is an error, another guidance goes unnoticed.",
    "pipeline": "It is the scheduler of this pipeline, for guidance {guidance:g} and {counts} steps. Any other number "
    "of steps is an error, another guidance goes unnoticed.",
}
SHIFTED = (
    " They are exact for pictures whose grid is shifted by μ = {mu:g}, so of one size; on the grids of others it uses "
    "the same residuals. `--mu` bakes for another size."
)
LEARNED = {  # learn_weights, learn_grid
    (True, True): "weights and time grid were",
    (True, False): "weights were",
    (False, True): "time grid was",
    (False, False): "weights are a rule's, and not",
}
LOAD_CLASS = """\
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

folder = "{folder}"  # this repository, or a copy of it; its .py file is executed
Solver = get_class_from_dynamic_module(
    folder, "scheduling_consistency_solver.py", class_name="ConsistencySolverScheduler", trust_remote_code=True
)
pipe.scheduler = Solver.from_pretrained(folder)"""
USAGE = {
    "solver": LOAD_CLASS + "\npipe.scheduler.guidance_scale = {guidance:g}"
    '\npipe("...", num_inference_steps={steps}, {told})',
    "table": LOAD_CLASS + '\npipe("...", num_inference_steps={steps}, {told})',
    "pipeline": """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)
pipe("...", num_inference_steps={steps}, {told})""",
}


def export(
    solver: "ConsistencySolverScheduler",
    kind: str,
    output: str | Path,
    model: str | None = None,
    guidance_scale: float | None = None,
    steps: Sequence[int] | None = None,
    mu: float | None = None,
    metrics: dict | None = None,
) -> Path:
    """Writes a solver to a new folder and returns it.

    Args:
        solver: trained or baked.
        kind: one of `KINDS`.
        output: must not exist, or be empty.
        model: hub id or local folder of the pipeline; by default the one that the solver was trained on. A pipeline
            export needs it, the others name it on the card.
        guidance_scale: to bake for, or that the exported solver begins with; the solver's own by default.
        steps: to bake for; by default the `known_steps` of the solver, so those it was trained on.
        mu: to bake a flow model with dynamic shifting for; by default that of its largest image. A baked table does
            not say what it was baked for, so there it must be given.
        metrics: content of metrics.json, for the card; of this solver.

    Raises:
        ValueError: the folder is not empty, `mu` is needed or means nothing, a pipeline without a model or of another
            noise schedule, a guidance scale that is not finite, steps for a solver, metrics of another solver, or a
            baked solver that is to get back its weights or another guidance scale.
        OSError: there is no such model, or the folder cannot be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; choose a new folder.")
    _check_metrics(metrics, solver)
    model = solver.config.trained_model if model is None else model
    guidance = solver.guidance_scale if guidance_scale is None else guidance_scale
    if mu is not None and not solver.config.use_dynamic_shifting:
        raise ValueError(f"--mu {mu:g}: this solver's grid is not shifted by the size of the image; leave it out.")
    if mu is None and solver.config.use_dynamic_shifting and solver.policy is None:
        raise ValueError("This table does not record the shift that it was baked for; say it with --mu.")
    if solver.config.use_dynamic_shifting and mu is None:
        mu = solver.config.max_shift
    if kind == "solver":
        if solver.policy is None:
            raise ValueError("A baked table has no weights, so it cannot become a solver; export it as a table.")
        if steps is not None:
            raise ValueError(f"--steps {steps[0]}: a solver keeps all that it was trained on; leave it out.")
        exported = copy.deepcopy(solver)
        exported.guidance_scale = guidance
        exported.register_to_config(guidance_scale=guidance)
    else:
        exported = _bake(solver, guidance_scale, steps, mu)
    if kind == "pipeline":
        _copy_pipeline(model, exported, output)
    else:
        exported.save_pretrained(output)
        shutil.copy(_source_file(), output / _source_file().name)
    (output / "README.md").write_text(model_card(exported, kind, output.name, model, metrics, mu))
    return output


def _check_metrics(metrics: dict | None, solver) -> None:
    """Raises ValueError for the evaluation of another solver. Of a baked one it cannot be told."""
    from solver.samplers.digest import solver_digest

    evaluated, own = (metrics or {}).get("learned_digest"), solver_digest(solver)
    if evaluated and own and evaluated != own:
        raise ValueError(f"The metrics are of another solver, {metrics['learned']}; evaluate this one for its card.")


def _bake(solver, guidance_scale, steps, mu):
    if not solver.config.use_dynamic_shifting:
        return solver.bake(steps, guidance_scale, mu)
    # Pipelines of these models name their own grid, and the baked residuals are applied to that.
    return solver.bake(steps, guidance_scale, mu, lambda count: [1 - i / count for i in range(count)])


def _copy_pipeline(model: str | None, baked, output: Path) -> None:
    """The files of a pipeline as they are, bit for bit, with another scheduler."""
    import diffusers

    if model is None:
        raise ValueError("A pipeline export needs --model: this solver does not record what it was trained on.")
    try:
        folder = Path(model) if Path(model).is_dir() else Path(diffusers.DiffusionPipeline.download(model))
    except OSError as error:
        raise OSError(f"model {model!r} is no pipeline folder here, and none on the hub or in its cache.") from error
    if not (folder / "model_index.json").is_file():
        raise OSError(f"{model!r} is no pipeline: it has no model_index.json.")
    try:
        index = dict(json.loads((folder / "model_index.json").read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{model!r} is no pipeline: its model_index.json cannot be read: {error}.") from error
    name = index.get("scheduler", [None, None])[1]
    if not hasattr(diffusers, name or ""):
        raise ValueError(f"{model!r} has the scheduler {name}, which is none of diffusers; use the original pipeline.")
    baked.check_compatible(getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler"))
    output.mkdir(parents=True, exist_ok=True)
    for part in index:
        if (folder / part).is_dir() and part != "scheduler":
            shutil.copytree(folder / part, output / part)
    index["scheduler"] = [MODULE, CLASS_NAME]
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    baked.save_pretrained(output / "scheduler")
    shutil.copy(_source_file(), output / "scheduler" / f"{MODULE}.py")


def _source_file() -> Path:
    """The solver's own source: one file that needs nothing of this package."""
    return Path(__file__).with_name("scheduling_consistency_solver.py")


def model_card(
    solver, kind: str, folder: str, model: str | None, metrics: dict | None, mu: float | None = None
) -> str:
    """README.md of an export: what it is, how to load it, its coefficients, how good it is."""
    published = kind == "solver" and solver.config.inputs == "published"
    counts, guidance = solver.known_steps, solver.guidance_scale
    facts = {"folder": folder, "guidance": guidance, "steps": 5 if 5 in counts else counts[0]}
    facts |= {"counts": _span(counts), "told": _told(model, guidance)}
    on_hub = model and not Path(model).exists()
    shifted = SHIFTED.format(mu=mu) if solver.policy is None and mu is not None else ""
    return CARD.format(
        base_model=f"base_model: {model}\n" if on_hub else "",
        for_model=f" for {model}" if model else "",
        order=solver.config.solver_order,
        learned=LEARNED[solver.config.learn_weights, solver.config.learn_grid],
        rule=solver.config.base_rule,
        trained=_trained(solver),
        what=WHAT["published" if published else kind].format(**facts) + shifted,
        usage=USAGE[kind].format(**facts),
        coefficients=_coefficients(solver, facts["steps"], guidance),
        evaluation=_evaluation(metrics) if metrics else "",
        **facts,
    )


def _told(model: str | None, guidance: float) -> str:
    """How a pipeline is told the guidance scale: some transformers know none, and are guided by an empty prompt."""
    config = Path(model, "transformer", "config.json") if model else None
    if config and config.is_file() and json.loads(config.read_text()).get("guidance_embeds") is False:
        return f'negative_prompt="", true_cfg_scale={guidance:g}'
    return f"guidance_scale={guidance:g}"


def _span(counts: Sequence[int]) -> str:
    gapless = 1 < len(counts) == counts[-1] - counts[0] + 1
    return f"{counts[0]} to {counts[-1]}" if gapless else ", ".join(map(str, counts))


def _trained(solver) -> str:
    if solver.config.trained_steps is None:
        return "Which numbers of steps it was trained on is not recorded."
    fewest, most = solver.config.trained_steps
    trained = range(fewest, most + 1)
    others = solver.policy is not None or not set(solver.known_steps) <= set(trained)
    outside = "; in any other number of steps it is that rule, on its own grid" if others else ""
    scales = solver.config.trained_guidance_scales
    guidance = f" and at guidance scales of {scales[0]:g} to {scales[1]:g}" if scales else ""
    if scales and scales[0] == scales[1]:
        guidance = f" and at a guidance scale of {scales[0]:g}"
    return f"It was trained on {_span(trained)} steps{guidance}{outside}."


def _coefficients(solver, steps: int, guidance: float) -> str:
    if solver.policy is None:  # the numbers that will run
        baked = solver.config.coefficients[str(steps)]
        timesteps, weights = baked["timesteps"], baked["weights"]
    elif solver.config.use_dynamic_shifting:
        return "They depend on the size of the image: `scheduler.coefficients(steps, guidance, mu=..., sigmas=...)`."
    else:
        found = solver.coefficients(steps, guidance)
        timesteps, weights = found.timesteps.tolist(), found.weights.tolist()
    order = len(weights[0])
    lines = ["| step | timestep | " + " | ".join(f"w{j + 1}" for j in range(order)) + " |", "|---" * (order + 2) + "|"]
    for i, (t, row) in enumerate(zip(timesteps, weights, strict=True)):
        lines.append(f"| {i + 1} | {t:.1f} | " + " | ".join(f"{weight:.3f}" for weight in row) + " |")
    return "\n".join(lines) + "\n"


def _evaluation(metrics: dict) -> str:
    """The learned solver and, at each of its step counts, the best of the others by the main metric."""
    main = metrics.get("main_metric") or next(iter(metrics["rows"][0]["metrics"]))
    about = metrics.get("metrics", {})
    names = list(about or metrics["rows"][0]["metrics"])
    up = {name: about.get(name, {}).get("higher_is_better", True) for name in names}
    heads = [
        f"{name}{' †' * about.get(name, {}).get('trained_on', False)}{'' if up[name] else ' ↓'}" for name in names
    ]
    lines = [
        "## Evaluation",
        "",
        f"{metrics['model']}, prompts from `{metrics['dataset']['prompts']}`. The best other solver by {main} beside "
        "it, on its best grid. ± is half of the 95 % bootstrap interval; † was the reward in training.",
        "",
        "| guidance | steps | solver | " + " | ".join(heads) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    learned = [row for row in metrics["rows"] if row["solver"] == "learned"]
    for row in learned:
        cell = (row["guidance_scale"], row["steps"])
        others = [
            other
            for other in metrics["rows"]
            if other["solver"] != "learned"
            and (other["guidance_scale"], other["steps"]) == cell
            and main in other["metrics"]  # the full steps have none to compare
        ]
        sign = 1 if up[main] else -1
        best = max(others, key=lambda other: sign * other["metrics"][main]["mean"], default=None)
        lines += [_evaluation_line(entry, names) for entry in (row, best) if entry]
    return "\n".join(lines) + "\n" if learned else ""


def _evaluation_line(row: dict, names: Sequence[str]) -> str:
    values = [row["metrics"].get(name) for name in names]
    texts = [f"{v['mean']:.3g} ± {(v['ci95'][1] - v['ci95'][0]) / 2:.2g}" if v else "" for v in values]
    return "| " + " | ".join([f"{row['guidance_scale']:g}", str(row["steps"]), row["solver"], *texts]) + " |"


def read_metrics(path: Path) -> dict:
    """metrics.json of evaluate.py. Raises OSError or ValueError, naming the file, if it is none."""
    try:
        metrics = json.loads(path.read_text())
        _evaluation(metrics)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}. Give the metrics.json of evaluate.py.") from error
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is no metrics.json of evaluate.py: {type(error).__name__}, {error}.") from error
    return metrics


def load_solver(source: str | None, public: str | None) -> "ConsistencySolverScheduler":
    """A solver from its folder or hub id, or from the public checkpoint.

    Raises:
        ValueError: neither or both are given, or it is something else than a solver.
        OSError: there is none, or it has no weights.
    """
    from solver import ConsistencySolverScheduler, convert_public_checkpoint

    if (source is None) == (public is None):
        raise ValueError("Give either the folder of a solver or --from-public model.ckpt.")
    if public is not None:
        return convert_public_checkpoint(public)
    return ConsistencySolverScheduler.from_pretrained(source)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solver.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="solver folder, checkpoint of a training run, or hub id")
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--to", choices=KINDS, required=True)
    parser.add_argument("--from-public", metavar="CKPT", help="the public model.ckpt, in place of a source")
    parser.add_argument("--model", help="hub id or local folder of the pipeline; the one it was trained on by default")
    parser.add_argument("--guidance_scale", type=float, help="to bake for, or begin with; the solver's own by default")
    parser.add_argument("--steps", type=int, nargs="+", help="to bake for; those it was trained on by default")
    parser.add_argument("--mu", type=float, help="shift to bake for, of flow models whose grid depends on the size")
    parser.add_argument("--metrics", type=Path, help="metrics.json of evaluate.py, for the model card")
    return parser


def main(args: list[str] | None = None) -> Path:
    given = make_parser().parse_intermixed_args(args)
    solver = load_solver(given.source, given.from_public)
    metrics = read_metrics(given.metrics) if given.metrics else None
    output = export(solver, given.to, given.output, given.model, given.guidance_scale, given.steps, given.mu, metrics)
    print(f"{output}: {given.to}; its README.md says how to load it.")
    return output


if __name__ == "__main__":
    with errors_as_sentences("solver.export"):
        main()
