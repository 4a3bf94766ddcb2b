"""Fingerprints of weights and tensors: whether two files, or a file and a model, belong together."""

import hashlib
from collections.abc import Mapping

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
        for key, tensor in sorted(_plain(_state(network)).items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor.flatten()[:FIRST_VALUES].float()))
    return digest.hexdigest()


def adapters(pipe: DiffusionPipeline) -> dict:
    """LoRA adapters that are on, and their scales, by network; the digest of the weights knows neither.

    A scale is one number, or where layers differ a sha256 over all of them.
    """
    scales: dict[str, dict[str, float]] = {}
    for name, network in pipe.components.items():
        for key, layer in network.named_modules() if isinstance(network, torch.nn.Module) else ():
            for adapter in layer.active_adapters if _adapts(layer) else ():
                if adapter in layer.scaling:
                    scales.setdefault(f"{name}: {adapter}", {})[key] = float(layer.scaling[adapter])
    return {adapter: _one_scale(by_layer) for adapter, by_layer in scales.items()}


def _one_scale(by_layer: Mapping[str, float]) -> float | str:
    different = set(by_layer.values())
    if len(different) == 1:
        return different.pop()
    return hashlib.sha256(repr(sorted(by_layer.items())).encode()).hexdigest()


def _adapts(module: torch.nn.Module) -> bool:
    """Whether it is a layer of peft that is on; layers of other kinds have a `scaling` that is a number."""
    return isinstance(getattr(module, "scaling", None), dict) and not module.disable_adapters


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state dict, also of a module whose weights wait elsewhere (sequential offloading)."""
    state = module.state_dict()
    return get_state_dict_offloaded_model(module) if any(x.is_meta for x in state.values()) else state


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with quantised weights, which are tensors in a wrapper, as the tensors inside."""
    plain = {}
    for key, tensor in state.items():
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            plain |= _plain({f"{key}.{name}": getattr(tensor, name) for name in names})
        else:
            plain[key] = tensor
    return plain


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and all values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
