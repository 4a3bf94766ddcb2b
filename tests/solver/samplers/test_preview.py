"""Previews and their refinement on tiny random pipelines of every flow family."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel

from solver import ConsistencySolverScheduler
from solver.samplers.cascade import Segment, run_segment, sigma_grid
from solver.samplers.digest import weights_digest
from solver.samplers.latents import decode, denoiser, initial_noise, latent_shape, pack, unpack
from solver.samplers.preview import Checkpoint, PreviewOptions, preview, refine
from solver.samplers.preview.checkpoint import fingerprint, joined_call
from solver.samplers.preview.operators import transform, translate
from solver.samplers.preview.selection import block_mean, phases, random_selections, subsample

SIZE = 32
STEPS = 6
PAPER = partial(PreviewOptions, method="subsample")
OPTIONS = PAPER(num_inference_steps=STEPS, switch=2, guided_steps=2)
FAMILIES = ["flux", "flux-kontext", "sd3", "sd35", "qwen-image", "wan", "hunyuan-video"]
IMAGE = {"height": SIZE, "width": SIZE}


@cache
def shared(family):
    """A pipeline that no test changes."""
    return tiny(family)


def tiny(family, batch_size=1):
    """A pipeline, and what its call takes besides size and latents."""
    pipe, call = tiny_pipeline(family, batch_size)
    return pipe, {k: v for k, v in call.items() if k not in ("height", "width", "output_type", "generator")}


def full_run(pipe, call, seeds, steps=STEPS, size=SIZE, noise=None):
    """The stock pipeline's own latents."""
    shape = latent_shape(pipe, size, size, call.get("num_frames"))
    noise = initial_noise(seeds, shape) if noise is None else noise
    area = {"max_area": size**2} if "max_area" in call else {}
    call = {**call, **area, "height": size, "width": size, "num_inference_steps": steps, "output_type": "latent"}
    return unpack(pipe, pipe(**call, latents=pack(pipe, noise), return_dict=False)[0], shape)


@contextmanager
def counted(pipe):
    """Calls of the denoiser by number of latent elements it is given. Its velocity is made up, and quick."""
    calls = Counter()

    def count(hidden_states, **kwargs):
        calls[hidden_states.numel()] += 1
        return (hidden_states.roll(1, dims=1),)

    denoiser(pipe).forward = count
    yield calls
    del denoiser(pipe).forward


def with_options(**changes):
    return PAPER(**{"num_inference_steps": STEPS, "switch": 2, "guided_steps": 2, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_preview_and_refinement_in_every_family(family, tmp_path):
    """Refined, from a file, it is the uninterrupted run bit for bit; the preview has half the size."""
    pipe, call = shared(family)
    shown = preview(pipe, None, 7, OPTIONS, **IMAGE, **call)
    frames = shown.image if "num_frames" in call else [shown.image]
    assert {frame.size for frame in frames} == {(SIZE // 2, SIZE // 2)}
    assert shown.latents.shape[-1] * 2 == shown.checkpoint.latents.shape[-1]
    shown.checkpoint.save(tmp_path / "one")
    again = Checkpoint.load(tmp_path / "one")
    assert again.next_step == 3  # the step at the switch is done for the commutator, and counts
    expected = full_run(pipe, call, [7])
    assert torch.equal(refine(pipe, again, output_type="latent"), expected)
    assert refine(pipe, again, output_type="latent").isfinite().all()


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 6, "switch": 5, "guided_steps": 0},
        {"num_inference_steps": 1, "guided_steps": 0},
        {"num_inference_steps": 2, "guided_steps": 0},
        {"num_inference_steps": 6, "switch": 5, "guided_steps": 0, "method": "mean", "gain": ((1.0,) * 4, (0.0,) * 4)},
    ],
    ids=str,
)
def test_a_preview_that_walks_the_last_full_size_step(family, options):
    """Then there is nothing left to refine, and the picture is that of the whole run."""
    pipe, call = shared(family)
    if "gain" in options and latent_shape(pipe, SIZE, SIZE, call.get("num_frames"))[0] != 4:
        options = options | {"gain": ((1.0,) * 16, (0.0,) * 16)}
    steps = options["num_inference_steps"]
    shown = preview(pipe, None, 7, PAPER(**options), **IMAGE, **call)
    assert shown.checkpoint.next_step == steps or options["num_inference_steps"] == 2
    refined = refine(pipe, shown.checkpoint, output_type="latent")
    assert torch.equal(refined, full_run(pipe, call, [7], steps=steps))


def test_a_refined_picture_is_the_pipelines_own():
    pipe, call = shared("flux")
    picture = refine(pipe, preview(pipe, None, 7, OPTIONS, prompt_2=None, **IMAGE, **call).checkpoint)
    noise = pack(pipe, initial_noise([7], (4, 16, 16)))
    assert picture == pipe(**call, **IMAGE, latents=noise, num_inference_steps=STEPS).images[0]


@pytest.mark.parametrize(
    "changes, full, small",
    [
        ({}, 11, 23),
        ({"reevaluate": True}, 11, 28),
        ({"reevaluate": True, "corrections": 2}, 11, 33),
        ({"selection": "nearest", "guided_steps": 0}, 10, 20),
        ({"selection": "nearest"}, 11, 20),
        ({"selection": "blockwise"}, 11, 24),
        ({"guided_steps": 0}, 11, 23),
        ({"method": "mean", "guided_steps": 0}, 10, 20),
        ({"method": "mean"}, 11, 20),
        ({"method": "mean", "switch": 0, "guided_steps": 0}, 0, 30),
        ({"small_steps": 8}, 11, 11),
    ],
    ids=str,
)
def test_network_calls(changes, full, small):
    """Golden: 11 full and 23 small at N = 30 with reuse, 11 + 28 with re-evaluation, 10 + 20 naive."""
    pipe, call = shared("flux")
    options = PAPER(**changes)
    with counted(pipe) as calls:
        report = preview(pipe, None, 7, options, **IMAGE, **call).report
    expected = {4 * 16**2: full, 4 * 8**2: small}
    assert calls == {size: count for size, count in expected.items() if count}
    assert report["network_calls"] == {"full": full, "small": small}
    assert (options.full_steps, options.small_evaluations) == (full, small)


def test_naive_is_the_plain_subsampled_run():
    """No guidance and the first phase: the stock pipeline on x[::2, ::2], by hand."""
    pipe, call = shared("sd3")
    naive = preview(pipe, None, 7, with_options(selection="nearest", guided_steps=0), **IMAGE, **call)
    sigmas = sigma_grid(pipe, STEPS, SIZE, SIZE, **call)
    x = run_segment(pipe, initial_noise([7], (4, 16, 16)), Segment(sigmas[:3], SIZE, SIZE), **call)
    x = run_segment(pipe, x[..., ::2, ::2], Segment(sigmas[2:], SIZE // 2, SIZE // 2), **call)
    assert torch.equal(naive.latents, x[0])
    unguided = preview(pipe, None, 7, with_options(selection="nearest", alpha=0.0), **IMAGE, **call)
    assert torch.equal(unguided.latents, naive.latents)


def small_call(pipe, call, x, sigma, size=SIZE // 2):
    """The network's answer (after guidance) at one sigma."""
    answers = []
    look = lambda x, sigma, sigma_next, u: answers.append(u)  # noqa: E731
    run_segment(pipe, x, Segment([sigma, 0.0], size, size, look), **call)
    return answers[0]


def test_the_algorithm_by_hand():
    """Eqs. 8, 9 and 12 with the plain velocities of a pipeline with classifier-free guidance."""
    pipe, call = shared("sd3")
    shown = preview(pipe, None, 7, OPTIONS, **IMAGE, **call)
    sigmas = sigma_grid(pipe, STEPS, SIZE, SIZE, **call)
    x = run_segment(pipe, initial_noise([7], (4, 16, 16)), Segment(sigmas[:3], SIZE, SIZE), **call)
    u = small_call(pipe, call, x, sigmas[2], SIZE)
    operators = random_selections([7], 16, 16, 2)
    asked = [small_call(pipe, call, subsample(x, D, 2), sigmas[2]) for D in operators]
    differences = [(a - subsample(u, D, 2)).norm() for a, D in zip(asked, operators, strict=True)]
    best = int(torch.stack(differences).argmin())
    torch.testing.assert_close(torch.tensor(shown.report["candidate_norms"]), torch.stack(differences))
    assert shown.report["chosen"] == best
    y, target = subsample(x, operators[best], 2), subsample(u, operators[best], 2)
    y = y + (sigmas[3] - sigmas[2]) * asked[best]
    for i in range(3, STEPS):
        v = small_call(pipe, call, y, sigmas[i])
        if i < 5:
            y = y + 2.0 * (sigmas[i] - sigmas[i + 1]) * (v - target)
        y = y + (sigmas[i + 1] - sigmas[i]) * v
    torch.testing.assert_close(shown.latents, y[0], rtol=1e-4, atol=1e-4)


def test_a_linear_equivariant_velocity_needs_no_guidance():
    """u = c x at every position: all commutators vanish, and guidance changes nothing."""
    pipe, call = tiny("flux")
    model = denoiser(pipe)

    def forward(hidden_states, **kwargs):
        return (0.3 * hidden_states,)

    model.forward = forward
    guided = preview(pipe, None, 7, with_options(kappa=4.0), **IMAGE, **call)
    free = preview(pipe, None, 7, with_options(guided_steps=0), **IMAGE, **call)
    assert max(guided.report["candidate_norms"]) == 0
    # After the switch x has moved, and u with it, while the target stands still: by |c|² of the step.
    first = guided.report["guidance_norms"][0] / guided.report["target_norm"]
    sigmas = guided.report["sigmas"]["small"]
    assert first == pytest.approx(0.3 * (sigmas[0] - sigmas[1]), rel=1e-3)
    assert (guided.latents - free.latents).norm() / free.latents.norm() < 0.1


def test_batches_are_their_rows():
    """Selection, guidance and refinement of two pictures together and one by one, up to rounding."""
    pipe, call = tiny("flux", 2)
    both = preview(pipe, None, [7, 8], OPTIONS, **IMAGE, **call)
    expected = full_run(pipe, call, [7, 8])
    assert torch.equal(refine(pipe, [one.checkpoint for one in both], output_type="latent"), expected)
    for row, seed in enumerate((7, 8)):
        own = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        alone = preview(pipe, None, seed, OPTIONS, **IMAGE, **own)
        assert alone.report["chosen"] == both[row].report["chosen"]
        torch.testing.assert_close(alone.latents, both[row].latents, rtol=1e-4, atol=1e-4)
        again = refine(pipe, both[row].checkpoint, output_type="latent")
        torch.testing.assert_close(again[0], expected[row], rtol=1e-4, atol=1e-4)


def test_the_mean_is_a_small_sample_at_its_own_noise_level():
    """D = 0: the plain small-size run from twice the mean of the full-size noise."""
    pipe, call = shared("sd3")
    shown = preview(
        pipe, None, 7, with_options(method="mean", switch=0, guided_steps=0, grid="native"), **IMAGE, **call
    )
    noise = 2 * block_mean(initial_noise([7], (4, 16, 16)), 2)
    expected = full_run(pipe, call, None, size=SIZE // 2, noise=noise)
    torch.testing.assert_close(shown.latents, expected[0])
    assert torch.equal(refine(pipe, shown.checkpoint, output_type="latent"), full_run(pipe, call, [7]))


def test_the_mean_with_a_perfect_target_needs_no_guidance():
    """A velocity that sees one and the same image at both sizes: u' of the full size is the small one's own."""
    pipe, call = tiny("sd3")

    def forward(hidden_states, timestep, **kwargs):
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        return ((hidden_states - 0.7) / sigma,)  # the image is 0.7 everywhere

    denoiser(pipe).forward = forward
    call["guidance_scale"] = 1.0
    shown = preview(pipe, None, 7, with_options(method="mean"), **IMAGE, **call)
    assert max(shown.report["guidance_norms"]) < 1e-3 * shown.report["target_norm"]
    torch.testing.assert_close(shown.latents, torch.full_like(shown.latents, 0.7), rtol=1e-4, atol=1e-4)


def test_a_gain_is_applied_to_the_image_only():
    pipe, call = tiny("sd3")

    def forward(hidden_states, timestep, **kwargs):
        return ((hidden_states - 0.7) / (timestep / 1000).view(-1, 1, 1, 1),)

    denoiser(pipe).forward = forward
    call["guidance_scale"] = 1.0
    options = with_options(method="mean", guided_steps=0)
    plain = preview(pipe, None, 7, options, **IMAGE, **call)
    same = preview(
        pipe, None, 7, with_options(method="mean", guided_steps=0, gain=((1.0,) * 4, (0.0,) * 4)), **IMAGE, **call
    )
    torch.testing.assert_close(plain.latents, same.latents, rtol=1e-4, atol=1e-4)
    del denoiser(pipe).forward
    wrong = with_options(method="mean", gain=((1.0,), (0.0,)))
    with counted(pipe) as calls, pytest.raises(ValueError, match="expected 4 factors"):
        preview(pipe, None, 7, wrong, **IMAGE, **call)
    assert not calls  # said before the work


@pytest.mark.parametrize("names", [[], ["latents"], ["latents", "prompt_embeds"]], ids=str)
def test_lists_that_all_pictures_share_stay_as_they_are(names, tmp_path):
    """Not one each, though they have as many entries as there are pictures."""
    pipe, call = tiny("flux", batch_size=2)
    call["callback_on_step_end_tensor_inputs"] = names
    shown = preview(pipe, None, [7, 8], OPTIONS, **IMAGE, **call)
    for i, one in enumerate(shown):
        one.checkpoint.save(tmp_path / str(i))
    loaded = [Checkpoint.load(tmp_path / str(i)) for i in range(2)]
    joined = joined_call(loaded, torch.device("cpu"))
    assert joined["callback_on_step_end_tensor_inputs"] == names
    assert torch.equal(refine(pipe, loaded, output_type="latent"), full_run(pipe, call, [7, 8]))


def test_a_transformed_picture_need_not_halve():
    pipe, call = shared("flux")
    size = {"height": 36, "width": 36}
    made = transform(pipe, None, 7, translate(0, 4), OPTIONS, **size, **call)
    assert made.image.size == (36, 36)
    with pytest.raises(ValueError, match="height=36, width=36: a preview of 1/2 the size needs multiples of 8"):
        preview(pipe, None, 7, OPTIONS, **size, **call)
    with pytest.raises(ValueError, match="height=34, width=36: a picture needs multiples of 4"):
        transform(pipe, None, 7, translate(0, 4), OPTIONS, height=34, width=36, **call)


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": "phases"}, {"selection": "blockwise"}, {"selection": "argmax"}, {"selection": "random"},
        {"unit": "tokens"}, {"guide_at_switch": True}, {"target": "extrapolated"}, {"grid": "native"},
        {"small_steps": 3}, {"positions": "strided"}, {"alpha": 0.04}, {"scale": 4}, {"method": "mean"},
        {"reevaluate": True, "guide_at_switch": True}, {"switch": 0.5, "guided_steps": 0.2}, {"grid": "remapped"},
        {"fading": True},
    ],
    ids=str,
)  # fmt: skip
def test_options_change_the_preview_and_not_the_refinement(changes):
    pipe, call = shared("flux")
    size = {"height": 32, "width": 32}
    base = preview(pipe, None, 7, OPTIONS, **size, **call)
    other = preview(pipe, None, 7, with_options(**changes), **size, **call)
    assert other.latents.isfinite().all()
    assert other.latents.shape != base.latents.shape or not torch.equal(other.latents, base.latents)
    assert torch.equal(refine(pipe, other.checkpoint, output_type="latent"), full_run(pipe, call, [7]))


def test_videos_take_the_same_selection_in_every_frame():
    """A video of equal frames stays one: a selection of its own in a frame would break it."""
    x = torch.randn(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(1, 3, 4, 8, 8)
    small = subsample(x, random_selections([5], 8, 8, 2)[0], 2)
    assert small.shape == (1, 3, 4, 4, 4) and torch.equal(small, small[:, :, :1].expand_as(small))
    assert torch.equal(block_mean(x, 2), block_mean(x[:, :, 0], 2)[:, :, None].expand(1, 3, 4, 4, 4))
    assert torch.equal(subsample(x, phases(1, 8, 8, 2)[3], 2), x[..., 1::2, 1::2])


def test_lora_is_part_of_what_a_checkpoint_knows():
    pipe, call = tiny("flux")
    plain = preview(pipe, None, 7, OPTIONS, **IMAGE, **call)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    adapted = preview(pipe, None, 7, OPTIONS, **IMAGE, **call)
    assert not torch.equal(adapted.latents, plain.latents)
    assert torch.equal(refine(pipe, adapted.checkpoint, output_type="latent"), full_run(pipe, call, [7]))
    with pytest.raises(ValueError, match=r"of another pipeline.*weights"):
        refine(pipe, plain.checkpoint)
    for module in pipe.transformer.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] = 0.5
    with pytest.raises(ValueError, match=r"of another pipeline.*adapters.*1\.0.*then.*0\.5"):
        refine(pipe, adapted.checkpoint)
    pipe.transformer.disable_adapters()
    with pytest.raises(ValueError, match=r"of another pipeline.*adapters.*1\.0.*then, {} now"):
        refine(pipe, adapted.checkpoint)


def test_lora_of_a_text_encoder_counts_too():
    pipe, _ = tiny("flux")
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])
    pipe.register_modules(text_encoder=inject_adapter_in_model(config, CLIPTextModel(CLIPTextConfig(**size))))
    assert fingerprint(pipe)["adapters"] == {"text_encoder: default": 3.0}


def test_weights_that_wait_elsewhere_are_the_same_weights():
    """Sequential offloading leaves placeholders without values in the networks."""
    pipe, _ = tiny("sd3")
    expected = weights_digest(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert pipe.transformer.proj_out.weight.is_meta
    assert weights_digest(pipe) == expected


def test_feature_caches():
    """An interval of one step forecasts nothing: the same preview. A real one changes it, and is gone afterwards."""
    pipe, call = tiny("flux")
    model = denoiser(pipe)
    options = PAPER(num_inference_steps=12, switch=5, guided_steps=2)
    plain = preview(pipe, None, 7, options, **IMAGE, **call)
    precise = {"disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    off = TaylorSeerCacheConfig(cache_interval=1, **precise)
    assert torch.equal(preview(pipe, None, 7, options, cache=off, **IMAGE, **call).latents, plain.latents)
    config = TaylorSeerCacheConfig(cache_interval=3, **precise)
    fast = preview(pipe, None, 7, options, cache=config, **IMAGE, **call)
    assert not torch.equal(fast.latents, plain.latents) and fast.latents.isfinite().all()
    assert not model.is_cache_enabled
    assert torch.equal(preview(pipe, None, 7, options, **IMAGE, **call).latents, plain.latents)
    refined = refine(pipe, plain.checkpoint, output_type="latent")
    assert torch.equal(refine(pipe, plain.checkpoint, output_type="latent", cache=off), refined)
    assert not torch.equal(refine(pipe, plain.checkpoint, output_type="latent", cache=config), refined)
    model.enable_cache(config)
    with pytest.raises(ValueError, match="A feature cache is on"):
        preview(pipe, None, 7, options, **IMAGE, **call)


def test_full_evaluations_at_the_switch_and_in_guided_steps():
    """The cache computes the first two steps, the fourth and no other; it leaves out unguided steps alone."""
    pipe, call = tiny("flux")
    asked = Counter()
    block = pipe.transformer.transformer_blocks[0].ff
    block.register_forward_hook(lambda module, args, out: asked.update([args[0].shape[1]]))
    options = PAPER(num_inference_steps=12, switch=5, guided_steps=2)
    config = TaylorSeerCacheConfig(cache_interval=100, disable_cache_before_step=2, use_lite_mode=True)
    preview(pipe, None, 7, options, cache=config, **IMAGE, **call)
    full_size = 3 + 1  # of steps 0 .. 4; step 5, the switch
    small = 4 + 2 + 3  # candidates, guided steps 6 and 7, and of steps 8 .. 11
    assert asked == {64: full_size, 16: small}


@pytest.mark.parametrize("target, full_size", [("frozen", 3 + 1), ("extrapolated", 3 + 2)])
def test_targets_are_made_of_full_evaluations(target, full_size):
    """The extrapolated one is made of two steps, so the cache ends a step earlier."""
    pipe, call = tiny("flux")
    asked = Counter()
    block = pipe.transformer.transformer_blocks[0].ff
    block.register_forward_hook(lambda module, args, out: asked.update([args[0].shape[1]]))
    options = PAPER(num_inference_steps=12, switch=7, guided_steps=2, target=target)
    config = TaylorSeerCacheConfig(cache_interval=100, disable_cache_before_step=2, use_lite_mode=True)
    preview(pipe, None, 7, options, cache=config, **IMAGE, **call)
    assert asked[64] == full_size


def test_the_extrapolated_target_follows_the_velocity():
    """Of a velocity that is linear in σ, which the network has at both sizes, nothing is left to correct."""
    pipe, call = tiny("flux")

    def linear(hidden_states, timestep, **_):
        return ((3 - 2 * timestep)[:, None, None].expand_as(hidden_states),)

    pipe.transformer.forward = linear
    norms = {
        target: preview(pipe, None, 7, with_options(target=target), **IMAGE, **call).report["guidance_norms"]
        for target in ("extrapolated", "frozen")
    }
    assert len(norms["extrapolated"]) == 2 and max(norms["extrapolated"]) < 1e-4 < 0.1 < min(norms["frozen"])


def test_a_third_of_the_size(tmp_path):
    """Nine candidates; the refined picture is the pipeline's own all the same."""
    pipe, call = shared("sd3")
    size = {"height": 48, "width": 96}
    shown = preview(pipe, None, 7, with_options(scale=3), **size, **call)
    assert shown.image.size == (32, 16) and shown.latents.shape == (4, 8, 16)
    assert len(shown.report["candidate_norms"]) == 9 and 0 <= shown.report["chosen"] < 9
    noise = initial_noise([7], (4, 24, 48))
    own = pipe(**call, **size, latents=noise, num_inference_steps=STEPS, output_type="latent", return_dict=False)[0]
    assert torch.equal(refine(pipe, shown.checkpoint, output_type="latent"), own)


def learned(own, order=3):
    solver = ConsistencySolverScheduler.from_scheduler(own, order=order)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return solver


def test_the_learned_solver_as_the_stepper():
    """Its history begins at the switch, with the winner's velocity: one multistep step by hand."""
    pipe, call = shared("sd3")
    euler = preview(pipe, None, 7, with_options(small_steps=3, guided_steps=0), **IMAGE, **call)
    stepper = learned(pipe.scheduler)
    shown = preview(pipe, None, 7, with_options(small_steps=3, guided_steps=0), stepper=stepper, **IMAGE, **call)
    assert shown.report["chosen"] == euler.report["chosen"] and not torch.equal(shown.latents, euler.latents)
    x = run_segment(pipe, initial_noise([7], (4, 16, 16)), Segment(None, SIZE, SIZE, steps=(0, 2, STEPS)), **call)
    x = subsample(x, random_selections([7], 16, 16, 2)[shown.report["chosen"]], 2)
    full = sigma_grid(pipe, STEPS, SIZE, SIZE, **call)
    grid = with_options(small_steps=3).small_sigmas(full, full)
    by_hand = run_segment(pipe, x, Segment(grid, SIZE // 2, SIZE // 2), scheduler=learned(pipe.scheduler), **call)
    torch.testing.assert_close(shown.latents, by_hand[0], rtol=1e-5, atol=1e-5)
    order_one = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=1, learn_grid=False)
    same = preview(pipe, None, 7, with_options(small_steps=3), stepper=order_one, **IMAGE, **call)
    guided = preview(pipe, None, 7, with_options(small_steps=3), **IMAGE, **call)
    torch.testing.assert_close(same.latents, guided.latents)


def test_kappa_counts_the_steps_that_a_learned_grid_makes():
    """κ as it is told equals α = κ (σ - σ') of the moved points, not of those that it was asked for."""
    pipe, call = shared("sd3")
    stepper = learned(pipe.scheduler)
    with torch.no_grad():  # the grid moves by what differs from step to step
        stepper.policy.mlp[-1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    options = {"small_steps": 3, "guided_steps": 1}
    shown = preview(pipe, None, 7, with_options(**options), stepper=stepper, **IMAGE, **call)
    _, start, end, _ = shown.report["sigmas"]["small"]
    full = sigma_grid(pipe, STEPS, SIZE, SIZE, **call)
    asked = with_options(**options).small_sigmas(full, full).tolist()
    assert abs((asked[1] - asked[2]) - (start - end)) > 5e-4
    by_alpha = with_options(**options, alpha=2.0 * (start - end))
    same = preview(pipe, None, 7, by_alpha, stepper=stepper, **IMAGE, **call)
    torch.testing.assert_close(shown.latents, same.latents)
    assert len(shown.report["guidance_norms"]) == 1


def test_multistep_solvers_resume_with_their_history(tmp_path):
    for family, make in (
        (
            "wan",
            lambda own: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3),
        ),
        ("sd3", learned),
    ):
        pipe, call = tiny(family)
        pipe.scheduler = make(pipe.scheduler)
        shown = preview(pipe, None, 7, with_options(switch=3, guided_steps=1), **IMAGE, **call)
        shown.checkpoint.save(tmp_path / family)
        refined = refine(pipe, Checkpoint.load(tmp_path / family), output_type="latent")
        assert torch.equal(refined, full_run(pipe, call, [7]))


def test_bad_input(tmp_path):
    pipe, call = shared("flux")
    with pytest.raises(ValueError, match="height=36, width=32: a preview of 1/2 the size needs multiples of 8"):
        preview(pipe, None, 7, OPTIONS, height=36, width=32, **call)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        preview(pipe, None, [7, 8], OPTIONS, **IMAGE, **call)
    with pytest.raises(ValueError, match="There are no prompts and no seeds"):
        preview(pipe, [], [], OPTIONS, **IMAGE)
    with pytest.raises(ValueError, match="There are no checkpoints"):
        refine(pipe, [])
    with pytest.raises(ValueError, match="num_images_per_prompt: not in a preview"):
        preview(pipe, None, 7, OPTIONS, **IMAGE, **call, num_images_per_prompt=2)
    unet, unet_call = tiny("sd")
    with pytest.raises(ValueError, match="StableDiffusionPipeline with DDIMScheduler is no flow model"):
        preview(unet, None, 7, OPTIONS, **IMAGE, **unet_call)
    sd3, sd3_call = shared("sd3")
    with counted(sd3) as calls:  # before the work
        with pytest.raises(ValueError, match="skip_guidance_layers: not in a preview, whose run is cut"):
            preview(sd3, None, 7, OPTIONS, **IMAGE, **sd3_call, skip_guidance_layers=[0])
        with pytest.raises(
            ValueError, match="SD3Transformer2DModel takes no feature cache in diffusers; leave cache="
        ):
            preview(sd3, None, 7, OPTIONS, cache=TaylorSeerCacheConfig(), **IMAGE, **sd3_call)
        with pytest.raises(ValueError, match=r"strided.*SD3Transformer2DModel"):
            preview(sd3, None, 7, with_options(positions="strided"), **IMAGE, **sd3_call)
        with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot be set to given sigmas"):
            preview(sd3, None, 7, OPTIONS, stepper=UniPCMultistepScheduler(), **IMAGE, **sd3_call)
        assert not calls
    shown = preview(sd3, None, 7, OPTIONS, **IMAGE, **sd3_call)
    with pytest.raises(ValueError, match="pipeline: StableDiffusion3Pipeline then, FluxPipeline now"):
        refine(pipe, shown.checkpoint)
    with pytest.raises(ValueError, match="pipeline: StableDiffusion3Pipeline then, WanPipeline now"):
        refine(shared("wan")[0], shown.checkpoint)  # whose call takes other arguments
    guided = replace(shown.checkpoint, call={**shown.checkpoint.call, "guidance_scale": 5.0})
    with pytest.raises(ValueError, match="of calls that differ"):
        refine(sd3, [shown.checkpoint, guided])
    shown.checkpoint.made_by["versions"] = {"torch": "0.1", "diffusers": "0.1"}
    with pytest.raises(ValueError, match=r"versions.*0.1"):
        refine(sd3, shown.checkpoint)
    assert torch.equal(
        refine(sd3, shown.checkpoint, output_type="latent", other_versions=True), full_run(sd3, sd3_call, [7])
    )
    shown.checkpoint.save(tmp_path / "one")
    text = (tmp_path / "one.json").read_text()
    (tmp_path / "one.json").write_text(text.replace('"format": 3', '"format": 9'))
    with pytest.raises(ValueError, match="format 9, expected 3"):
        Checkpoint.load(tmp_path / "one")
    for wrong in ("", "{", text.replace('"next_step": ', '"next_step": 1'), text.replace('"seed": 7', '"seed": 8')):
        (tmp_path / "one.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"one: .*make the preview again"):
            Checkpoint.load(tmp_path / "one")
    (tmp_path / "one.json").write_text(text)
    assert Checkpoint.load(tmp_path / "one").seed == 7
    other = preview(sd3, None, 8, OPTIONS, **IMAGE, **sd3_call).checkpoint
    for seed in (7, 8):  # a name with dots is a name
        replace(other, seed=seed).save(tmp_path / f"cfg.{seed}")
    assert [Checkpoint.load(tmp_path / f"cfg.{seed}").seed for seed in (7, 8)] == [7, 8]
    other.save(tmp_path / "two")
    (tmp_path / "two.safetensors").replace(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="was changed since"):
        Checkpoint.load(tmp_path / "one")
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        Checkpoint.load(tmp_path / "one")
    with pytest.raises(OSError):
        Checkpoint.load(tmp_path / "none")


def to_pictures(pipe, images_BCHW):
    return pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(images_BCHW))


@pytest.mark.parametrize("shared_by_all", [True, False])
def test_a_picture_to_edit_is_kept(shared_by_all, tmp_path):
    pipe, call = tiny("flux-kontext", batch_size=2)
    pictures = to_pictures(pipe, torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    call["image"] = pictures[0] if shared_by_all else pictures
    checkpoints = []
    for number, shown in enumerate(preview(pipe, None, [7, 8], OPTIONS, **IMAGE, **call)):
        shown.checkpoint.save(tmp_path / str(number))
        checkpoints.append(Checkpoint.load(tmp_path / str(number)))
        assert checkpoints[-1].missing == []
    assert torch.equal(refine(pipe, checkpoints, output_type="latent"), full_run(pipe, call, [7, 8]))


def test_what_no_file_can_hold_has_to_be_given_again():
    pipe, call = tiny("flux-kontext")
    image = pipe.image_processor.pt_to_numpy(call["image"])
    call["image"] = image
    shown = preview(pipe, None, 7, OPTIONS, **IMAGE, **call)
    assert shown.checkpoint.missing == ["image"]
    with pytest.raises(ValueError, match=r"needs \['image'\] again"):
        refine(pipe, shown.checkpoint)
    assert torch.equal(refine(pipe, shown.checkpoint, image=image, output_type="latent"), full_run(pipe, call, [7]))


def test_solvers_that_draw_noise_are_refused():
    pipe, call = tiny("sd3")
    for solver in (
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
        ),
    ):
        pipe.scheduler = solver
        with pytest.raises(ValueError, match="draws noise at every step"):
            preview(pipe, None, 7, OPTIONS, **IMAGE, **call)


def test_the_picture_is_the_decoded_latents():
    pipe, call = shared("flux")
    shown = preview(pipe, None, 7, OPTIONS, **IMAGE, **call)
    pixels = torch.tensor(list(shown.image.getdata())).view(SIZE // 2, SIZE // 2, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(decode(pipe, shown.latents[None])[0], pixels, rtol=0, atol=0.6 / 255)
