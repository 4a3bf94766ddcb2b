"""The rivals: what they evaluate, and the runs that they equal in a limit."""

from dataclasses import replace

import pytest
import torch

from solver.samplers.ralu.plan import as_schedule
from solver.samplers.ralu.rivals import bottleneck, lanczos, naive, plain, unmixed
from solver.samplers.ralu.sampler import Choices, ralu
from tests.tiny_pipelines import SIZE, tiny_pipeline


def tiny(family="flux"):
    pipe, call = tiny_pipeline(family)
    return pipe, {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds", "guidance_scale")}


def test_plain_is_the_stock_call():
    pipe, call = tiny()
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(3))[None]
    given = {"height": SIZE, "width": SIZE, "num_inference_steps": 3, "output_type": "latent", "return_dict": False}
    stock = pipe(**call, **given, latents=pipe._pack_latents(noise, *noise.shape))[0]
    found = plain(pipe, None, 3, 3, SIZE, SIZE, call=call)
    assert (found.latents_BCHW - pipe._unpack_latents(stock, SIZE, SIZE, 2)).abs().max() < 1e-6
    assert found.evaluations == [(64, 3)]


def test_published_bottleneck_steps():
    """Nominal [4, 12, 5] and [3, 8, 4] walk 4 + 10 + 3 and 3 + 6 + 2 steps, as the published FLOPs say."""
    pipe, call = tiny()
    for steps, walked in (((4, 12, 5), (4, 10, 3)), ((3, 8, 4), (3, 6, 2))):
        found = bottleneck(pipe, None, 3, steps, height=SIZE, width=SIZE, call=call)
        assert found.evaluations == [(64, walked[0]), (16, walked[1]), (64, walked[2])]
        assert found.images_BCHW.shape == (1, 3, SIZE, SIZE) and found.latents_BCHW.isfinite().all()
    again = bottleneck(pipe, None, 3, steps, height=SIZE, width=SIZE, call=call)
    assert torch.equal(again.latents_BCHW, found.latents_BCHW)


def test_naive():
    pipe, call = tiny()
    found = naive(pipe, None, 3, (2, 3), 0.5, SIZE, SIZE, call=call)
    assert found.evaluations == [(16, 2), (64, 3)]
    other = ralu(pipe, None, 3, "turbo", SIZE, SIZE, call=call)
    assert not torch.equal(found.latents_BCHW, other.latents_BCHW)


def test_unmixed_stages(monkeypatch):
    """With every cell fine early, RALU is the same run; in full throughout, only the restarts are left."""
    pipe, call = tiny()
    schedule = as_schedule("4x")
    monkeypatch.setattr("solver.samplers.ralu.sampler.select", lambda scores, ratio: torch.ones_like(scores).bool())
    mixed = ralu(pipe, None, 3, schedule, SIZE, SIZE, choices=Choices(units="full"), call=call)
    found = unmixed(pipe, None, 3, schedule, height=SIZE, width=SIZE, call=call)
    assert (found.latents_BCHW - mixed.latents_BCHW).abs().max() < 2e-6
    assert found.evaluations == [(16, 5), (64, 6), (64, 7)]
    full = unmixed(pipe, None, 3, schedule, small=False, height=SIZE, width=SIZE, call=call)
    assert full.evaluations == [(64, 5), (64, 6), (64, 7)]
    assert not torch.equal(full.latents_BCHW, found.latents_BCHW)


def test_restarts_in_full_keep_the_noise_level():
    """The exact velocity of a white field of variance v keeps it through all stages."""
    pipe, call = tiny()
    variance = 0.25

    def velocity(hidden_states, timestep, **_):
        sigma = timestep.view(-1, 1, 1)
        return ((sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2) * hidden_states,)

    pipe.transformer.forward = velocity
    schedule = replace(as_schedule("4x"), steps=(200, 200, 200))
    found = unmixed(pipe, None, 3, schedule, small=False, height=16 * SIZE, width=16 * SIZE, call=call)
    assert found.latents_BCHW.var().item() == pytest.approx(variance, rel=0.02)


def test_lanczos():
    """Nothing at the same size; constants stay, straight lines nearly; a smooth picture survives a round trip."""
    x = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    assert (lanczos(x, 8, 12) - x).abs().max() < 1e-6
    assert (lanczos(torch.ones(1, 1, 8, 12), 16, 6) - 1).abs().max() < 1e-6
    ramp = torch.arange(32.0).expand(1, 1, 4, 32)
    assert lanczos(ramp, 4, 64)[0, 0, 0, 16:-16].diff() == pytest.approx(0.5, abs=0.05)
    y, smooth = torch.linspace(0, 6, 32), torch.linspace(0, 4, 32)
    picture = torch.outer(y.sin(), smooth.cos())[None, None]
    assert (lanczos(lanczos(picture, 64, 64), 32, 32) - picture)[..., 4:-4, 4:-4].abs().max() < 5e-3


def test_bad_input():
    pipe, call = tiny()
    with pytest.raises(ValueError, match=r"end=1\.0"):
        naive(pipe, None, 3, (2, 3), 1.0, SIZE, SIZE, call=call)
    with pytest.raises(ValueError, match="leave a step each"):
        bottleneck(pipe, None, 3, (4, 1, 1), (1.0, 0.4, 0.6), height=SIZE, width=SIZE, call=call)
    with pytest.raises(ValueError, match="three each"):
        bottleneck(pipe, None, 3, (4, 1), height=SIZE, width=SIZE, call=call)
