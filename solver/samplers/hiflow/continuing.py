"""Whether an earlier result is the beginning of a run: what decides the pictures, as fingerprints."""

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from solver.samplers.digest import adapters, networks_digest, tensors_digest, weights_digest
from solver.samplers.hiflow.plan import Recipe, Stage
from solver.samplers.latents import denoiser

ENLARGING = "start and acceleration"  # of a recipe; a base alone has neither


def fingerprints(
    pipe, recipe: Recipe, scheduler, call: dict, seeds: list[int], start: Tensor | None
) -> dict[str, str]:
    """What decides the pictures, sizes and guidance apart, which the stages have."""
    solver = pipe.scheduler if scheduler is None else scheduler
    policy = getattr(solver, "policy", None)
    return {
        "pipeline": f"{type(pipe).__name__} {weights_digest(pipe)}",
        "adapters and dtype": f"{adapters(pipe)} {denoiser(pipe).dtype}",
        "scheduler": f"{type(solver).__name__} {dict(solver.config)} {policy and networks_digest({'': policy})}",
        "steps": str(recipe.steps),
        ENLARGING: f"{recipe.start}, {recipe.acceleration}",
        "prompts and seeds": f"{seeds} {[(name, _fingerprint(value)) for name, value in sorted(call.items())]}",
        "image": "" if start is None else tensors_digest({"": start}),
    }


def _fingerprint(value) -> str:
    if isinstance(value, Tensor):
        return tensors_digest({"": value})
    if isinstance(value, Image):
        return tensors_digest({value.mode: to_tensor(value)})
    if isinstance(value, np.ndarray):  # its repr leaves out the middle
        return tensors_digest({"": torch.from_numpy(np.ascontiguousarray(value))})
    return str([_fingerprint(one) for one in value]) if isinstance(value, list | tuple) else repr(value)


def check_smaller(done: list[Stage], done_by: dict[str, str], stages: list[Stage], made_by: dict[str, str]) -> None:
    """Raises ValueError unless the earlier result is the beginning of this run."""
    counts = [name for name in made_by if name != ENLARGING or any(stage.cutoff is not None for stage in done)]
    if differing := [name for name in counts if done_by.get(name) != made_by[name]]:
        raise ValueError(f"smaller is of another run: its {', '.join(differing)} differed.")
    if len(done) >= len(stages) or done != stages[: len(done)]:
        sizes = [[f"{stage.height} x {stage.width}" for stage in plan] for plan in (done, stages)]
        raise ValueError(
            f"smaller has {', '.join(sizes[0])}, and {', '.join(sizes[1])} are to be rendered: it has to be the "
            "beginning of that, with the same guidance and alignment, and edges_first is of the last size alone."
        )
