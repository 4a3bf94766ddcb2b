"""Proofsheet's solvers: the learned one, a diffusers scheduler, and what it needs to be built, saved and converted.

Imported when they are asked for: a command line that only shows its help does without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solver.scheduling_consistency_solver import (
        ConsistencySolverScheduler,
        SolverPolicy,
        SolverTable,
        convert_public_checkpoint,
    )

__all__ = ["ConsistencySolverScheduler", "SolverPolicy", "SolverTable", "convert_public_checkpoint"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module("solver.scheduling_consistency_solver"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
