"""Tiny random models on a light table: a StableDiffusionPipeline of 16 x 16 pixels and a FluxPipeline of 32 x 32."""

import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.extend(str(Path(__file__).parents[1] / name) for name in (".", "data"))

from tiny_flux import save_tiny_flux
from tiny_teacher import make_tiny_sd

from evaluation.rendering import load_pipeline
from lighttable.table import LightTable
from solver import ConsistencySolverScheduler


def save_solver(folder, own):
    """A solver whose weights and grid are not those of its base rule."""
    solver = ConsistencySolverScheduler.from_scheduler(own, order=3)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    solver.save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with `sd` and `flux`, and their solvers `sd-solver` and `flux-solver`."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_sd().save_pretrained(folder / "sd")
    save_tiny_flux(folder / "flux")
    for name in ("sd", "flux"):
        save_solver(folder / f"{name}-solver", load_pipeline(str(folder / name), "float32", "cpu").scheduler)
    return folder


def open_table(models, name):
    return LightTable.open(str(models / name), device="cpu", solver=str(models / f"{name}-solver"))


@pytest.fixture(scope="session")
def sd_table(models):
    return open_table(models, "sd")


@pytest.fixture(scope="session")
def flux_table(models):
    return open_table(models, "flux")


@pytest.fixture
def never():
    """A stop that nobody sets."""
    return threading.Event()
