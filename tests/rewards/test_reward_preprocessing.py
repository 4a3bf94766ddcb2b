"""Preprocessing against the model's own: its processor one picture at a time, and its Pillow transform."""

import json

import pytest
import torch
from PIL import Image
from tiny_networks import MEAN, STD

from rewards.networks import image_processor, timm_transform

# The files as published; two of them predate `image_processor_type`.
PUBLISHED = {
    "depth-anything/Depth-Anything-V2-Small-hf": {
        "do_normalize": True, "do_pad": False, "do_rescale": True, "do_resize": True, "ensure_multiple_of": 14,
        "image_mean": MEAN, "image_processor_type": "DPTImageProcessor", "image_std": STD, "keep_aspect_ratio": True,
        "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 518, "width": 518},
        "size_divisor": None,
    },
    "facebook/dinov2-base": {
        "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
        "image_processor_type": "BitImageProcessor", "image_std": STD, "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
    },
    "openai/clip-vit-large-patch14": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
    },
    "nvidia/segformer-b4-finetuned-ade-512-512": {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "SegformerFeatureExtractor",
        "image_mean": MEAN, "image_std": STD, "reduce_labels": True, "resample": 2, "size": 512,
    },
}  # fmt: skip
SIZES = [(64, 64), (96, 160), (300, 200)]


def pictures_of(size):
    """Four smooth pictures with a little noise, uint8 (4, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    images = images + 0.03 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def as_files(images_u8_BCHW):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images_u8_BCHW]


def assert_pillow_agrees(ours, pillow, std):
    """Pillow and torchvision round a few pixels differently, by two levels of 255 at most; the mean hardly moves."""
    difference = (ours - pillow).abs()
    assert difference.mean() < 1e-3
    assert difference.max() <= 2.001 / 255 / min(std)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_processors(name, size, tmp_path):
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED[name]))
    (tmp_path / "config.json").write_text("{}")
    images = pictures_of(size)
    ours = image_processor(str(tmp_path))(images)

    own = AutoImageProcessor.from_pretrained(tmp_path)
    for row, file in zip(ours, as_files(images), strict=True):
        torch.testing.assert_close(row, own(images=file, return_tensors="pt")["pixel_values"][0], atol=1e-3, rtol=0)
    pillow = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = pillow(images=as_files(images), return_tensors="pt")["pixel_values"]
    assert_pillow_agrees(ours, expected, PUBLISHED[name]["image_std"])


def test_depth_anything_keeps_the_aspect_ratio(tmp_path):
    """A 300 x 500 image to 518: the side that changes less sets the scale 518/500, then both go to multiples of 14."""
    config = PUBLISHED["depth-anything/Depth-Anything-V2-Small-hf"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert image_processor(str(tmp_path))(pictures_of((300, 500))).shape == (4, 3, 308, 518)


def test_a_network_that_eats_zero_to_one(tmp_path):
    """`do_normalize=False` at the right size: the images pass unchanged."""
    from transformers import SegformerImageProcessor

    SegformerImageProcessor(size={"height": 64, "width": 64}, do_normalize=False).save_pretrained(tmp_path)
    images = pictures_of((64, 64))
    torch.testing.assert_close(image_processor(str(tmp_path))(images), images / 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 518, 518), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},
        {"input_size": (3, 299, 299), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"},
        {"input_size": (3, 64, 64), "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash"},
    ],
    ids=lambda config: f"{config['input_size'][1]}-{config['crop_mode']}",
)
def test_timm_transform(config, size):
    from timm.data import create_transform

    config = config | {"mean": tuple(MEAN), "std": tuple(STD)}
    images = pictures_of(size)
    pillow = create_transform(**config)
    assert_pillow_agrees(timm_transform(config)(images), torch.stack([pillow(file) for file in as_files(images)]), STD)


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"input_size": (3, 64, 96)}])
def test_timm_transforms_that_are_refused(change):
    config = {"input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"} | change
    with pytest.raises(ValueError, match="not supported"):
        timm_transform(config | {"mean": MEAN, "std": STD})
