"""The rows of the table: a solver on the model itself, or a distilled network with its own scheduler and guidance.

    extra:
    - {name: lcm, lora: latent-consistency/lcm-lora-sdv1-5, scheduler: LCMScheduler, steps: [2, 4], guidance_scale: 1}
    - {name: dmd2, unet: some/unet, scheduler: LCMScheduler, steps: [1], guidance_scale: 1}
    - {name: turbo, pipeline: stabilityai/sd-turbo, steps: [1, 2], guidance_scale: 0}
    - {name: weights only, solver: runs/weights_only}
    - {name: pndm, scheduler: PNDMScheduler, scheduler_kwargs: {skip_prk_steps: true}}

Where a repository has several files, `subfolder` and `weight_name` say which one a `lora` or `unet` is. Pickles are
never read.

A distilled row is compared with the full-step pictures of every guidance scale of the table, and runs at its own. A
row with its own `steps` is measured once a guidance scale, on the prompts of the first columns that have it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from data.teacher import open_pipeline
from evaluation.config import Columns, EvaluationConfig, check_guidance, check_step_list, read_mapping
from evaluation.solvers import Factory, by_class_name, check_run, classical, learned
from solver.samplers.cascade import replaced
from solver.samplers.latents import denoiser

NETWORKS = ("lora", "unet", "pipeline")
FILES = ("subfolder", "weight_name")
KEYS = {"name", "solver", *NETWORKS, *FILES, "scheduler", "scheduler_kwargs", "steps", "guidance_scale"}


@dataclass(frozen=True)
class Contender:
    """One solver of the comparison.

    Attributes:
        name: in the table.
        grids: factories of its scheduler; each is tried, the best is reported.
        network: `{"lora": id}`, `{"unet": id}` or `{"pipeline": id}` of a distilled model, the first two perhaps with
            `subfolder` and `weight_name`; empty for the model itself.
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

    def steps_in(self, columns: Columns, config: EvaluationConfig) -> tuple[int, ...]:
        """The numbers of steps at which some columns have it: its own in the first that do, at a guidance scale."""
        if not columns.measures(self.name):
            return ()
        if self.steps is None:
            return columns.steps
        here = (c for c in config.columns if c.guidance_scale == columns.guidance_scale and c.measures(self.name))
        return self.steps if columns is next(here) else ()


def contenders(config: EvaluationConfig, pipe: DiffusionPipeline) -> list[Contender]:
    """All rows of a config, the learned solver first.

    Raises:
        ValueError: an unknown solver, key or scheduler, two rows of one name, a row that no columns measure, 'base'
            without a learned solver, or a solver that does not fit the model, or one of its cells.
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
    if idle := [name for name in names if not any(columns.measures(name) for columns in config.columns)]:
        raise ValueError(f"rows {', '.join(idle)}: no columns have them; name them in an `only`, or leave them out.")
    for row in rows:
        _check_cells(row, config, pipe)
    return rows


def _check_cells(row: Contender, config: EvaluationConfig, pipe: DiffusionPipeline) -> None:
    """Raises ValueError, before anything is rendered, where a row cannot run in all of its cells."""
    if "pipeline" in row.network:  # its scheduler comes with it
        return
    for columns in config.columns:
        guidance = columns.guidance_scale if row.guidance_scale is None else row.guidance_scale
        for steps in row.steps_in(columns, config):
            try:
                for make in row.grids.values():
                    check_run(make(pipe.scheduler, steps, guidance), steps)
            except ValueError as error:
                raise ValueError(f"{row.name}, guidance {guidance:g}, {steps} steps: {error}") from error


def extra(row: Mapping, pipe: DiffusionPipeline) -> Contender:
    """A row given as a mapping. Raises ValueError if its keys do not fit together."""
    if unknown := row.keys() - KEYS:
        raise ValueError(
            f"extra row {dict(row)}: no {', '.join(sorted(unknown))}; the keys are {', '.join(sorted(KEYS))}."
        )
    network = {key: row[key] for key in NETWORKS if row.get(key)}
    if not row.get("name") or len(network) + bool(row.get("solver")) > 1:
        raise ValueError(f"extra row {dict(row)}: expected a name and at most one of solver, {', '.join(NETWORKS)}.")
    files = {key: row[key] for key in FILES if row.get(key)}
    if files and not network.keys() & {"lora", "unet"}:
        raise ValueError(f"extra row {row['name']!r}: {', '.join(files)} is the file of a lora or unet.")
    for key in ("name", "solver", *NETWORKS, *FILES, "scheduler"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"extra row {row['name']!r}: {key}={row[key]!r}: expected text.")
    if not files.get("weight_name", ".safetensors").endswith(".safetensors"):
        raise ValueError(
            f"extra row {row['name']!r}: weight_name={row['weight_name']!r}: expected a .safetensors file."
        )
    if row.get("solver"):
        grids = learned(row["solver"], pipe.scheduler)
    else:
        settings = read_mapping(row.get("scheduler_kwargs") or {}, f"extra row {row['name']!r}: scheduler_kwargs")
        grids = by_class_name(row.get("scheduler"), settings)
    steps, guidance = row.get("steps"), row.get("guidance_scale")
    steps = None if steps is None else check_step_list(f"extra row {row['name']!r}: steps", steps)
    guidance = None if guidance is None else check_guidance(f"extra row {row['name']!r}: guidance_scale", guidance)
    return Contender(row["name"], grids, network | files, steps, guidance)


@contextmanager
def open_network(contender: Contender, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The pipeline of a contender; afterwards `pipe` is what it was.

    Raises:
        ImportError: a LoRA without peft.
        OSError: there is no such network.
        ValueError: it does not fit the pipeline.
    """
    if not contender.network:
        yield pipe
        return
    (kind,) = contender.network.keys() & set(NETWORKS)
    path = contender.network[kind]
    files = {key: contender.network[key] for key in FILES if key in contender.network}
    if kind == "pipeline":
        editing = type(pipe).__name__ if isinstance(pipe, FluxKontextPipeline) else None  # its model names another
        yield open_pipeline(path, denoiser(pipe).dtype, editing).to(pipe.device)
    elif kind == "unet":
        name = "unet" if pipe.components.get("unet") is not None else "transformer"
        with replaced(pipe, name, _network(denoiser(pipe), path, **files).to(pipe.device).eval()):
            yield pipe
    else:
        with _lora(pipe, path, files):
            yield pipe


def _network(own: torch.nn.Module, path: str, subfolder: str | None = None, weight_name: str | None = None):
    """A network of the same class; from a single file, one of the same configuration."""
    if weight_name is None:
        return type(own).from_pretrained(path, subfolder=subfolder, dtype=own.dtype, use_safetensors=True)
    file = Path(path, subfolder or "", weight_name)
    if not Path(path).is_dir():
        file = hf_hub_download(path, weight_name, subfolder=subfolder)
    network = type(own).from_config(own.config).to(own.dtype)
    try:
        network.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"unet={path!r}: {weight_name} does not fit this {type(own).__name__}: {error}") from error
    return network


@contextmanager
def _lora(pipe: DiffusionPipeline, path: str, files: Mapping[str, str]) -> Iterator[None]:
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise ImportError(f"lora={path!r} needs peft, which diffusers loads LoRAs with: pip install peft.")
    pipe.load_lora_weights(path, use_safetensors=True, **files)
    try:
        yield
    finally:
        pipe.unload_lora_weights()
