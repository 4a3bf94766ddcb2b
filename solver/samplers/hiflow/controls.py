"""What a ControlNet is told in a stage."""

import torch.nn.functional as F
from torch import Tensor

from solver.samplers.hiflow.plan import Stage

START, END, SCALE = "control_guidance_start", "control_guidance_end", "controlnet_conditioning_scale"


def control_of_stage(call: dict, stage: Stage) -> dict:
    """Where a ControlNet begins and ends, as shares of the stage's steps instead of the whole grid's.

    One that ends before the stage begins has no weight in it instead: pipelines refuse an end that is no later than
    the start.
    """
    given = {name: call[name] for name in (START, END) if call.get(name) is not None}
    several = [len(value) for value in (*given.values(), call.get(SCALE)) if isinstance(value, list | tuple)]
    networks = several[0] if several else 1
    spans = zip(_each(given.get(START, 0.0), networks), _each(given.get(END, 1.0), networks), strict=True)
    over = [start < end and _share(end, stage) == 0 for start, end in spans]
    told = {name: _map(lambda value: _share(value, stage), value) for name, value in given.items()}
    if not any(over):
        return told
    told = {START: told.get(START, 0.0), END: told[END], SCALE: call.get(SCALE, 1.0)}
    silent = {START: 0.0, END: 1.0, SCALE: 0.0}
    rows = {
        name: [silent[name] if gone else one for one, gone in zip(_each(value, networks), over, strict=True)]
        for name, value in told.items()
    }
    return rows if several else {name: row[0] for name, row in rows.items()}


def _share(value: float, stage: Stage) -> float:
    return min(max((value * stage.stop - stage.first) / stage.steps, 0.0), 1.0)


def _map(function, value):
    return [function(one) for one in value] if isinstance(value, list | tuple) else function(value)


def _each(value, networks: int) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] * networks


def resized(control, height: int, width: int):
    """A control image of the stage's size. PIL images are left to the pipeline, which resamples them well."""
    if isinstance(control, list | tuple):
        return [resized(one, height, width) for one in control]
    if not isinstance(control, Tensor):
        return control
    batch = control if control.ndim == 4 else control[None]
    drawn = F.interpolate(batch, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return drawn.clamp(control.min(), control.max())  # bicubic overshoots
