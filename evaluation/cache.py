"""Finished work on disk: tensors and facts in one safetensors file, named by everything that they depend on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from data.shards import write_whole


def digest(facts: Mapping) -> str:
    """The name of a result: a hash of plain JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def fingerprint(network: torch.nn.Module) -> str:
    """Tells retrained weights apart: a hash of the sums of all parameters."""
    sums = [(name, float(p.detach().double().sum())) for name, p in sorted(network.named_parameters())]
    return digest({"sums": sums})


def store(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping) -> None:
    """Writes a result whole or not at all. Raises OSError where the disk is full or cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, metadata={"facts": json.dumps(facts)}))


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """A result, or None where it is not there, or is no longer what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except SafetensorError:
        return None
