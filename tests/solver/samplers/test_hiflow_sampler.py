"""HiFlow on stock pipelines of every family, against runs written out by hand."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hiflow_cases import CODE, PLAIN, K, N, noise_of, prepared
from PIL import Image
from tiny_pipelines import run, tiny_pipeline
from torch import nn

from solver import ConsistencySolverScheduler
from solver.samplers.calls import guidance
from solver.samplers.hiflow import PRESETS, hiflow, with_steps
from solver.samplers.hiflow.alignment import enlarge, sharpen
from solver.samplers.hiflow.lowpass import lowpass
from solver.samplers.hiflow.noise import clean_image, model_output_of, noised, stage_solver
from solver.samplers.hiflow.pixels import encode, tiled_where_needed
from solver.samplers.latents import decode, denoiser, latent_shape, pack, unpack

IMAGE_FAMILIES = ("flux", "flux-kontext", "sd3", "sd35", "sd", "sdxl", "qwen-image")
ZOO = Path(__file__).parents[3] / "zoo"


# ---- the base, the start, the steps ----


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_the_base_picture_is_the_stock_one(family):
    pipe, call = prepared(family)
    result = hiflow(pipe, None, 3, (32, 64), CODE, guidance_scale=2.0, call=call)
    (noise,) = noise_of(pipe, 3, 32)
    _, stock = tiny_pipeline(family)
    stock.update({**guidance(pipe, 2.0), "latents": pack(pipe, noise)})
    latents = run(pipe, stock, num_inference_steps=N)
    expected = decode(pipe, unpack(pipe, latents, latent_shape(pipe, 32, 32)))
    torch.testing.assert_close(result.images[0], expected, rtol=0, atol=1e-5)
    assert [tuple(image.shape) for image in result.images] == [(1, 3, 32, 32), (1, 3, 64, 64)]


def denoise_by_hand(pipe, call, x, sigmas, on_prediction, guidance):
    """Euler on FLUX, the network called directly; yields the end and each raw prediction."""
    height, width = x.shape[-2:]
    ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    raw, previous = {}, None
    for k, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        v = pipe.transformer(
            hidden_states=pack(pipe, x),
            timestep=torch.tensor([sigma]),
            guidance=torch.tensor([guidance]),
            encoder_hidden_states=call["prompt_embeds"],
            pooled_projections=call["pooled_prompt_embeds"],
            txt_ids=torch.zeros(call["prompt_embeds"].shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        v = unpack(pipe, v, x.shape[1:])
        raw[sigma] = x - sigma * v
        v, previous = on_prediction(k, sigma, x, raw[sigma], previous)
        x = x + (following - sigma) * v
    return x, raw


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["init", "full"])
def test_a_stage_is_the_published_update_written_out(alignment):
    """Steps 3 to 9 of the public code in velocities, on FLUX without the changes inside the transformer."""
    pipe, call = prepared("flux")
    result = hiflow(pipe, None, 5, (32, 64), PLAIN, guidance_scale=3.0, alignment=alignment, call=call)
    base_noise, noise = noise_of(pipe, 5, 32, 64)
    sigmas = result.sigmas[0]
    assert result.sigmas[1] == sigmas[-K - 1 :]

    def plain(k, sigma, x, prediction, previous):
        return (x - prediction) / sigma, None

    low, references = denoise_by_hand(pipe, call, base_noise, sigmas, plain, 3.0)
    clean = encode(pipe, sharpen(enlarge(decode(pipe, low), 64, 64)))
    x = sigmas[-K - 1] * noise + (1 - sigmas[-K - 1]) * clean

    def aligned(k, sigma, x, prediction, previous):
        R = F.interpolate(references[sigma], x.shape[-2:], mode="bicubic")
        D = prediction + (K - k) / K * (lowpass(R, 0.2) - lowpass(prediction, 0.2))
        v, w = (x - D) / sigma, (x - R) / sigma
        if previous is not None:
            v = v + 0.5 * (K - k) / K * (previous[0] + w - previous[1] - v)
        return v, (v, w)

    expected, _ = denoise_by_hand(pipe, call, x, sigmas[-K - 1 :], plain if alignment == "init" else aligned, 3.0)
    torch.testing.assert_close(result.latents_BCHW, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_without_strength_a_unet_walks_the_plain_tail(prediction):
    pipe, call = prepared("sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    recipe = replace(CODE, alpha=(0.0,), beta=(0.0,))
    result = hiflow(pipe, None, 5, (32, 64), recipe, guidance_scale=2.0, call=call)
    *_, noise = noise_of(pipe, 5, 32, 64)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(N)
    tail = scheduler.timesteps[-K:]
    x = scheduler.add_noise(encode(pipe, sharpen(enlarge(result.images[0], 64, 64))), noise, tail[:1])
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    for t in tail:
        without, with_prompt = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample.chunk(2)
        x = scheduler.step(without + 2 * (with_prompt - without), t, x).prev_sample
    torch.testing.assert_close(result.latents_BCHW, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_noise_levels_there_and_back(kind):
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    s = 0.7
    alpha = 1 / (1 + s**2) ** 0.5
    truth = {"flow": noise - x0, "epsilon": noise, "v_prediction": alpha * noise - s * alpha * x0}[kind]
    x = noised(x0, noise, s, kind)
    torch.testing.assert_close(clean_image(x, truth, s, kind), x0)
    torch.testing.assert_close(model_output_of(x, x0, s, kind), truth)


def test_noise_alone_is_a_noise_level_too():
    """Zero terminal SNR: v = -x_0 there, and all steps of the base can be run again."""
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(noised(x0, noise, math.inf, "v_prediction"), noise)
    assert torch.equal(clean_image(noise, -x0, math.inf, "v_prediction"), x0)
    assert torch.equal(model_output_of(noise, x0, math.inf, "v_prediction"), -x0)
    pipe, call = prepared("sd")
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    result = hiflow(pipe, None, 1, (32, 64), replace(CODE, stage_steps=(N,)), call=call)
    assert result.sigmas[1][0] == math.inf and result.images[-1].isfinite().all()


@pytest.mark.parametrize("family", ["flux", "sd3", "sd", "qwen-image"])
def test_encoding_is_the_inverse_of_decoding_in_scale(family):
    """With an autoencoder that passes values on, latents come back as they were."""
    pipe, _ = prepared(family)
    latents = torch.rand(1, *latent_shape(pipe, 32, 32))
    vae = pipe.vae
    vae.decode = lambda z, return_dict: (z[:, :3],)
    images = decode(pipe, latents * 0.1)

    class Encoded:
        def __init__(self, x):
            self.latent_dist = self
            self.x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))

        def mode(self):
            return self.x

    vae.encode = Encoded
    torch.testing.assert_close(encode(pipe, images)[:, :3], latents[:, :3] * 0.1)


# ---- guidance and prompts ----


def test_guidance_of_a_flux_that_is_not_told_it_is_true_cfg():
    pipe, call = prepared("flux")
    pipe.transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, "guidance_embeds": False})
    with pytest.raises(ValueError, match="needs negative_prompt_embeds"):
        hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call=call)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    both = call | {f"negative_{name}": torch.randn(call[name].shape) for name in names}
    with pytest.raises(ValueError, match="true_cfg_scale=3"):
        hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**both, "true_cfg_scale": 3})
    with pytest.raises(ValueError, match=r"call has negative_.*, but guidance_scale is 1: it needs more than 1"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=both)
    plain = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    guided = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=(1.0, 6.0), call=both)
    assert torch.equal(guided.images[0], plain.images[0])
    assert not torch.allclose(guided.images[1], plain.images[1], atol=1e-3)


def test_a_negative_prompt_that_nothing_looks_at_is_refused():
    pipe, call = prepared("flux")
    call |= {f"negative_{name}": torch.randn(call[name].shape) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    with pytest.raises(ValueError, match=r"call has negative_prompt_embeds, .*told its guidance_scale"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    guided = [hiflow(pipe, None, 1, (32,), CODE, call={**call, "true_cfg_scale": x}).images[0] for x in (2.0, 4.0)]
    assert not torch.allclose(*guided, atol=1e-3)
    pipe, call = prepared("sd")
    image = torch.rand(3, 32, 32)
    for given in ({"guidance_scale": 1.0}, {"guidance_scale": (4.0, 1.0), "image": image}):  # a base that is not drawn
        with pytest.raises(ValueError, match="but guidance_scale is 1: it needs more than 1"):
            hiflow(pipe, None, 1, (32, 64), CODE, call=call, **given)


def test_one_negative_prompt_serves_all_pictures():
    pipe = DiffusionPipeline.from_pretrained(ZOO / "mini-sd", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    recipe = replace(CODE, steps=2, stage_steps=(1,))
    one, each = (
        hiflow(pipe, "a red ring", [1, 2], (32, 64), recipe, guidance_scale=4.0, call={"negative_prompt": negative})
        for negative in ("a blue cube", ["a blue cube"] * 2)
    )
    assert one.images[-1].shape == (2, 3, 64, 64)
    assert torch.equal(one.images[-1], each.images[-1])


@pytest.mark.parametrize(("family", "expected"), [("sdxl", torch.float32), ("sd", torch.float16)])
def test_an_autoencoder_that_overflows_in_half_precision_runs_in_full_as_in_the_stock_pipeline(family, expected):
    pipe, _ = prepared(family)
    pipe.vae.to(torch.float16)
    seen = []
    pipe.vae.encoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    picture = decode(pipe, torch.zeros(1, *latent_shape(pipe, 32, 32)))
    encode(pipe, picture)
    assert seen == [expected] * 2
    assert pipe.vae.dtype == torch.float16


# ---- the same picture ----


@pytest.mark.parametrize(("family", "preset"), [("flux", "code"), ("sd", "paper")])
def test_a_picture_depends_on_its_seed_and_prompt_alone(family, preset):
    pipe, call = prepared(family, batch_size=2)
    recipe = with_steps(PRESETS[preset], N)
    both = hiflow(pipe, None, [7, 8], (32, 48, 64), recipe, guidance_scale=2.0, call=call)
    second = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    torch.manual_seed(123)
    alone = hiflow(pipe, None, 8, (32, 48, 64), recipe, guidance_scale=2.0, call=second)
    for small, large in zip(alone.images, both.images, strict=True):
        torch.testing.assert_close(small, large[1:], rtol=1e-3, atol=1e-3)
    other = hiflow(pipe, None, 9, (32, 48, 64), recipe, guidance_scale=2.0, call=second)
    assert not torch.allclose(other.images[-1], alone.images[-1], atol=1e-2)


def test_the_pipeline_is_as_it_was():
    pipe, call = prepared("flux")
    before = {name: id(part) for name, part in pipe.components.items()}
    state = torch.random.get_rng_state()
    hiflow(pipe, None, 1, (32, 64), replace(CODE, text_copies=True), call=call)
    assert {name: id(part) for name, part in pipe.components.items()} == before
    assert pipe.transformer.pos_embed.theta == 10000
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in pipe.transformer.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "encode_prompt" not in vars(pipe)


def test_tiling_only_above_1536_and_only_inside():
    pipe, _ = prepared("sd")
    with tiled_where_needed(pipe, 1536, 1536):
        assert not pipe.vae.use_tiling
    with tiled_where_needed(pipe, 1552, 1536):
        assert pipe.vae.use_tiling
    assert not pipe.vae.use_tiling
    pipe.vae.enable_tiling()
    with tiled_where_needed(pipe, 4096, 4096):
        pass
    assert pipe.vae.use_tiling


def test_every_switch_matters():
    pipe, call = prepared("flux")
    results = {
        name: hiflow(pipe, None, 1, (32, 64), replace(CODE, **changes), alignment=alignment, call=call)
        for name, alignment, changes in [
            ("full", "full", {}),
            ("none", "none", {}),
            ("init", "init", {}),
            ("direction", "init+direction", {}),
            ("prediction", "full", {"start": "prediction"}),
            ("eq13", "full", {"acceleration": "eq13"}),
            ("eq10", "full", {"acceleration": "eq10"}),
            ("fixed", "full", {"acceleration": "fixed-noise"}),
            ("cutoff", "full", {"cutoff": (0.4,)}),
            ("ntk", "full", {"ntk_factor": (1.0,)}),
            ("attention", "full", {"proportional_attention": False}),
            ("copies", "full", {"text_copies": True}),
            ("shift", "full", {"shifted_patches": False}),
        ]
    }
    latents = {name: result.latents_BCHW for name, result in results.items()}
    names = list(latents)
    same = [(a, b) for a in names for b in names if a < b and torch.equal(latents[a], latents[b])]
    assert not same
    assert len(results["none"].images) == 1 and len(results["none"].sigmas[0]) == N + 1


# ---- after a smaller run ----


@pytest.mark.parametrize(("family", "preset"), [("flux", "code"), ("sd", "paper")])
def test_a_smaller_result_goes_on_as_if_it_had_not_stopped(family, preset):
    pipe, call = prepared(family, batch_size=2)
    recipe = with_steps(PRESETS[preset], N)
    given = {"preset": recipe, "guidance_scale": 2.0, "call": call}
    whole = hiflow(pipe, None, [7, 8], (32, 48, 64), **given)
    evaluations = []
    denoiser(pipe).register_forward_pre_hook(lambda *_: evaluations.append(1))
    result = hiflow(pipe, None, [7, 8], (32,), **given)
    assert len(evaluations) == N
    for sizes in ((32, 48), (32, 48, 64)):
        result = hiflow(pipe, None, [7, 8], sizes, smaller=result, **given)
    assert len(evaluations) == sum(stage.steps for stage in whole.stages)
    assert all(torch.equal(a, b) for a, b in zip(whole.images, result.images, strict=True))
    assert (whole.stages, whole.sigmas) == (result.stages, result.sigmas)


def test_one_base_is_enlarged_in_several_ways():
    """But what was enlarged in one way goes on in that way."""
    pipe, call = prepared("flux")
    base = hiflow(pipe, None, 1, (32,), CODE, call=call)
    other = replace(CODE, start="prediction", acceleration="eq10", cutoff=(0.5,))
    alone = hiflow(pipe, None, 1, (32, 48), other, call=call)
    middle = hiflow(pipe, None, 1, (32, 48), other, call=call, smaller=base)
    assert torch.equal(middle.images[1], alone.images[1])
    for change in ({"start": "image"}, {"acceleration": "code"}):
        with pytest.raises(ValueError, match="another run: its start and acceleration differed"):
            hiflow(pipe, None, 1, (32, 48, 64), replace(other, **change), call=call, smaller=middle)


def test_an_enlarged_image_is_enlarged_further():
    pipe, call = prepared("flux")
    given = {"prompt": None, "seed": 1, "preset": CODE, "call": call, "image": torch.rand(3, 32, 32)}
    whole = hiflow(pipe, sizes=(32, 48, 64), **given)
    parts = hiflow(pipe, sizes=(32, 48, 64), smaller=hiflow(pipe, sizes=(32, 48), **given), **given)
    assert len(parts.images) == 3 and torch.equal(parts.images[-1], whole.images[-1])
    with pytest.raises(ValueError, match="another run: its image differed"):
        hiflow(pipe, sizes=(32, 48, 64), smaller=parts, **{**given, "image": None})


# ---- a given image ----


def test_an_image_of_another_size_than_the_model_knows_is_no_base():
    """The grid is shifted, and attention scaled, as for the model's own size, which the autoencoder says."""
    pipe, call = prepared("flux")

    def enlarged(start, end):
        image = torch.rand(3, start, start, generator=torch.Generator().manual_seed(0))
        return hiflow(pipe, None, 1, (start, end), CODE, image=image, call=call)

    own = enlarged(32, 64)
    assert enlarged(64, 96).sigmas == own.sigmas
    pipe.vae.register_to_config(sample_size=64)
    other = enlarged(64, 96)
    assert other.sigmas != own.sigmas
    assert enlarged(32, 64).sigmas == other.sigmas
    (stage,) = enlarged(32, 64).stages
    assert not stage.shifted_patches and stage.ntk_factor == 1  # the model's own size, drawn as ever


def test_a_given_image_is_enlarged():
    pipe, call = prepared("sd")
    pixels = (torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    picture = Image.fromarray(pixels)
    result = hiflow(pipe, None, 1, (32, 64), CODE, image=picture, call=call)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    torch.testing.assert_close(result.images[0], tensor[None])
    again = hiflow(pipe, None, 1, (32, 64), CODE, image=tensor, call=call)
    assert torch.equal(again.images[1], result.images[1])
    # Full strength over the whole band: the first step ends on the image's own latents, and so does every other.
    recipe = replace(CODE, cutoff=(float("inf"),), beta=(0.0,), stage_steps=(1,))
    exact = hiflow(pipe, None, 1, (32, 64), recipe, image=tensor, call=call)
    end = stage_solver(pipe)
    end.set_timesteps(N)
    alpha = end.final_alpha_cumprod
    expected = enlarge(encode(pipe, tensor[None]), 32, 32)
    residual = exact.latents_BCHW - alpha.sqrt() * expected
    assert residual.std() < 2 * (1 - alpha).sqrt()


# ---- solvers, adapters, control, quantisation ----


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_the_learned_solver_runs_the_stages(family):
    """Untrained and of first order it is the stock one; with another table and a moved grid it is not."""
    pipe, call = prepared(family)
    stock = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    settings = {"order": 2, "guidance_scale": 2.5}
    first_order = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, base_rule="ddim", **settings)
    result = hiflow(pipe, None, 1, (32, 64), CODE, scheduler=first_order, call=call)
    torch.testing.assert_close(result.images[-1], stock.images[-1], rtol=1e-3, atol=1e-3)
    trained = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, **settings)
    with torch.no_grad():
        trained.policy.mlp[-1].bias.normal_(generator=torch.Generator().manual_seed(0))
    result = hiflow(pipe, None, 1, (32, 64), CODE, scheduler=trained, call=call)
    assert not torch.allclose(result.images[-1], stock.images[-1], atol=1e-3)
    assert result.sigmas[1] == result.sigmas[0][-K - 1 :]


def test_latents_are_not_clipped_where_a_scheduler_does_not_say_so():
    pipe, _ = prepared("sd")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe.scheduler = EulerDiscreteScheduler(**schedule)
    assert stage_solver(pipe).config.clip_sample is False
    pipe.scheduler = DDIMScheduler(**schedule, clip_sample=True)
    assert stage_solver(pipe).config.clip_sample is True


def test_the_shift_of_a_multistep_solver_is_kept():
    pipe, call = prepared("sd3")
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sigmas = hiflow(pipe, None, 1, (32, 64), CODE, call=call).sigmas[0]
    # 3 t / (1 + 2 t) of evenly spaced times; the first one after the start shows it, t = 0.75 unshifted.
    assert sigmas[1] == pytest.approx(0.9, abs=1e-3)


def test_a_given_flow_scheduler_has_its_own_shift():
    """In place of the pipeline's, which is one for the picture's size on FLUX."""
    pipe, call = prepared("sd3")
    given = FlowMatchEulerDiscreteScheduler(shift=9.0)
    result = hiflow(pipe, None, 1, (32, 64), CODE, scheduler=given, call=call)
    given.set_timesteps(N)
    assert result.sigmas[0] == given.sigmas.tolist() and result.sigmas[1] == result.sigmas[0][-K - 1 :]
    own = hiflow(pipe, None, 1, (32, 64), CODE, scheduler=pipe.scheduler, call=call)
    assert own.sigmas == hiflow(pipe, None, 1, (32, 64), CODE, call=call).sigmas != result.sigmas
    pipe, call = prepared("flux")
    static = hiflow(pipe, None, 1, (32, 64), CODE, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), call=call)
    assert static.sigmas[0] == pytest.approx([3 * t / (1 + 2 * t) for t in (1, 0.8, 0.6, 0.4, 0.2, 0)], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "scheduler", "message"),
    [
        ("sd3", DDIMScheduler(), "predict epsilon, this one predicts flow"),
        ("sd", FlowMatchEulerDiscreteScheduler(), "predict flow, this one predicts epsilon"),
        ("sd", DDIMScheduler(prediction_type="v_prediction"), "predict v_prediction, this one predicts epsilon"),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(family, scheduler, message):
    pipe, call = prepared(family)
    with pytest.raises(ValueError, match=message):
        hiflow(pipe, None, 1, (32, 64), CODE, scheduler=scheduler, call=call)


@torch.no_grad()
def test_what_the_scheduler_last_did_does_not_count():
    """A run of as many steps as a stage skips leaves the scheduler where that stage begins."""
    pipe, call = prepared("flux")
    expected = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    pipe(**call, height=32, width=32, num_inference_steps=N - K, output_type="latent")
    assert pipe.scheduler.step_index == N - K
    result = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    assert result.sigmas == expected.sigmas
    assert torch.equal(result.images[-1], expected.images[-1])


def test_schedulers_of_many_kinds_give_way_to_ddim():
    pipe, call = prepared("sd")
    stock = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    leading = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    result = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    same_end = DDIMScheduler.from_config({**pipe.scheduler.config, **leading})
    torch.testing.assert_close(
        hiflow(pipe, None, 1, (32, 64), CODE, scheduler=same_end, call=call).images[-1], stock.images[-1]
    )
    assert result.images[-1].isfinite().all()
    with pytest.raises(ValueError, match="HeunDiscreteScheduler"):
        hiflow(pipe, None, 1, (32, 64), CODE, scheduler=HeunDiscreteScheduler(), call=call)


def test_lora_in_all_stages():
    peft = pytest.importorskip("peft")
    pipe, call = prepared("flux")
    plain = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    assert not torch.allclose(adapted.images[0], plain.images[0], atol=1e-3)
    pipe.transformer.fuse_lora()
    fused = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    torch.testing.assert_close(fused.images[-1], adapted.images[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_lora_from_a_file(family, tmp_path):
    """As it is published: loaded by the pipeline, scaled there, and unloaded."""
    peft = pytest.importorskip("peft")
    pipe, call = prepared(family)
    plain = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    trained, _ = prepared(family)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    denoiser(trained).add_adapter(config)
    kind = "transformer" if denoiser(pipe) is pipe.components.get("transformer") else "unet"
    layers = {f"{kind}_lora_layers": peft.get_peft_model_state_dict(denoiser(trained))}
    trained.save_lora_weights(tmp_path, **layers)
    expected = hiflow(trained, None, 1, (32, 64), CODE, call=call)
    pipe.load_lora_weights(tmp_path)
    loaded = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    assert torch.equal(loaded.images[-1], expected.images[-1])
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(loaded.images, plain.images, strict=True))
    base = hiflow(pipe, None, 1, (32,), CODE, call=call)
    layers = [module for module in denoiser(pipe).modules() if isinstance(getattr(module, "scaling", None), dict)]
    for layer in layers[:-1]:  # block by block, as set_adapters can
        layer.scaling["default_0"] *= 0.5
        with pytest.raises(ValueError, match="another run: its adapters and dtype differed"):
            hiflow(pipe, None, 1, (32, 64), CODE, call=call, smaller=base)
    pipe.unload_lora_weights()
    unloaded = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    torch.testing.assert_close(unloaded.images[-1], plain.images[-1], rtol=0, atol=1e-5)


class Int8Tensor(torch.Tensor):
    """Eight bits and a scale a row in the wrapper of a float tensor, as torchao has it: it multiplies, and no more."""

    @staticmethod
    def __new__(cls, rows, scale):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype)

    def __init__(self, rows, scale):
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["rows", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Int8Tensor(**inner)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.rows.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        raise TypeError(f"{cls.__name__} has no {function}")


@torch.no_grad()
def test_an_int8_transformer_draws_nearly_the_same_picture():
    pipe, call = prepared("flux")
    exact = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(Int8Tensor.of(layer.weight), requires_grad=False)
    quantised = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    error = (quantised.images[-1] - exact.images[-1]).abs().mean()
    assert 0 < error < 0.02
    base = hiflow(pipe, None, 1, (32,), CODE, call=call)
    again = hiflow(pipe, None, 1, (32, 64), CODE, call=call, smaller=base)
    assert torch.equal(again.images[-1], quantised.images[-1])
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.rows.dtype == torch.int8
    weight.rows[0, 0] += 1  # another model now
    with pytest.raises(ValueError, match="another run: its pipeline differed"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=call, smaller=base)


@pytest.mark.parametrize("family", ["flux", "sd3", "sd", "sdxl", "qwen-image"])
def test_half_precision_draws_nearly_the_same_picture(family):
    pipe, call = prepared(family)
    exact = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    pipe.to(torch.bfloat16)
    floats = {name for name, value in call.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    halves = {name: value.bfloat16() if name in floats else value for name, value in call.items()}
    result = hiflow(pipe, None, 1, (32, 64), CODE, call=halves)
    assert result.images[-1].dtype == result.latents_BCHW.dtype == torch.float32
    assert 0 < (result.images[-1] - exact.images[-1]).abs().mean() < 0.02


def test_offloading_changes_nothing():
    """With the CPU as the device that weights are brought to: the same hooks as on a GPU."""
    pipe, call = prepared("flux")
    expected = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(hiflow(pipe, None, 1, (32, 64), CODE, call=call).images[-1], expected.images[-1])


def test_kontexts_condition_covers_the_large_picture_too():
    pipe, call = prepared("flux-kontext")
    seen = []
    pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hiflow(pipe, None, 1, (32, 64), PLAIN, call=call)
    base, large = seen[0], seen[-1]
    condition = [ids[ids[:, 0] == 1] for ids in (base, large)]
    assert condition[0][-1].tolist() == [1, 7, 7] and condition[1][-1].tolist() == [1, 14.5, 14.5]
    assert condition[1][0].tolist() == [1, 0.5, 0.5]
    assert len(large) - len(base) == 3 * 64
