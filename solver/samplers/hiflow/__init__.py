"""HiFlow: pictures larger than the model knows, guided by its run at its own size. See `sampler`.

Imported when they are asked for: a plan is checked without diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solver.samplers.hiflow.plan import PRESETS, Recipe, with_steps
    from solver.samplers.hiflow.sampler import HiFlowResult, hiflow

__all__ = ["PRESETS", "HiFlowResult", "Recipe", "hiflow", "with_steps"]


def __getattr__(name: str):
    if name in __all__:
        module = "sampler" if name in ("HiFlowResult", "hiflow") else "plan"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
