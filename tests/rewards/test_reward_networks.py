"""The published classes, tiny and random, loaded from folders: what comes out is what their own libraries say."""

import pytest
import torch
from tiny_networks import NETWORKS

from rewards import load_reward

SHAPES = {
    "depth-anything": ((64, 64), torch.float16),
    "smp-depth": ((64, 64), torch.float16),
    "dinov2": ((32,), torch.float32),
    "timm-vit": ((192,), torch.float32),
    "dinov2-patches": ((16, 32), torch.float16),
    "timm-vit-patches": ((16, 192), torch.float16),
    "clip": ((24,), torch.float32),
    "segformer": ((16, 16), torch.uint8),  # logits are a quarter of the 64-pixel input
    "smp-segmentation": ((64, 64), torch.uint8),
    "inception": ((1000,), torch.float32),
}
MAXIMUM = {"depth": 80, "dino": 100, "dino_patches": 100, "clip": 100, "segmentation": 100, "inception": 100}

every_network = pytest.mark.parametrize("key", NETWORKS)


@every_network
def test_features_are_compact(key, load_tiny, pictures):
    shape, dtype = SHAPES[key]
    features = load_tiny(key).features(pictures[:2])
    assert features.shape == (2, *shape) and features.dtype == dtype and not features.requires_grad


@every_network
def test_the_same_picture_scores_the_maximum(key, load_tiny, pictures):
    reward = load_tiny(key)
    maximum = MAXIMUM[NETWORKS[key][0]]
    same = reward(pictures[:4], target_images=pictures[:4])
    other = reward(pictures[:4], target_images=pictures[4:8])
    assert same.shape == (4,) and same.dtype == torch.float32
    torch.testing.assert_close(same, torch.full((4,), float(maximum)), atol=1e-4, rtol=0)
    assert (other < same - 1e-3).all()


@every_network
def test_cached_features_give_the_same_score(key, load_tiny, pictures):
    """Features that went through a dataset column; the other columns of the batch are swallowed."""
    reward = load_tiny(key)
    images, targets = pictures[:3], pictures[3:6]
    cached = torch.from_numpy(reward.features(targets).numpy().copy())
    score = reward(images=images, target_features=cached, prompts=["a", "b", "c"], seed=[1, 2, 3])
    assert score.equal(reward(images, target_images=targets))


@every_network
def test_one_image_or_sixteen(key, load_tiny, pictures):
    reward = load_tiny(key)
    count = 4 if key == "inception" else 16
    together = reward.features(pictures[:count]).float()
    alone = torch.cat([reward.features(pictures[i : i + 1]) for i in range(count)]).float()
    if NETWORKS[key][0] == "segmentation":  # a tie between two labels may fall either way
        assert (together == alone).float().mean() > 0.999
    else:
        scale = together.abs().max()  # a random Inception answers in the millions
        torch.testing.assert_close(together / scale, alone / scale, atol=1e-3, rtol=0)


@every_network
def test_autocast_around_it_changes_nothing(key, load_tiny, pictures):
    reward = load_tiny(key)
    outside = reward.features(pictures[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert reward.features(pictures[:2]).equal(outside)


@pytest.mark.parametrize("key", ["depth-anything", "smp-segmentation", "dinov2", "timm-vit", "clip"])
def test_half_precision_weights(key, network_folder, load_tiny, pictures):
    """bfloat16 weights score close to float32 weights, and keep the dtypes of the features."""
    half = load_reward(NETWORKS[key][0], model=network_folder(key), dtype=torch.bfloat16)
    assert half.features(pictures[:2]).dtype == SHAPES[key][1]
    scores = [reward(pictures[:4], target_images=pictures[4:8]) for reward in (half, load_tiny(key))]
    torch.testing.assert_close(*scores, atol=3.0, rtol=0)


def test_depth_anything_against_transformers(network_folder, load_tiny, pictures):
    """Its own processor, its own post-processing to the size of the image, then min–max. Not square, to 70 x 42."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder, images = network_folder("depth-anything"), pictures[:2, :, :, :40]
    processor = AutoImageProcessor.from_pretrained(folder)
    network = AutoModelForDepthEstimation.from_pretrained(folder).eval()
    files = [Image.fromarray(image.mul(255).byte().permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        outputs = network(**processor(images=files, return_tensors="pt"))
    assert outputs.predicted_depth.shape[1:] != (64, 40)
    for feature, post in zip(
        load_tiny("depth-anything").features(images),
        processor.post_process_depth_estimation(outputs, target_sizes=[(64, 40)] * 2),
        strict=True,
    ):
        depth = post["predicted_depth"]
        expected = (depth - depth.min()) / (depth.max() - depth.min())
        torch.testing.assert_close(feature.float(), expected, atol=1e-3, rtol=0)


def test_segformer_against_transformers(network_folder, load_tiny, pictures):
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    folder = network_folder("segformer")
    processor = AutoImageProcessor.from_pretrained(folder)
    network = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = network(**processor(images=pictures[:2].mul(255).byte(), return_tensors="pt"))
    expected = torch.stack(processor.post_process_semantic_segmentation(outputs))
    assert load_tiny("segformer").features(pictures[:2]).long().equal(expected)


def test_clip_against_the_vision_model_with_projection(network_folder, load_tiny, pictures):
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    folder = network_folder("clip")
    inputs = CLIPImageProcessor.from_pretrained(folder)(images=pictures[:2].mul(255).byte(), return_tensors="pt")
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(**inputs).image_embeds
    torch.testing.assert_close(load_tiny("clip").features(pictures[:2]), expected, atol=1e-5, rtol=1e-4)


def test_dino_is_the_pooled_output(network_folder, load_tiny, pictures):
    """Dinov2Model pools by taking the class token; timm does so in `forward_head`."""
    reward, x = load_tiny("dinov2"), pictures[:2]
    pixel_values = reward.preprocess(x.mul(255).byte())
    with torch.no_grad():
        expected = reward.network(pixel_values=pixel_values).pooler_output
    torch.testing.assert_close(reward.features(x), expected)

    reward = load_tiny("timm-vit")
    with torch.no_grad():
        expected = reward.network(reward.preprocess(x.mul(255).byte()))  # num_classes=0: the pooled token
    torch.testing.assert_close(reward.features(x), expected)


def test_dino_patches_are_the_tokens_behind_class_and_registers(load_tiny, pictures, tmp_path):
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    size = {"height": 28, "width": 28}
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    BitImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)
    assert config.num_register_tokens == 4
    registers = load_reward("dino_patches", model=tmp_path)
    assert registers.features(pictures[:2]).shape == (2, 4, 32)

    images, targets = pictures[:2].clone(), pictures[:2]
    images[0, :, :, 32:] = targets[1, :, :, 32:]
    reward = load_tiny("timm-vit-patches")
    pixels = [reward.preprocess(x.mul(255).byte()) for x in (images, targets)]
    with torch.no_grad():
        one, other = (reward.network.forward_features(x)[:, 1:] for x in pixels)
    expected = (torch.cosine_similarity(one, other, dim=-1).mean(dim=1) + 1) * 50
    torch.testing.assert_close(reward(images, target_images=targets), expected, atol=0.02, rtol=0)  # kept in float16
    assert expected[0] < 100


def test_inception_is_the_logits(load_tiny, pictures):
    reward = load_tiny("inception")
    with torch.no_grad():
        expected = reward.network(reward.preprocess(pictures[:1].mul(255).byte()))
    torch.testing.assert_close(reward.features(pictures[:1]), expected)


def test_timm_prefixes(network_folder, pictures, load_tiny):
    folder = network_folder("timm-vit")
    prefixed = load_reward("dino", model=f"local-dir:{folder}")
    assert prefixed.features(pictures[:1]).equal(load_tiny("timm-vit").features(pictures[:1]))


def test_to_moves_network_and_images(network_folder):
    """The meta device stands in for an accelerator: weights and bookkeeping move together."""
    reward = load_reward("dino", model=network_folder("timm-vit"))
    assert reward.to("meta") is reward
    assert reward.device.type == "meta" and {weight.device.type for weight in reward.network.parameters()} == {"meta"}


def test_as_a_reward_function():
    reward = load_reward("rewards.pixels.PixelReward")
    assert reward.__name__ == reward.name == "pixels" and callable(reward)
