"""What a ControlNet is told in a stage."""

import torch.nn.functional as F
from torch import Tensor

from solver.samplers.hiflow.plan import Stage


def control_of_stage(call: dict, stage: Stage) -> dict:
    """Where a ControlNet begins and ends, as shares of the stage's steps instead of the whole grid's."""

    def share(value):
        if isinstance(value, list | tuple):
            return [share(one) for one in value]
        return min(max((value * stage.stop - stage.first) / stage.steps, 0.0), 1.0)

    names = ("control_guidance_start", "control_guidance_end")
    return {name: share(call[name]) for name in names if call.get(name) is not None}


def resized(control, height: int, width: int):
    """A control image of the stage's size. PIL images are left to the pipeline, which resamples them well."""
    if isinstance(control, list | tuple):
        return [resized(one, height, width) for one in control]
    if not isinstance(control, Tensor):
        return control
    batch = control if control.ndim == 4 else control[None]
    drawn = F.interpolate(batch, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return drawn.clamp(control.min(), control.max())  # bicubic overshoots
