"""Where a full-size run was left: two files, `name.safetensors` and `name.json`, that outlive the process.

A checkpoint says everything that decides the rest of the run: the latents, the solver's history, the pipeline and its
weights, the grid, and what the pipeline is called with. It refuses to go on with anything else.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from solver.samplers.cascade import require_deterministic
from solver.samplers.digest import adapters, tensors_digest, weights_digest
from solver.samplers.latents import denoiser
from solver.scheduling_consistency_solver import ConsistencySolverScheduler

FORMAT = 3
PICTURE_MODES = ("L", "RGB", "RGBA")  # of PIL, told apart by the shape of their arrays
# What a solver remembers from step to step. `_step_index` is set anew.
HISTORY = {
    "FlowMatchEulerDiscreteScheduler": (),
    "ConsistencySolverScheduler": ("_history",),
    "UniPCMultistepScheduler": ("model_outputs", "timestep_list", "last_sample", "lower_order_nums", "this_order"),
    "DPMSolverMultistepScheduler": ("model_outputs", "lower_order_nums"),
    "DEISMultistepScheduler": ("model_outputs", "lower_order_nums"),
}


@dataclass
class Checkpoint:
    """A full-size run of one picture, after some of its steps.

    Attributes:
        next_step: the step it goes on with.
        num_inference_steps: of the whole run.
        height, width: in pixels.
        sigmas: (N+1,) of the whole run.
        latents: (C, [T,] H, W) after step `next_step - 1`, unpacked, in the dtype of the run.
        history: what the solver remembers, tensors with a leading 1.
        numbers: likewise, what is no tensor.
        call: what the pipeline is called with, besides size and steps: numbers, texts, tensors such as embeddings,
            pictures to edit.
        missing: names of what it was called with besides, which cannot be written to a file; `refine` has to be given
            it again.
        made_by: pipeline, weights, solver and versions, as `fingerprint` names them.
    """

    next_step: int
    num_inference_steps: int
    height: int
    width: int
    sigmas: list[float]
    latents: Tensor
    history: dict[str, Tensor]
    numbers: dict
    call: dict
    missing: list[str]
    made_by: dict
    seed: int | None = None
    format: int = field(default=FORMAT)

    def save(self, path: str | Path) -> None:
        """Writes `path` with the suffixes .safetensors and .json; the JSON last, so that a torn write has none."""
        numbers_path, tensors_path = _files(path)
        numbers_path.parent.mkdir(parents=True, exist_ok=True)
        texts = asdict(self)
        tensors = {f"history.{name}": value for name, value in texts.pop("history").items()}
        tensors["latents"] = texts.pop("latents")
        texts["call"], written = _written_call(self.call)
        tensors = {name: value.detach().cpu().contiguous() for name, value in {**tensors, **written}.items()}
        texts["digest"] = _digest(texts, tensors)
        save_file(tensors, tensors_path)
        numbers_path.write_text(json.dumps(texts, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Checkpoint":
        """Reads what `save` wrote.

        Raises:
            OSError: a file is missing.
            ValueError: it is no checkpoint, of another format, or one of the two files is not what was written.
        """
        numbers_path, tensors_path = _files(path)
        try:
            texts = json.loads(numbers_path.read_text())
            tensors = load_file(tensors_path)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{path}: no checkpoint that can be read ({error}); make the preview again.") from error
        found = texts.get("format") if isinstance(texts, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path}: checkpoint of format {found}, expected {FORMAT}; make the preview again.")
        if texts.pop("digest", None) != _digest(texts, tensors):
            raise ValueError(f"{path}: the .json or the .safetensors was changed since; make the preview again.")
        history = {name.removeprefix("history."): x for name, x in tensors.items() if name.startswith("history.")}
        texts["call"] |= _read_call(tensors)
        return cls(**texts, latents=tensors["latents"], history=history)

    def check(self, found: dict, other_versions: bool = False) -> None:
        """Raises ValueError, naming what differs, unless a pipeline of this `fingerprint` would go on with the run."""
        differing = [name for name in found if self.made_by.get(name) != found[name]]
        if other_versions:
            differing = [name for name in differing if name != "versions"]
        if differing:
            pairs = "; ".join(f"{name}: {self.made_by.get(name)} then, {found[name]} now" for name in differing)
            how = ", or with other_versions" if differing == ["versions"] else ""
            raise ValueError(
                f"The checkpoint is of another pipeline ({pairs}); refine with the one that made it{how}."
            )

    def check_grid(self, sigmas: Tensor) -> None:
        """Raises ValueError unless the run has these sigmas."""
        if self.sigmas != sigmas.tolist():
            raise ValueError(
                f"The checkpoint's run has the sigmas {self.sigmas[:3]} ..., the pipeline now makes "
                f"{sigmas[:3].tolist()} ...; give it the scheduler that it had."
            )


def _written_call(call: Mapping) -> tuple[dict, dict[str, Tensor]]:
    """The call as JSON values and as tensors: `call.` of tensors, `picture.` and `pictures.` of one or a list."""
    texts, tensors = {}, {}
    for name, value in call.items():
        if isinstance(value, Tensor):
            tensors[f"call.{name}"] = value
        elif isinstance(value, Image.Image):
            tensors[f"picture.{name}"] = torch.from_numpy(np.array(value))
        elif isinstance(value, list) and value and isinstance(value[0], Image.Image):
            tensors[f"pictures.{name}"] = torch.from_numpy(np.array(value[0]))
        else:
            texts[name] = value
    return texts, tensors


def _read_call(tensors: Mapping[str, Tensor]) -> dict:
    """What `_written_call` made tensors of."""
    call = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "call":
            call[name] = value
        elif kind in ("picture", "pictures"):
            picture = Image.fromarray(value.numpy())
            call[name] = [picture] if kind == "pictures" else picture
    return call


def _digest(texts: Mapping, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of both files' contents."""
    return hashlib.sha256((json.dumps(texts, sort_keys=True) + tensors_digest(tensors)).encode()).hexdigest()


def _files(path: str | Path) -> tuple[Path, Path]:
    """The two files of a checkpoint; `path` may have the suffix of one of them, and any other dots."""
    path = Path(path)
    if path.suffix in (".json", ".safetensors"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.safetensors")


def fingerprint(pipe: DiffusionPipeline) -> dict:
    """What decides how a run goes on, in plain JSON values."""
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    scheduler = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if isinstance(pipe.scheduler, ConsistencySolverScheduler) and pipe.scheduler.policy is not None:
        scheduler.update(tensors_digest(pipe.scheduler.policy.state_dict()).encode())
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights_digest(pipe),
        "adapters": adapters(pipe),
        "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
        "scheduler": f"{type(pipe.scheduler).__name__} {scheduler.hexdigest()[:16]}",
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }


def history_names(scheduler: SchedulerMixin) -> tuple[str, ...]:
    """The attributes in which a solver remembers. Raises ValueError if that is not known here, or it draws noise."""
    require_deterministic(scheduler)
    names = next((HISTORY[kind.__name__] for kind in type(scheduler).__mro__ if kind.__name__ in HISTORY), None)
    if names is None:
        raise ValueError(f"{type(scheduler).__name__} cannot be left and resumed; use one of {', '.join(HISTORY)}.")
    return names


def solver_history(scheduler: SchedulerMixin) -> dict:
    """What a solver that has made a step remembers: attribute → value."""
    return {name: getattr(scheduler, name) for name in history_names(scheduler)}


def row_of_history(history: Mapping, row: int) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the rest of `solver_history` that belong to one picture of a batch."""
    tensors, numbers = {}, {}
    for name, value in history.items():
        if isinstance(value, Tensor):
            tensors[name] = value[row : row + 1]
        elif isinstance(value, list):
            numbers[name] = [None if isinstance(item, Tensor) and item.ndim else _plain(item) for item in value]
            items = {f"{name}.{i}": x[row : row + 1] for i, x in enumerate(value) if isinstance(x, Tensor) and x.ndim}
            tensors |= items
        else:
            numbers[name] = _plain(value)
    return tensors, numbers


def restore(scheduler: SchedulerMixin, checkpoints: list[Checkpoint], device: torch.device) -> None:
    """Gives a solver, whose grid is set, the history of the checkpoints, one a picture, and the place in the grid."""
    first = checkpoints[0]
    values = {name: list(value) if isinstance(value, list) else value for name, value in first.numbers.items()}
    for name in first.history:
        rows = torch.cat([checkpoint.history[name] for checkpoint in checkpoints]).to(device)
        attribute, _, position = name.partition(".")
        if position:
            values[attribute][int(position)] = rows
        else:
            values[attribute] = rows
    for name, value in values.items():
        setattr(scheduler, name, value)
    scheduler._step_index = first.next_step
    if isinstance(scheduler, ConsistencySolverScheduler):
        scheduler._steps = scheduler._step_coefficients(0, first.latents)


def _plain(value):
    return value.item() if isinstance(value, Tensor) else value


def row_of_call(call: dict, row: int, batch_size: int) -> tuple[dict, list[str]]:
    """The call for one picture of a batch, and the names of what no file can hold."""
    kept, missing = {}, []
    for name, value in call.items():
        if isinstance(value, Tensor):
            kept[name] = value[row : row + 1] if len(value) == batch_size else value
        elif isinstance(value, list | tuple) and len(value) == batch_size and _is_one_each(name, value):
            kept[name] = [value[row]]
        elif isinstance(value, str) and name.startswith("prompt"):
            kept[name] = [value]
        elif _is_picture(value) or _is_json(value):
            kept[name] = value
        else:
            missing.append(name)
    return kept, missing


def _is_one_each(name: str, values: Sequence) -> bool:
    return name.endswith(("prompt", "_2", "_3")) or all(map(_is_picture, values))


def _is_picture(value) -> bool:
    return isinstance(value, Image.Image) and value.mode in PICTURE_MODES


def _is_json(value) -> bool:
    """Whether a file gives back what was written."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def joined_call(checkpoints: list[Checkpoint], device: torch.device) -> dict:
    """The call for several pictures of one run, from files or not. Raises ValueError if they are of different runs."""
    first = checkpoints[0]
    same = ("next_step", "num_inference_steps", "height", "width", "sigmas", "missing")
    for one in checkpoints[1:]:
        if differing := [name for name in same if getattr(one, name) != getattr(first, name)]:
            raise ValueError(f"The checkpoints differ in {', '.join(differing)}; refine them one by one.")
        if alike(one.call) != alike(first.call):
            raise ValueError(
                f"The checkpoints are of calls that differ: {alike(first.call)}, {alike(one.call)}; refine them one "
                "by one."
            )
    joined = {}
    for name, value in first.call.items():
        if isinstance(value, Tensor):
            joined[name] = torch.cat([one.call[name] for one in checkpoints]).to(device)
        elif _is_batched(name, value):
            joined[name] = [item for one in checkpoints for item in one.call[name]]
        else:
            joined[name] = value
    return joined


def alike(call: dict) -> dict:
    """What the pictures of a batch share by value, and of what they have one each that there is some."""
    return {name: "one each" if _is_batched(name, value) else value for name, value in call.items()}


def _is_batched(name: str, value) -> bool:
    """Whether a checkpoint's argument is a batch of one, which grows with the pictures."""
    return isinstance(value, Tensor) or (isinstance(value, list) and len(value) == 1 and _is_one_each(name, value))
