"""Bad input never becomes a silent default: every error names the value."""

import json
import shutil

import pytest
import torch

from rewards import load_reward

IMAGES = torch.full((2, 3, 16, 16), 0.5)


def with_value(value):
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    "images, message",
    [
        (with_value(1.01), r"\[0, 1\].*1\.0"),
        (with_value(-0.01), r"\[0, 1\].*-0\.0"),
        (with_value(float("nan")), "nan"),
        (with_value(float("inf")), "inf"),
        (IMAGES[0], r"\(3, 16, 16\)"),
        (IMAGES[:, :1], r"\(2, 1, 16, 16\)"),
        (IMAGES[:0], r"\(0, 3, 16, 16\)"),
        (IMAGES.permute(0, 2, 3, 1), r"\(2, 16, 16, 3\)"),
        (IMAGES.mul(255).byte(), "uint8"),
        ([IMAGES[0]], "list"),
    ],
)
def test_images(images, message):
    with pytest.raises(ValueError, match=message):
        load_reward("pixels").features(images)


def test_targets():
    pixels = load_reward("pixels")
    with pytest.raises(ValueError, match="needs target_images or target_features"):
        pixels(IMAGES)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\).*\(1, 3, 16, 16\)"):
        pixels(IMAGES, target_images=IMAGES[:1])
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\).*\(2, 3, 8, 8\)"):
        pixels(IMAGES, target_images=IMAGES[:, :, :8, :8])


@pytest.mark.parametrize("name", ["dept", "", "rewards.depth.Depth", "nowhere.Reward", "os.path", None, 3])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="depth, dino, dino_patches, clip, segmentation, inception, pixels, ssim"):
        load_reward(name)


def test_pixels_have_no_model():
    with pytest.raises(ValueError, match="some/model"):
        load_reward("pixels", model="some/model")


@pytest.mark.parametrize("model", ["zoo/depht", "./nowhere/depth"])
def test_no_such_folder(model):
    with pytest.raises(OSError, match=f"'{model}' is no folder here"):
        load_reward("depth", model=model)


def test_empty_folder(tmp_path):
    with pytest.raises(OSError, match=r"no config\.json"):
        load_reward("depth", model=str(tmp_path))


@pytest.mark.parametrize(
    "key, name, mark",
    [("clip", "clip", "model_type"), ("timm-vit", "dino", "architecture"), ("smp-depth", "depth", "_model_class")],
)
class TestIncompleteFolders:
    @pytest.fixture
    def folder(self, key, network_folder, tmp_path):
        return shutil.copytree(network_folder(key), tmp_path / "model")

    def test_without_weights(self, name, mark, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match="no weights"):
            load_reward(name, model=folder)

    def test_with_broken_weights(self, name, mark, folder):
        (folder / "model.safetensors").write_bytes(b"not a tensor")
        with pytest.raises(OSError, match="cannot be loaded"):
            load_reward(name, model=folder)

    def test_with_a_missing_tensor(self, name, mark, folder):
        """Nothing random is put in its place."""
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights.pop("cls_token" if "cls_token" in weights else min(weights))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(OSError, match=r"(?i)lacks 1 |missing key"):
            load_reward(name, model=folder)

    def test_of_an_unknown_architecture(self, name, mark, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {mark: "perceptron"}))
        with pytest.raises((OSError, ValueError), match="perceptron"):
            load_reward(name, model=folder)

    def test_with_a_broken_config(self, name, mark, folder):
        (folder / "config.json").write_text("{broken")
        with pytest.raises(ValueError, match=r"config\.json is not JSON"):
            load_reward(name, model=folder)

    def test_of_an_unknown_library(self, name, mark, folder):
        (folder / "config.json").write_text('{"layers": 3}')
        with pytest.raises(ValueError, match="model_type, architecture, _model_class"):
            load_reward(name, model=folder)


@pytest.mark.parametrize("key, name", [("clip", "clip"), ("smp-depth", "depth")])
def test_folder_without_preprocessing(key, name, network_folder, tmp_path):
    folder = shutil.copytree(network_folder(key), tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        load_reward(name, model=folder)


@pytest.mark.parametrize(
    "key, name, message",
    [
        ("timm-vit", "depth", "timm model; the depth reward reads models of transformers or smp"),
        ("smp-segmentation", "depth", "49 output channels"),
        ("smp-depth", "segmentation", "1 classes"),
        ("dinov2", "clip", "get_image_features"),
        ("inception", "dino", "class token"),
        ("timm-vit", "inception", "no classes"),
        ("clip", "depth", "CLIPConfig"),
    ],
)
def test_networks_of_another_kind(key, name, message, network_folder):
    with pytest.raises(ValueError, match=message):
        load_reward(name, model=network_folder(key))


def test_a_network_that_overflows(network_folder):
    reward = load_reward("dino", model=network_folder("timm-vit"))
    with torch.no_grad():
        reward.network.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        reward.features(IMAGES)
