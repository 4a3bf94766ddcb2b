"""Feature caches: what they skip on every family that takes them, and what they say where they would skip nothing."""

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from diffusers.models.attention import FeedForward
from tiny_pipelines import tiny_pipeline

from solver.samplers.caches import cached, require_cache
from solver.samplers.cascade import Segment, run_segment
from solver.samplers.latents import denoiser, initial_noise, latent_shape

SIZE = 32
STEPS = 8
CACHE = {"cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
FULL = 4  # steps 0, 1 before the cache, then 3 and 6


def prepared(family, **changes):
    pipe, call = tiny_pipeline(family)
    call = {name: value for name, value in call.items() if name not in ("height", "width", "output_type", "generator")}
    noise = initial_noise([7], latent_shape(pipe, SIZE, SIZE, call.get("num_frames")))
    return pipe, {**call, **changes}, noise


def run(pipe, call, noise, cache=None):
    with cached(pipe, cache):
        return run_segment(pipe, noise, Segment(None, SIZE, SIZE, steps=(0, STEPS, STEPS)), **call)


@pytest.mark.parametrize("family", ["flux", "flux-kontext", "qwen-image", "wan", "hunyuan-video"])
def test_a_cache_skips_the_blocks_between_full_steps(family):
    pipe, call, noise = prepared(family)
    calls = []
    blocks = getattr(denoiser(pipe), "blocks" if family == "wan" else "transformer_blocks")
    next(module for module in blocks.modules() if isinstance(module, FeedForward)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    plain = run(pipe, call, noise)
    asked = len(calls)  # once a branch of guidance
    lite = run(pipe, call, noise, TaylorSeerCacheConfig(use_lite_mode=True, **CACHE))
    assert (len(calls) - asked) / asked == FULL / STEPS
    assert lite.isfinite().all() and not torch.equal(lite, plain)
    assert torch.equal(run(pipe, call, noise), plain)  # no trace of it


def test_kontext_keeps_the_branches_of_guidance_apart():
    """Each is evaluated in full as often as without the other; a cache that forecasts nothing changes nothing."""
    empty = {"negative_prompt_embeds": torch.zeros(1, 5, 16), "negative_pooled_prompt_embeds": torch.zeros(1, 16)}
    pipe, call, noise = prepared("flux-kontext", true_cfg_scale=4.0, **empty)
    plain = run(pipe, call, noise)
    assert torch.equal(run(pipe, call, noise, TaylorSeerCacheConfig(**CACHE | {"cache_interval": 1})), plain)
    calls = []
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    run(pipe, call, noise, TaylorSeerCacheConfig(**CACHE))
    assert len(calls) == 2 * FULL  # 7, were it one history of 16 evaluations


def test_a_failing_network_leaves_no_cache_behind():
    pipe, call, noise = prepared("flux-kontext")
    attention = pipe.transformer.transformer_blocks[0].attn
    own = attention.forward
    with pytest.raises(RuntimeError, match=r"shape|size"):
        run(pipe, {**call, "prompt_embeds": torch.zeros(1, 5, 3)}, noise, TaylorSeerCacheConfig(**CACHE))
    assert not pipe.transformer.is_cache_enabled and attention.forward == own
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer._forward_hooks


def test_a_cache_that_would_do_nothing_says_so():
    """Wan's attention layers are called attn1 and attn2, which the patterns of diffusers do not know."""
    pipe, call, noise = prepared("wan")
    sentence = r"finds no layer of WanTransformer3DModel .* cache_identifiers=\['blocks.\*attn1', 'blocks.\*attn2'\]"
    with pytest.raises(ValueError, match=sentence):
        require_cache(pipe, TaylorSeerCacheConfig())
    assert not pipe.transformer.is_cache_enabled
    named = TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn1", "blocks.*attn2"], **CACHE)
    assert not torch.equal(run(pipe, call, noise, named), run(pipe, call, noise))
