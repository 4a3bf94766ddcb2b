"""The latent layouts of all families, against what their stock pipelines do."""

import inspect

import numpy as np
import pytest
import torch
from tiny_pipelines import FAMILIES, run, tiny_pipeline, unet

from solver.samplers.latents import (
    as_seeds,
    decode,
    default_size,
    denoiser,
    has_flux_transformer,
    initial_noise,
    is_packed,
    is_video,
    latent_shape,
    pack,
    patch_size,
    unpack,
    vae_factor,
)

# family -> channels, latent frames, pixels a latent, latents a token, accepted arguments
FACTS = {
    "sd": (4, None, 2, 1, {"sigmas", "timesteps"}),
    "sdxl": (4, None, 2, 1, {"sigmas", "timesteps"}),
    "sd3": (4, None, 2, 2, {"sigmas"}),
    "sd35": (4, None, 2, 2, {"sigmas"}),
    "flux": (4, None, 2, 2, {"sigmas"}),
    "flux-kontext": (4, None, 2, 2, {"sigmas"}),
    "qwen-image": (4, None, 2, 2, {"sigmas"}),
    "wan": (16, 2, 8, 2, set()),
    "hunyuan-video": (4, 2, 8, 2, {"sigmas"}),
}
FRAMES = 5
HEIGHT, WIDTH = 32, 64


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param, *tiny_pipeline(request.param, batch_size=2)


def shape_of(pipe):
    return latent_shape(pipe, HEIGHT, WIDTH, FRAMES if is_video(pipe) else None)


def test_sizes(family):
    name, pipe, _ = family
    channels, frames, factor, patch, _ = FACTS[name]
    assert (vae_factor(pipe), patch_size(pipe)) == (factor, patch)
    expected = (channels, *([frames] if frames else []), HEIGHT // factor, WIDTH // factor)
    assert shape_of(pipe) == expected
    for wrong in (WIDTH + factor * patch // 2, 0, -WIDTH, 2**20):
        with pytest.raises(ValueError, match=f"width={wrong}.*multiples of {factor * patch}, at most 65536"):
            latent_shape(pipe, HEIGHT, wrong)


def test_seeds_have_64_bits():
    assert len(initial_noise([-(2**63), 2**64 - 1, np.int64(7)], (1, 2, 2)).unique()) == 12
    for wrong in (2**64, -(2**63) - 1, 1.5, "7", None):
        with pytest.raises(ValueError, match=f"seed={wrong!r}: expected a whole number of 64 bits"):
            initial_noise([7, wrong], (1, 2, 2))
        with pytest.raises(ValueError, match=f"seed={wrong!r}: expected"):
            as_seeds([7, wrong])
    assert as_seeds(np.int64(7)) == as_seeds([7]) == as_seeds(np.array([7])) == [7]


def test_what_each_accepts(family):
    name, pipe, _ = family
    accepted = inspect.signature(pipe.__call__).parameters
    assert {"sigmas", "timesteps"} & set(accepted) == FACTS[name][-1]
    assert {"latents", "output_type", "height", "width", "num_inference_steps"} <= set(accepted)
    assert is_video(pipe) == ("num_frames" in accepted)


def test_transformers_of_the_flux_type():
    expected = {"flux": True, "flux-kontext": True, "sd3": False, "sd": False, "qwen-image": False}
    assert {family: has_flux_transformer(tiny_pipeline(family)[0]) for family in expected} == expected


def test_unpack_inverts_pack(family):
    _, pipe, _ = family
    noise = torch.randn(2, *shape_of(pipe), generator=torch.Generator().manual_seed(0))
    packed = pack(pipe, noise)
    assert torch.equal(unpack(pipe, packed, shape_of(pipe)), noise)
    assert (packed.ndim == 3) == is_packed(pipe)


def test_latents_and_pictures_are_those_of_the_pipeline(family):
    """The noise that the pipeline draws itself, handed in by us, gives the same latents and the same pictures."""
    _, pipe, call = family
    call = {**call, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 2}
    call |= {"max_area": HEIGHT * WIDTH} if "max_area" in call else {}
    shape = shape_of(pipe)
    seeds = [generator.initial_seed() for generator in call["generator"]]
    drawn = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    handed = run(pipe, {**call, "latents": pack(pipe, torch.cat(drawn))})
    assert torch.equal(handed, run(pipe, call))
    pictures = run(pipe, call, output_type="pt")
    torch.testing.assert_close(decode(pipe, unpack(pipe, handed, shape)), pictures.float(), rtol=1e-5, atol=1e-5)


def test_tokens_lie_where_their_position_ids_say():
    """Token n of a packed grid is the block whose row and column FLUX tells the network."""
    pipe, _ = tiny_pipeline("flux")
    channels, height, width = latent_shape(pipe, HEIGHT, WIDTH)
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    grid = torch.stack([rows, columns] * (channels // 2)).float()[None]
    tokens = pack(pipe, grid).reshape(-1, channels, 4)  # channel by channel, the four latents of a block
    ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(tokens[:, 0].min(dim=-1).values, 2 * ids[:, 1])
    assert torch.equal(tokens[:, 1].min(dim=-1).values, 2 * ids[:, 2])
    assert len(ids) == height * width // 4


@pytest.mark.parametrize("family", ["flux", "flux-kontext", "qwen-image"])
def test_the_network_is_told_where_tokens_lie(family):
    """Row by row, as `pack` has them; the picture to edit comes after, under a number of its own."""
    pipe, call = tiny_pipeline(family)
    told = []
    denoiser(pipe).register_forward_pre_hook(lambda _, __, given: told.append(given), with_kwargs=True)
    call = {**call, "height": HEIGHT, "width": WIDTH}
    call |= {"max_area": HEIGHT * WIDTH} if "max_area" in call else {}
    run(pipe, call, num_inference_steps=1)
    _, height, width = latent_shape(pipe, HEIGHT, WIDTH)
    rows, columns = height // 2, width // 2
    if family == "qwen-image":
        assert told[0]["img_shapes"][0] == [(1, rows, columns)]
        return
    expected = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
    ids = told[0]["img_ids"]
    assert torch.equal(ids[: rows * columns].float(), expected)
    assert (ids[rows * columns :, 0] == 1).all() and (len(ids) > rows * columns) == (family == "flux-kontext")


def test_half_precision_runs_where_the_pipeline_runs():
    for name, expected in {"flux": torch.float16, "sd3": torch.float16, "wan": torch.float32}.items():
        pipe, _ = tiny_pipeline(name)
        denoiser(pipe).to(torch.float16)
        shape = latent_shape(pipe, 32, 32)
        assert pack(pipe, torch.zeros(1, *shape)).dtype == expected


def test_own_sizes():
    assert default_size(tiny_pipeline("qwen-image")[0]) == (256, 256)
    assert default_size(tiny_pipeline("wan")[0]) == (480, 832)
    pipe, _ = tiny_pipeline("hunyuan-video")
    assert latent_shape(pipe) == (4, 33, 90, 160)  # 129 frames of 720 x 1280
    with pytest.raises(ValueError, match=r"height=0, width=32.*multiples"):
        latent_shape(pipe, 0, 32)
    with pytest.raises(ValueError, match=r"num_frames=4.*multiple of 4 plus 1"):
        latent_shape(pipe, 32, 32, 4)
    with pytest.raises(ValueError, match=r"num_frames=5: FluxPipeline makes images"):
        latent_shape(tiny_pipeline("flux")[0], 32, 32, 5)


def test_unknown_layouts_are_refused():
    pipe, _ = tiny_pipeline("flux")
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match=r"NoneType as its vae.*AutoencoderKLWan"):
        latent_shape(pipe, 32, 32)


def test_a_mask_beside_the_latents_is_not_of_them():
    """Inpainting gives the denoiser 4 + 4 + 1 channels."""
    pipe, _ = tiny_pipeline("sd")
    pipe.unet = unet(in_channels=9, out_channels=4)
    assert latent_shape(pipe, HEIGHT, WIDTH) == (4, HEIGHT // 2, WIDTH // 2)
