"""The rows of the table: a solver on the model itself, or a distilled network with its own scheduler and guidance.

    extra:
    - {name: lcm, lora: latent-consistency/lcm-lora-sdv1-5, scheduler: LCMScheduler, steps: [2, 4], guidance_scale: 1}
    - {name: dmd2, unet: some/unet, scheduler: LCMScheduler, steps: [1], guidance_scale: 1}
    - {name: turbo, pipeline: stabilityai/sd-turbo, steps: [1, 2], guidance_scale: 0}
    - {name: weights only, solver: runs/weights_only}
    - {name: pndm, scheduler: PNDMScheduler, scheduler_kwargs: {skip_prk_steps: true}}

A distilled row is compared with the full-step pictures of every guidance scale of the table, and runs at its own. A
row with its own `steps` is measured once a guidance scale, on the prompts of its first columns.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline, FluxKontextPipeline

from data.teacher import open_pipeline
from evaluation.config import EvaluationConfig
from evaluation.solvers import Factory, by_class_name, classical, learned
from solver.samplers.cascade import replaced
from solver.samplers.latents import denoiser

NETWORKS = ("lora", "unet", "pipeline")
KEYS = {"name", "solver", *NETWORKS, "scheduler", "scheduler_kwargs", "steps", "guidance_scale"}


@dataclass(frozen=True)
class Contender:
    """One solver of the comparison.

    Attributes:
        name: in the table.
        grids: factories of its scheduler; each is tried, the best is reported.
        network: `{"lora": id}`, `{"unet": id}` or `{"pipeline": id}` of a distilled model; empty for the model itself.
        steps: its own numbers of steps; the table's where it is None.
        guidance_scale: its own; the table's where it is None.
        is_classical: a solver that was not trained on anything, and competes in the choice of grid and finalists.
    """

    name: str
    grids: Mapping[str, Factory]
    network: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    is_classical: bool = False


def contenders(config: EvaluationConfig, pipe: DiffusionPipeline) -> list[Contender]:
    """All rows of a config, the learned solver first.

    Raises:
        ValueError: an unknown solver, key or scheduler, two rows of one name, 'base' without a learned solver, or a
            solver that does not fit the model.
        OSError: a solver is missing or has no weights.
    """
    own = pipe.scheduler
    rows = [Contender("learned", learned(config.learned, own))] if config.learned else []
    for name in config.solvers:
        if name == "base" and not config.learned:
            raise ValueError("solver 'base' is the learned one without its training: it needs `learned`.")
        grids = learned(config.learned, own, untrained=True) if name == "base" else classical(name, own)
        rows.append(Contender(name, grids, is_classical=name != "base"))
    rows += [extra(row, pipe) for row in config.extra]
    names = [row.name for row in rows]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"rows named {', '.join(sorted(repeated))} occur twice; every name must be its own.")
    if "full" in names:
        raise ValueError("a row named 'full': that is the name of the full-step pictures.")
    if unknown := {name for columns in config.columns for name in columns.only or ()} - set(names):
        raise ValueError(f"columns: only={', '.join(sorted(unknown))}: expected some of the rows {', '.join(names)}.")
    return rows


def extra(row: Mapping, pipe: DiffusionPipeline) -> Contender:
    """A row given as a mapping. Raises ValueError if its keys do not fit together."""
    if unknown := row.keys() - KEYS:
        raise ValueError(
            f"extra row {dict(row)}: no {', '.join(sorted(unknown))}; the keys are {', '.join(sorted(KEYS))}."
        )
    network = {key: row[key] for key in NETWORKS if row.get(key)}
    if "name" not in row or len(network) + bool(row.get("solver")) > 1:
        raise ValueError(f"extra row {dict(row)}: expected a name and at most one of solver, {', '.join(NETWORKS)}.")
    if row.get("solver"):
        grids = learned(row["solver"], pipe.scheduler)
    else:
        grids = by_class_name(row.get("scheduler"), row.get("scheduler_kwargs") or {})
    steps = tuple(row["steps"]) if row.get("steps") else None
    return Contender(row["name"], grids, network, steps, row.get("guidance_scale"))


@contextmanager
def open_network(contender: Contender, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The pipeline of a contender; afterwards `pipe` is what it was.

    Raises:
        ImportError: a LoRA without peft.
        OSError: there is no such network.
    """
    if not contender.network:
        yield pipe
        return
    ((kind, path),) = contender.network.items()
    if kind == "pipeline":
        editing = type(pipe).__name__ if isinstance(pipe, FluxKontextPipeline) else None  # its model names another
        yield open_pipeline(path, denoiser(pipe).dtype, editing).to(pipe.device)
    elif kind == "unet":
        name = "unet" if pipe.components.get("unet") is not None else "transformer"
        own = denoiser(pipe)
        with replaced(pipe, name, type(own).from_pretrained(path, dtype=own.dtype).to(pipe.device).eval()):
            yield pipe
    else:
        with _lora(pipe, path):
            yield pipe


@contextmanager
def _lora(pipe: DiffusionPipeline, path: str) -> Iterator[None]:
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise ImportError(f"lora={path!r} needs peft, which diffusers loads LoRAs with: pip install peft.")
    pipe.load_lora_weights(path)
    try:
        yield
    finally:
        pipe.unload_lora_weights()
