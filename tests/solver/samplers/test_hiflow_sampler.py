"""HiFlow on stock pipelines of every family, against runs written out by hand."""

import inspect
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny_pipelines import run, tiny_pipeline
from torch import nn

from solver import ConsistencySolverScheduler
from solver.samplers.calls import guidance
from solver.samplers.hiflow import PRESETS, hiflow, with_steps
from solver.samplers.hiflow.alignment import enlarge, sharpen
from solver.samplers.hiflow.lowpass import lowpass
from solver.samplers.hiflow.memory import check_memory, decoder_bytes
from solver.samplers.hiflow.model_patches import exact_positions
from solver.samplers.hiflow.noise import clean_image, model_output_of, noised, stage_solver
from solver.samplers.hiflow.pixels import encode, tiled_where_needed
from solver.samplers.hiflow.plan import plan_stages
from solver.samplers.hiflow.sampler import _control_of_stage, is_distilled_to_few_steps
from solver.samplers.latents import decode, denoiser, latent_shape, pack, unpack

N, K = 5, 3
ZOO = Path(__file__).parents[3] / "zoo"
CODE = replace(with_steps(PRESETS["code"], N), stage_steps=(K,))
PLAIN = replace(CODE, ntk_factor=(1.0,), proportional_attention=False, shifted_patches=False)
IMAGE_FAMILIES = ("flux", "flux-kontext", "sd3", "sd", "sdxl", "qwen-image")
OURS = ("height", "width", "generator", "output_type", "guidance_scale", "true_cfg_scale", "max_area")


def prepared(family, batch_size=1):
    pipe, call = tiny_pipeline(family, batch_size=batch_size)
    return pipe, {name: value for name, value in call.items() if name not in OURS}


def noise_of(pipe, seed, *sizes):
    """The noises of a cascade: one generator a picture, size after size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *latent_shape(pipe, size, size), generator=generator) for size in sizes]


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
    call |= {f"negative_{name}": torch.randn(call[name].shape) for name in names}
    with pytest.raises(ValueError, match="true_cfg_scale=3"):
        hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, "true_cfg_scale": 3})
    plain = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    guided = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=(1.0, 6.0), call=call)
    assert torch.equal(guided.images[0], plain.images[0])
    assert not torch.allclose(guided.images[1], plain.images[1], atol=1e-3)


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


def test_a_smaller_result_that_is_no_beginning_is_refused():
    pipe, call = prepared("sd")
    small = hiflow(pipe, None, 1, (32,), CODE, call=call)
    given = {"prompt": None, "seed": 1, "sizes": (32, 64), "preset": CODE, "call": call, "smaller": small}
    other_prompt = {**call, "prompt_embeds": call["prompt_embeds"] + 1}
    elsewhere = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
    cases = [
        ("32 x 32, and 48 x 48, 64 x 64 are to be rendered", {"sizes": (48, 64)}),
        ("another run: its steps differed", {"preset": with_steps(CODE, 7)}),
        ("the same guidance", {"guidance_scale": 5.0}),
        ("another run: its prompts and seeds differed", {"seed": 2}),
        ("another run: its prompts and seeds differed", {"call": other_prompt}),
        ("another run: its scheduler differed", {"scheduler": elsewhere}),
        ("another run: its pipeline differed", {"pipe": tiny_pipeline("sd", seed=1)[0]}),
        ("has to be the beginning", {"alignment": "none"}),
        ("has to be the beginning", {"sizes": (32,)}),
        ("another run: its prompts and seeds differed", {"seed": [1, 2], "call": prepared("sd", 2)[1]}),
        ("another run: its image differed", {"image": torch.rand(3, 32, 32)}),
    ]
    for message, changes in cases:
        with pytest.raises(ValueError, match=message):
            hiflow(**{"pipe": pipe, **given, **changes})


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


def sd_control():
    pipe, call = prepared("sd")
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    parts = {**pipe.components, "controlnet": network}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False), call, "image", "controlnet_cond"


def flux_control():
    pipe, call = prepared("flux")
    torch.manual_seed(0)
    network = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    parts = {
        name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    return FluxControlNetPipeline(**parts, controlnet=network), call, "control_image", "controlnet_cond"


@pytest.mark.parametrize("make", [sd_control, flux_control])
def test_control_images_follow_the_stages(make):
    pipe, call, argument, condition = make()
    pipe.set_progress_bar_config(disable=True)
    for parameter in pipe.controlnet.parameters():  # those that join the networks begin at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    shapes = []

    def look(_, args, given):
        shapes.append(tuple(given[condition].shape[1:]))

    pipe.controlnet.register_forward_pre_hook(look, with_kwargs=True)
    control = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: control})
    if argument == "image":
        assert set(shapes) == {(3, 32, 32), (3, 64, 64)}
    else:  # packed latents; the shifted steps see one patch more a side, and so does the ControlNet
        assert [shapes[0], shapes[N], shapes[N + 1]] == [(64, 16), (256, 16), (256, 16)]
    other = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: 1 - control})
    assert not torch.allclose(first.images[-1], other.images[-1], atol=1e-4)
    picture = Image.fromarray((control[0].permute(1, 2, 0) * 255).byte().numpy())
    result = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: picture})
    assert result.images[-1].shape[-1] == 64


class Int8Linear(nn.Module):
    """Weight-only quantisation: eight bits and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@torch.no_grad()
def test_an_int8_transformer_draws_nearly_the_same_picture():
    pipe, call = prepared("flux")
    exact = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    quantised = hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    error = (quantised.images[-1] - exact.images[-1]).abs().mean()
    assert 0 < error < 0.02
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.int8


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


# ---- what is refused ----


def test_bad_input_is_refused_before_anything_runs():
    pipe, call = prepared("sd")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    image = torch.rand(3, 32, 32)
    cases = [
        ("2 seeds", {"seed": [1, 2]}),
        ("3 prompts, but 1 seeds", {"prompt": ["a", "b", "c"]}),
        ("neither a prompt nor", {"call": {}}),
        ("latents: hiflow says these itself", {"call": {**call, "latents": torch.zeros(1)}}),
        ("eta=0.5: .* deterministic", {"call": {**call, "eta": 0.5}}),
        ("true_cfg_scale, which StableDiffusionPipeline does not take", {"call": {**call, "true_cfg_scale": 2}}),
        ("multiples of 2", {"sizes": (32, 63)}),
        ("sizes begin with 48 x 48", {"sizes": (48, 64), "image": image}),
        ("expected .3, H, W.", {"image": torch.rand(1, 32, 32)}),
        ("values from", {"image": image * 255}),
        ("image is a ndarray", {"image": image.numpy()}),
        ("takes no image", {"image": image, "alignment": "none"}),
        ("give its own size and a larger one", {"image": image, "sizes": (32,)}),
        ("preset='codes'", {"preset": "codes"}),
        (
            r"needs about .* GiB on cpu.*helps: smaller sizes, pipe.vae.enable_tiling.., half precision; ignore",
            {"sizes": (32, 2**16)},
        ),
    ]
    for message, changes in cases:
        given = {"prompt": None, "seed": 1, "sizes": (32, 64), "preset": CODE, "call": call, **changes}
        with pytest.raises(ValueError, match=message):
            hiflow(pipe, **given)


def test_memory_counts_the_text_and_what_kontext_edits():
    pipe, call = prepared("flux-kontext")
    stages = plan_stages((32, 64), CODE, 4)
    check_memory(pipe, stages, 1, call)
    del call["image"]
    long = {**call, "prompt_embeds": torch.empty(1, 10**10, 16, device="meta")}
    large = {**call, "image": torch.empty(1, 4, 10**5, 10**5, device="meta")}
    for given in (long, large):
        with pytest.raises(ValueError, match="64 x 64 in a batch of 1 needs about"):
            check_memory(pipe, stages, 1, given)


def test_families_that_cannot():
    with pytest.raises(ValueError, match="'fixed-noise' is for flow models, and this one predicts epsilon"):
        pipe, call = prepared("sd")
        hiflow(pipe, None, 1, (32, 64), replace(CODE, acceleration="fixed-noise"), call=call)
    with pytest.raises(ValueError, match="makes videos"):
        pipe, call = prepared("wan")
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)
    with pytest.raises(ValueError, match="positions for 384"):
        pipe, call = prepared("sd3")
        hiflow(pipe, None, 1, (32, 512), CODE, call=call)


def test_pipelines_and_solvers_that_do_not_fit():
    pipe, call = prepared("sd")
    image_to_image = StableDiffusionImg2ImgPipeline(**pipe.components)
    with pytest.raises(ValueError, match="does not begin with noise that it is given; take the text-to-image"):
        hiflow(image_to_image, None, 1, (32, 64), CODE, call=call)
    pipe, call = prepared("sdxl")
    with pytest.raises(ValueError, match="call has denoising_end"):
        hiflow(pipe, None, 1, (32, 64), CODE, call={**call, "denoising_end": 0.5})
    pipe, call = prepared("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    with pytest.raises(ValueError, match="draws noise at every step"):
        hiflow(pipe, None, 1, (32, 64), CODE, call=call)


def test_a_preset_has_the_few_steps_that_a_model_is_distilled_to():
    pipe, call = prepared("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert not is_distilled_to_few_steps(pipe)  # it is told its guidance: FLUX dev
    schnell = FluxTransformer2DModel.from_config(pipe.transformer.config, guidance_embeds=False)
    pipe.register_modules(transformer=schnell)
    assert is_distilled_to_few_steps(pipe)
    result = hiflow(pipe, None, 1, (32, 64), "code", call=call)
    assert [stage.steps for stage in result.stages] == [4, 2]
    assert [stage.steps for stage in hiflow(pipe, None, 1, (32, 64), CODE, call=call).stages] == [N, K]


def test_memory_of_a_small_decoder():
    """As many values a pixel as its first channels make: 32 of the miniature's against 128."""
    assert decoder_bytes(512, 512, 4, channels=32) == decoder_bytes(512, 512, 4) / 4
    pipe, call = prepared("flux")
    pipe.vae.register_to_config(block_out_channels=(4, 8))
    check_memory(pipe, plan_stages((32, 1024), CODE, 4), 20, call)  # 100 MB each, and not 2.5 GB


def test_where_control_begins_and_ends_counts_the_whole_grid():
    stage = plan_stages((64, 128), replace(CODE, steps=30, stage_steps=(10,)), 16)[1]
    call = {"control_guidance_start": 0.5, "control_guidance_end": [0.8, 1.0]}
    assert _control_of_stage(call, stage) == {
        "control_guidance_start": 0.0,
        "control_guidance_end": [pytest.approx(0.4), 1.0],
    }
    assert _control_of_stage({}, stage) == {}


def test_control_pictures_in_pixels_keep_up_with_moved_patches():
    """XLabs' ControlNets take the picture itself, eight pixels a latent: so wide is the border that moves patches."""
    pipe, call = prepared("flux")
    four = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    known = {name: value for name, value in pipe.vae.config.items() if not name.startswith("_")}
    vae = AutoencoderKL(**{**known, **four, "block_out_channels": (4, 4, 4, 8)})
    names = inspect.signature(FluxControlNetModel).parameters
    known = {name: value for name, value in pipe.transformer.config.items() if name in names}
    network = FluxControlNetModel(**{**known, "conditioning_embedding_channels": 4, "patch_size": 2})
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor", "vae")}
    pipe = FluxControlNetPipeline(**parts, vae=vae, controlnet=network)
    pipe.set_progress_bar_config(disable=True)
    sizes = []
    network.input_hint_block.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[-1]))
    call = {**call, "control_image": torch.rand(1, 3, 64, 64)}
    result = hiflow(pipe, None, 1, (64, 128), CODE, call=call)
    assert result.images[-1].isfinite().all()
    assert sizes == [64] * N + [144, 128, 144]  # moved at every other step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_told_apart(dtype):
    """In bfloat16, of 384 rows there are 321."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, img_ids):
            seen.append(img_ids)

    ids = torch.cartesian_prod(torch.arange(384.0), torch.arange(2.0))
    ids = torch.cat([torch.zeros(len(ids), 1), ids], dim=1).to(dtype)
    condition = torch.tensor([[1.0, 5.0, 6.0]], dtype=dtype)
    network = Network()
    with exact_positions(network, (384, 2)):
        network(img_ids=torch.cat([ids, condition]))
    assert seen[0].dtype == torch.float32 and len(seen[0][:-1, 1].unique()) == 384
    assert seen[0][-1].tolist() == [1.0, 5.0, 6.0] and not network._forward_pre_hooks
