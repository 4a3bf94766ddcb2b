"""Fingerprints of weights and tensors: whether two files, or a file and a model, belong together."""

import hashlib
from collections.abc import Mapping

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import DiffusionPipeline
from torch import Tensor

FIRST_VALUES = 32  # of each weight: enough to tell retrained weights apart, and quick on a large model


def weights_digest(pipe: DiffusionPipeline) -> str:
    """Tells retrained weights of a pipeline apart."""
    return networks_digest({name: p for name, p in pipe.components.items() if isinstance(p, torch.nn.Module)})


def reward_digest(reward: object) -> str:
    """The same of a reward's `network`; of one without, a constant."""
    network = getattr(reward, "network", None)
    return networks_digest({} if network is None else {"network": network})


def solver_digest(solver: object) -> str | None:
    """The same of a learned solver's policy; of a baked one, which has none, None."""
    return None if solver.policy is None else networks_digest({"policy": solver.policy})


def networks_digest(networks: Mapping[str, torch.nn.Module]) -> str:
    """sha256 over the names, shapes and first values of all tensors of all networks."""
    digest = hashlib.sha256()
    for name, network in sorted(networks.items()):
        for key, tensor in sorted(_state(network).items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor.flatten()[:FIRST_VALUES].float()))
    return digest.hexdigest()


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, also of a module whose weights wait elsewhere (sequential offloading)."""
    state = module.state_dict()
    return get_state_dict_offloaded_model(module) if any(x.is_meta for x in state.values()) else state


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and all values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
