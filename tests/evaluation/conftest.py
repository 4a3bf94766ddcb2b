"""Tiny random models that fit together: pipeline, solver, segmentation, DINO and CLIP networks, 16 x 16 pixels."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from solver import ConsistencySolverScheduler

sys.path.extend(str(Path(__file__).parents[1] / name) for name in (".", "data", "rewards"))

from tiny_networks import save_smp_segmentation
from tiny_teacher import make_tokenizer, save_models


def save_clip(folder):
    tokenizer = make_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = layers | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = layers | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)


def save_solver(folder, own, spread):
    """A solver whose last layer is random; with spread 0 it is its base rule."""
    solver = ConsistencySolverScheduler.from_scheduler(own, order=3, timestep_spacing="trailing", guidance_scale=3.0)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.normal_(0, spread, generator=torch.Generator().manual_seed(0))
    solver.save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with `sd`, `dino`, `segmentation`, `clip`, `solver` and `untrained`."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    save_smp_segmentation(folder / "segmentation")
    save_clip(folder / "clip")
    own = StableDiffusionPipeline.from_pretrained(folder / "sd").scheduler
    save_solver(folder / "solver", own, spread=0.2)
    save_solver(folder / "untrained", own, spread=0.0)
    return folder
