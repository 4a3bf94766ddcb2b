"""Proofsheet's solvers: the learned one, a diffusers scheduler, and what it needs to be built, saved and converted."""

from solver.scheduling_consistency_solver import (
    ConsistencySolverScheduler,
    SolverPolicy,
    SolverTable,
    convert_public_checkpoint,
)

__all__ = ["ConsistencySolverScheduler", "SolverPolicy", "SolverTable", "convert_public_checkpoint"]
