"""Tiny random networks of the published classes, saved as their libraries save them, and ways to damage a picture."""

import math

import torch

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def save_depth_anything(folder):
    """Depth-Anything V2 Small's config with fewer, narrower layers."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=24, neck_hidden_sizes=[8, 12, 16, 16],
        fusion_hidden_size=8, head_in_channels=8, head_hidden_size=8,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    processor = DPTImageProcessor(size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14)
    processor.save_pretrained(folder)


def save_dinov2(folder):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    crop = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    BitImageProcessor(**crop, image_mean=MEAN, image_std=STD, resample=3).save_pretrained(folder)


def save_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = layers | {"image_size": 64, "patch_size": 16, "projection_dim": 24}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(folder)


def save_segformer(folder):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16,
        num_labels=150,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def save_smp(folder, classes, architecture="Unet", encoder="tu-mobilenetv3_small_050", **kwargs):
    import segmentation_models_pytorch as smp
    from transformers import SegformerImageProcessor

    network = getattr(smp, architecture)(encoder, encoder_weights=None, classes=classes, **kwargs)
    network.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def save_smp_depth(folder):
    save_smp(folder, classes=1, decoder_channels=[32, 16, 8, 8, 8])


def save_smp_segmentation(folder):
    save_smp(folder, classes=49, architecture="Segformer", encoder="mit_b0")


def save_timm(folder, architecture, **kwargs):
    import timm
    from timm.models import save_for_hf

    data_config = {key: kwargs.pop(key) for key in ("crop_pct", "mean", "std") if key in kwargs}
    network = timm.create_model(architecture, pretrained=False, **kwargs)
    save_for_hf(network, folder, safe_serialization=True, data_config=data_config)


def save_timm_vit(folder):
    save_timm(folder, "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0, crop_pct=1.0, mean=MEAN, std=STD)


def save_inception(folder):
    save_timm(folder, "inception_v3")


NETWORKS = {
    "depth-anything": ("depth", save_depth_anything),
    "smp-depth": ("depth", save_smp_depth),
    "dinov2": ("dino", save_dinov2),
    "timm-vit": ("dino", save_timm_vit),
    "dinov2-patches": ("dino_patches", save_dinov2),
    "timm-vit-patches": ("dino_patches", save_timm_vit),
    "clip": ("clip", save_clip),
    "segformer": ("segmentation", save_segformer),
    "smp-segmentation": ("segmentation", save_smp_segmentation),
    "inception": ("inception", save_inception),
}


def blurred(images, sigma):
    from torchvision.transforms.v2.functional import gaussian_blur

    return gaussian_blur(images, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def noisy(images, sigma):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    return (images + sigma * noise).clamp(0, 1)


def shifted(images, pixels):
    return images.roll(pixels, dims=-1)
