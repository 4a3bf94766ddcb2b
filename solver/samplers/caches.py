"""Feature caches of diffusers, on for a part of a run.

    require_cache(pipe, TaylorSeerCacheConfig())            # raises before the work rather than in the midst of it
    with cached(pipe, TaylorSeerCacheConfig()):
        x = run_segment(pipe, x, segment, **call)

A cache belongs to one size and one stretch of steps: it is empty where it is switched on and gone where it is left.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import ModelHook
from diffusers.models.cache_utils import CacheMixin

from solver.samplers.latents import denoiser


def require_cache(pipe: DiffusionPipeline, cache: object | None) -> None:
    """Checks a cache by switching it on and off.

    Raises:
        ValueError: a cache is on from before, the network takes none, or this one would do nothing.
    """
    if any(hook._is_stateful for hook in _hooks(denoiser(pipe))):  # however it was switched on
        raise ValueError(
            "A feature cache is on from before; its features would meet other tokens. Call disable_cache(), and pass "
            "its configuration as cache=."
        )
    with cached(pipe, cache):
        pass


@contextmanager
def cached(pipe: DiffusionPipeline, cache: object | None) -> Iterator[None]:
    """Inside, the denoiser has a feature cache, empty at first; with None, nothing. Raises as `require_cache`."""
    if cache is None:
        yield
        return
    network = denoiser(pipe)
    if not isinstance(network, CacheMixin):
        raise ValueError(f"{type(network).__name__} takes no feature cache in diffusers; leave cache= out.")
    before = len(_hooks(network))
    network.enable_cache(cache)
    try:
        if len(_hooks(network)) == before:
            raise ValueError(
                f"{type(cache).__name__} finds no layer of {type(network).__name__} by its patterns and would do "
                f"nothing; name some, such as cache_identifiers={_attention_pattern(network)!r}."
            )
        with _named_branches(pipe):
            yield
    finally:
        network.disable_cache()


def _hooks(network: torch.nn.Module) -> list[ModelHook]:
    """Of diffusers, on all of its modules."""
    registries = (getattr(module, "_diffusers_hook", None) for module in network.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def _attention_pattern(network: torch.nn.Module) -> list[str]:
    """Patterns for the attention layers of the blocks: Wan's are called attn1 and attn2."""
    names = (name.split(".") for name, _ in network.named_modules())
    ends = sorted({f"{name[0]}.*{name[2]}" for name in names if len(name) == 3 and "attn" in name[2]})
    return ends or ["..."]


@contextmanager
def _named_branches(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, every branch of guidance has features of its own, also where the pipeline does not name the branches.

    A cache needs the name around each evaluation. FLUX Kontext gives none: here, evaluations at one time count.
    """
    if "cache_context" in inspect.getsource(type(pipe).__call__):
        yield
        return
    network, last, context = denoiser(pipe), {"time": None, "branch": 0}, ExitStack()

    def enter(module, args, kwargs):
        time = kwargs["timestep"].flatten()[0].item()
        last["branch"] = last["branch"] + 1 if time == last["time"] else 0
        last["time"] = time
        context.enter_context(network.cache_context(f"branch {last['branch']}"))

    def leave(module, *answered):
        context.close()

    handles = [
        network.register_forward_pre_hook(enter, with_kwargs=True),
        network.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
