"""The landed models load as any other model does, and still measure what their cards say."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from zoo import measure
from zoo.measure import ZOO, held_out

FOLDERS = ("mini-sd", "mini-flux", "depth", "segmentation", "clip", "dino")


@pytest.fixture(scope="module")
def pipeline():
    return measure.load_pipeline()


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_complete_and_hold_no_pickles(name):
    folder = ZOO / name
    card = (folder / "README.md").read_text()
    for fact in ("training", "metrics"):
        assert json.loads((folder / f"{fact}.json").read_text())
    assert "| minutes |" in card and "| hardware |" in card and "zoo/train_" in card
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_the_zoo_stays_small():
    weights = sum(path.stat().st_size for path in ZOO.rglob("*.safetensors"))
    assert weights < 40e6


def test_the_card_says_what_was_measured():
    for name in FOLDERS:
        metrics = json.loads((ZOO / name / "metrics.json").read_text())
        card = (ZOO / name / "README.md").read_text()
        for key, value in metrics.items():
            if not isinstance(value, dict):
                assert f"| {key} | {value} |" in card


def test_pictures_depend_on_their_seed_alone(pipeline):
    words = [claim.text for claim in held_out(3)[1]]

    def draw(rows):
        return pipeline(
            [words[i] for i in rows],
            generator=[torch.Generator().manual_seed(i) for i in rows],
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="pt",
        ).images

    together = draw([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(draw([i])[0], together[i], atol=2e-3, rtol=0)
    assert (together[0] - together[1]).abs().mean() > 0.02


def picture(pipe, steps, guidance_scale):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red ball", num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator).images[0]


def test_the_pipeline_follows_guidance(pipeline):
    assert picture(pipeline, 3, 1.0) != picture(pipeline, 3, 5.0)


def test_the_pipeline_loads_in_half_precision():
    """One step: without instructions for bfloat16, a CPU takes seconds for each."""
    pipe = StableDiffusionPipeline.from_pretrained(ZOO / "mini-sd", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.bfloat16
    assert picture(pipe, 1, 1.0).size == (64, 64)


@pytest.mark.parametrize("name", ["mini-sd", "mini-flux"])
def test_all_parts_load_in_one_type(name):
    """Also where nobody names it, though diffusers and transformers have other defaults."""
    pipe = DiffusionPipeline.from_pretrained(ZOO / name)
    assert {part.dtype for part in pipe.components.values() if hasattr(part, "parameters")} == {torch.float32}


def card(name):
    return json.loads((ZOO / name / "metrics.json").read_text())


def test_autoencoder(pipeline):
    assert measure.vae_psnr(pipeline.vae, held_out(50)[0]) > card("mini-sd")["vae_psnr"] - 1


def test_depth():
    assert measure.measure_depth(200)["delta_1.25"] > card("depth")["delta_1.25"] - 0.01


def test_segmentation():
    metrics, landed = measure.measure_segmentation(200), card("segmentation")
    assert metrics["check"]["questions"] > landed["check"]["questions"] - 0.03
    assert metrics["pixel_accuracy"] > landed["pixel_accuracy"] - 0.005


def test_clip():
    assert measure.measure_clip(sets=4)["text_to_image_top1"] > card("clip")["text_to_image_top1"] - 0.07


@pytest.mark.slow
def test_dino():
    metrics, landed = measure.measure_dino(3000, 500), card("dino")
    assert metrics["probe_shape"] > landed["probe_shape"] - 0.08
    assert metrics["probe_colour"] > landed["probe_colour"] - 0.08
