"""A tiny random FluxPipeline, which draws 64 x 64 pixels in milliseconds."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from tiny_flux import save_tiny_flux


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    return str(save_tiny_flux(tmp_path_factory.mktemp("model") / "flux"))


@pytest.fixture
def arguments(flux):
    """Of a run of seconds: 64 px, 8 x 8 tokens."""
    few = {"model": flux, "num_prompts": 3, "batch_size": 2, "size": 64, "steps": 6, "scenes": 4, "device": "cpu"}
    return [text for name, value in few.items() for text in (f"--{name}", str(value))]
