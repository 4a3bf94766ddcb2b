"""ControlNets in the stages of HiFlow."""

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxMultiControlNetModel,
    FluxTransformer2DModel,
    MultiControlNetModel,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from hiflow_cases import CODE, K, N, prepared
from PIL import Image
from torch import nn

from solver.samplers.hiflow import hiflow
from solver.samplers.hiflow.controls import control_of_stage
from solver.samplers.hiflow.pixels import encode
from solver.samplers.hiflow.plan import plan_stages
from solver.samplers.latents import pack


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


def sdxl_control():
    pipe, call = prepared("sdxl")
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    controlled = StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=network, add_watermarker=False)
    return controlled, call, "image", "controlnet_cond"


def sd3_control():
    """With two blocks: the last one takes no control."""
    pipe, call = prepared("sd3")
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_config(pipe.transformer.config, num_layers=2)
    network = SD3ControlNetModel.from_transformer(
        transformer, num_layers=1, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    parts = {**pipe.components, "transformer": transformer, "controlnet": network}
    return StableDiffusion3ControlNetPipeline(**parts), call, "control_image", "controlnet_cond"


def with_weights(pipe):
    """The pipeline, whose ControlNet is not without effect: the layers that join the networks begin at zero."""
    pipe.set_progress_bar_config(disable=True)
    for parameter in pipe.controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return pipe


@pytest.mark.parametrize("make", [sd_control, sdxl_control, sd3_control, flux_control])
def test_control_images_follow_the_stages(make):
    pipe, call, argument, condition = make()
    with_weights(pipe)
    shapes = []

    def look(_, args, given):
        shapes.append(tuple(given[condition].shape[1:]))

    pipe.controlnet.register_forward_pre_hook(look, with_kwargs=True)
    control = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: control})
    if argument == "image":
        assert set(shapes) == {(3, 32, 32), (3, 64, 64)}
    elif make is sd3_control:  # latents, as many as of the picture
        assert set(shapes) == {(4, 16, 16), (4, 32, 32)}
    else:  # packed latents; the shifted steps see one patch more a side, and so does the ControlNet
        assert [shapes[0], shapes[N], shapes[N + 1]] == [(64, 16), (256, 16), (256, 16)]
    other = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: 1 - control})
    assert not torch.allclose(first.images[-1], other.images[-1], atol=1e-4)
    picture = Image.fromarray((control[0].permute(1, 2, 0) * 255).byte().numpy())
    result = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: picture})
    assert result.images[-1].shape[-1] == 64


@pytest.mark.parametrize(
    ("make", "several"),
    [
        (sd_control, MultiControlNetModel),
        (sd3_control, SD3MultiControlNetModel),
        (flux_control, FluxMultiControlNetModel),
    ],
)
def test_several_control_images_follow_the_stages(make, several):
    """Two images, and the same network for both."""
    pipe, call, argument, _ = make()
    with_weights(pipe).register_modules(controlnet=several([pipe.controlnet] * 2))
    control = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    call |= {"controlnet_conditioning_scale": [1.0, 0.5]}
    made = [
        hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: [*pair]}).images[-1]
        for pair in (control, control.flip(0))
    ]
    assert made[0].shape[-1] == 64 and not torch.allclose(*made, atol=1e-4)


def test_where_control_begins_and_ends_counts_the_whole_grid():
    stage = plan_stages((64, 128), replace(CODE, steps=30, stage_steps=(10,)), 16)[1]
    call = {"control_guidance_start": 0.5, "control_guidance_end": [0.8, 1.0]}
    assert control_of_stage(call, stage) == {
        "control_guidance_start": 0.0,
        "control_guidance_end": [pytest.approx(0.4), 1.0],
    }
    assert control_of_stage({}, stage) == {}
    assert control_of_stage({"control_guidance_end": 0.5}, stage) == {
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
        "controlnet_conditioning_scale": 0.0,
    }
    call = {"control_guidance_end": [0.5, 0.8], "controlnet_conditioning_scale": [1.0, 0.7]}
    assert control_of_stage(call, stage) == {
        "control_guidance_start": [0.0, 0.0],
        "control_guidance_end": [1.0, pytest.approx(0.4)],
        "controlnet_conditioning_scale": [0.0, 0.7],
    }


CONTROL = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def scales_seen(pipe):
    """What the ControlNet's answer is multiplied by, evaluation by evaluation."""
    scales = []
    pipe.controlnet.register_forward_pre_hook(
        lambda _, args, given: scales.append(given["conditioning_scale"]), with_kwargs=True
    )
    return scales


@pytest.mark.parametrize("make", [sd_control, sdxl_control, sd3_control, flux_control])
@pytest.mark.parametrize("span", [{"control_guidance_end": 0.3}, {"control_guidance_start": 0.1}])
def test_control_that_ends_in_the_base_is_silent_afterwards(make, span):
    pipe, call, argument, _ = make()
    scales = scales_seen(with_weights(pipe))
    span = {"control_guidance_end": 0.35, **span}
    result = hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: CONTROL, **span})
    assert result.images[-1].isfinite().all()
    first = 0.0 if "control_guidance_start" in span else 1.0
    assert scales == [first] + [0.0] * (N - 1 + K)


@pytest.mark.parametrize(
    ("make", "several"), [(sd_control, MultiControlNetModel), (flux_control, FluxMultiControlNetModel)]
)
def test_one_of_several_controls_ends_in_the_base(make, several):
    pipe, call, argument, _ = make()
    with_weights(pipe).register_modules(controlnet=several([pipe.controlnet] * 2))
    scales = scales_seen(pipe)
    call |= {"controlnet_conditioning_scale": [1.0, 0.5], "control_guidance_end": [0.3, 1.0]}
    hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: [CONTROL] * 2})
    assert scales == [[1.0, 0.5]] + [[0.0, 0.5]] * (N - 1 + K)


@pytest.mark.parametrize("make", [sd3_control, flux_control])
def test_control_images_are_encoded_without_noise(make):
    """SD3's pipeline draws from the global generator, FLUX's from the one that drew the picture's own noise."""
    pipe, call, argument, condition = make()
    with_weights(pipe)
    seen = []
    pipe.controlnet.register_forward_pre_hook(
        lambda _, args, given: seen.append(given[condition][-1:]), with_kwargs=True
    )
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        made.append(hiflow(pipe, None, 1, (32, 64), CODE, guidance_scale=2.0, call={**call, argument: CONTROL}))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(made[0].images[-1], made[1].images[-1])
    assert "encode" not in vars(pipe.vae)
    if make is flux_control:  # whose pipeline maps the picture to [-1, 1] only if it is PIL
        torch.testing.assert_close(seen[0], pack(pipe, encode(pipe, (CONTROL + 1) / 2)))


def test_a_control_image_beside_the_latents_follows_the_stages():
    """FLUX.1 Canny and Depth have no ControlNet: the transformer sees the control image as further channels."""
    pipe, call = prepared("flux")
    known = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**{**known, "in_channels": 32, "out_channels": 16})
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = FluxControlPipeline(**{**parts, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    made = [
        hiflow(pipe, None, 1, (32, 64), CODE, call={**call, "control_image": control}).images[-1]
        for control in (CONTROL, 1 - CONTROL)
    ]
    assert made[0].shape[-1] == 64 and not torch.allclose(*made, atol=1e-4)


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
