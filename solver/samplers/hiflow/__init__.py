"""HiFlow: pictures larger than the model knows, guided by its run at its own size. See `sampler`."""

from solver.samplers.hiflow.plan import PRESETS, Recipe, with_steps
from solver.samplers.hiflow.sampler import HiFlowResult, hiflow

__all__ = ["PRESETS", "HiFlowResult", "Recipe", "hiflow", "with_steps"]
