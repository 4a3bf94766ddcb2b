"""Editing through the main job: a dataset of edits, its rollouts, a training run, on a tiny Kontext pipeline."""

import json

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import FluxKontextPipeline, FluxPipeline
from test_rollout import count_rows
from tiny_flux import save_tiny_flux
from torchvision.io import encode_png

from data.build import main as build
from data.dataset import PreviewDataset
from data.noise import initial_noise
from data.prompts import read_prompts, source_picture
from data.scenes import numbered_edit, render
from data.teacher import open_pipeline
from rewards import load_reward
from solver import ConsistencySolverScheduler
from solver.rollout import Renderer, rows_of
from solver.samplers.calls import encode_sources, guidance, text_length
from solver.trainer import ConsistencySolverTrainer
from solver.trainer_config import ConsistencySolverConfig

SIZE, GUIDANCE = 32, 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("model") / "flux")


def build_edits(model, folder, **changes):
    knobs = {
        "model": model, "output_dir": folder, "pipeline": "FluxKontextPipeline", "prompts": "edits:train",
        "num_prompts": 6, "guidance_scale": GUIDANCE, "scheduler": "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps": 2, "height": SIZE, "width": SIZE, "rewards": "pixels", "batch_size": 2, "shard_size": 4,
    }  # fmt: skip
    return build([part for name, value in (knobs | changes).items() for part in (f"--{name}", str(value))])


@pytest.fixture(scope="module")
def dataset(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    build_edits(model, folder)
    return PreviewDataset(folder)


@pytest.fixture
def pipe(model):
    return open_pipeline(str(model), pipeline="FluxKontextPipeline")


def stock_call(pipe, rows, noise_BCHW, **changes):
    """What a user would write: pictures, prompts, noise packed once."""
    call = {
        "image": torch.stack([row["source"] for row in rows]) / 255,
        "prompt": [row["prompt"] for row in rows],
        "negative_prompt": [""] * len(rows),
        "true_cfg_scale": GUIDANCE,
        "latents": pipe._pack_latents(noise_BCHW, *noise_BCHW.shape),
        "height": SIZE,
        "width": SIZE,
        "max_area": SIZE**2,
        "_auto_resize": False,
        "max_sequence_length": 32,
        "output_type": "latent",
    }
    latents = pipe(**call | changes).images
    return pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)


# -- the dataset ------------------------------------------------------------------------------------------------------


def test_rows_are_instructions_and_pictures_of_the_world(dataset):
    assert len(dataset) == 6 and dataset.teacher["pipeline"] == "FluxKontextPipeline"
    for i, row in enumerate(dataset):
        instruction, scene, _ = numbered_edit(i)
        assert row["prompt"] == instruction
        assert torch.equal(row["source"], render(scene, SIZE).image.permute(2, 0, 1))
    batch = PreviewDataset.collate([dataset[0], dataset[1]])
    assert batch["source"].shape == (2, 3, SIZE, SIZE)
    assert "`source`" in (dataset.folder / "README.md").read_text()


def test_noise_is_packed_once_and_every_row_has_its_own(dataset, pipe):
    """The published code packs the packed noise again, which permutes it, and gives all rows one seed."""
    rows = [dataset[i] for i in range(2)]
    assert len({row["seed"] for row in dataset}) == len(dataset)
    noise = initial_noise([row["seed"] for row in rows], dataset.latent_shape)
    assert not torch.allclose(noise[0], noise[1])
    expected = stock_call(pipe, rows, noise, num_inference_steps=2)
    targets = torch.stack([row["target_latents"] for row in rows])
    torch.testing.assert_close(targets, expected, rtol=2e-3, atol=2e-3)
    once = pipe._pack_latents(noise, *noise.shape)
    twice = pipe._pack_latents(once.reshape(noise.shape), *noise.shape)
    permuted = stock_call(pipe, rows, noise, num_inference_steps=2, latents=twice)
    assert (permuted - targets).abs().mean() > 0.1


def test_a_finished_build_of_edits_is_left_alone_and_another_source_is_refused(dataset, model):
    assert build_edits(model, dataset.folder).rendered == 0
    with pytest.raises(ValueError, match=r"prompts\.source"):
        build_edits(model, dataset.folder, prompts="edits:test")


def test_tables_of_pictures_and_instructions(tmp_path):
    """As the published data: a list of instructions a row, of which the first counts; pictures are cut to shape."""
    wide = torch.zeros(3, 20, 40, dtype=torch.uint8)
    wide[0, :, 10:30] = 200
    pictures = [bytes(encode_png(wide + n).numpy()) for n in (0, 1, 0)]
    rows = {
        "say": [["do this", "or that"], ["do this"], ["do this"]],
        "img": [{"bytes": p, "path": None} for p in pictures],
    }
    table = Dataset.from_dict(rows, Features({"say": List(Value("string")), "img": Image()}))
    table.to_parquet(tmp_path / "edits.parquet")
    prompts = read_prompts(str(tmp_path / "edits.parquet"), column="say", image_column="img")
    assert prompts.texts == ("do this", "do this") and prompts.duplicates == 1
    picture = source_picture(prompts.sources[0], 10, 10)
    assert picture.shape == (3, 10, 10) and (picture[0, :, 2:8] >= 199).all()  # Lanczos rings at the edge
    other = read_prompts(str(tmp_path / "edits.parquet"), column="say", image_column="img", num_prompts=1)
    assert other.sha256 != prompts.sha256


def test_a_pipeline_that_does_not_edit_says_so(model, tmp_path):
    with pytest.raises(ValueError, match="pipeline: FluxKontextPipeline"):
        build_edits(model, tmp_path, pipeline="FluxPipeline")


def test_a_pipeline_class_that_does_not_exist_is_named(model):
    with pytest.raises(ValueError, match="pipeline='Nothing'"):
        open_pipeline(str(model), pipeline="Nothing")


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_is_the_stock_call_with_the_solver(dataset, pipe):
    rows = [dataset[i] for i in range(3)]
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)
    renderer = Renderer(pipe, scheduler, SIZE, SIZE, batch_size=2)
    table = scheduler.coefficients(3, GUIDANCE, **renderer.grid(3, "x"))
    prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
    previews = renderer.render(prompts, seeds, GUIDANCE, table, [row["source"] for row in rows])
    pipe.scheduler = scheduler
    scheduler.guidance_scale = GUIDANCE
    expected = stock_call(pipe, rows, initial_noise(seeds, dataset.latent_shape), num_inference_steps=3)
    torch.testing.assert_close(previews.latents_BCHW, expected, rtol=1e-3, atol=1e-4)


def test_rows_share_their_first_evaluation_only_with_the_same_picture(dataset, pipe):
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2)
    renderer = Renderer(pipe, scheduler, SIZE, SIZE)
    actions = 0.3 * torch.randn(3, 2, scheduler.num_actions, generator=torch.Generator().manual_seed(0))
    table = scheduler.table_from_actions(actions, 2, **renderer.grid(2, "x"))
    sources = [dataset[i]["source"] for i in (0, 0, 1)]
    counted = count_rows(pipe.transformer)
    previews = renderer.render(["x"] * 3, [5] * 3, GUIDANCE, table, sources)
    assert counted == [2, 2, 3, 3]  # two distinct rows at first; each evaluation twice, for guidance
    alone = renderer.render(["x"], [5], GUIDANCE, rows_of(table, slice(2, 3)), sources[2:])
    torch.testing.assert_close(previews.latents_BCHW[2:], alone.latents_BCHW, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(previews.latents_BCHW[0], previews.latents_BCHW[2], atol=1e-2)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxKontextPipeline"])
def test_the_grid_is_shifted_for_the_size_of_the_picture(name, model):
    """μ is that of the scheduler for 64 and for 256 tokens; those of a picture to edit do not count."""
    pipe = open_pipeline(str(model), pipeline=name)
    scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler)
    grids = [Renderer(pipe, scheduler, size, size).grid(4) for size in (64, 128)]
    assert [grid["mu"] for grid in grids] == pytest.approx([0.5, 1.15])
    small, large = (scheduler.base_grid(4, **grid)[1].s for grid in grids)
    linear = torch.tensor([1.0, 0.75, 0.5, 0.25])
    for mu, shifted in ((0.5, small), (1.15, large)):
        e = torch.tensor(mu).exp()
        torch.testing.assert_close(shifted.float(), torch.cat([e / (e + 1 / linear - 1), torch.zeros(1)]))


def test_guidance_is_classifier_free_where_the_network_is_told_no_scale(model, pipe):
    assert guidance(pipe, 3.0, ["", ""]) == {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}
    assert guidance(pipe, 3.0, ["", "fog"]) == {"true_cfg_scale": 3.0, "negative_prompt": ["", "fog"]}
    assert text_length(pipe) == {"max_sequence_length": 32}
    with pytest.raises(ValueError, match="guidance_scale=1: a negative prompt needs more than 1"):
        guidance(pipe, 1.0, ["fog"])
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert guidance(pipe, 3.0, ["", ""]) == {"guidance_scale": 3.0}
    with pytest.raises(ValueError, match="is guided without a negative prompt"):
        guidance(pipe, 3.0, ["fog"])


def test_sources_are_encoded_as_the_pipeline_does_it(pipe, dataset):
    source = dataset[0]["source"][None]
    pictures = pipe.image_processor.preprocess(source / 255, SIZE, SIZE)
    expected = pipe._encode_vae_image(pictures, torch.Generator())
    torch.testing.assert_close(encode_sources(pipe, source), expected)
    torch.testing.assert_close(encode_sources(pipe, source / 255), expected)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [FluxKontextPipeline, FluxPipeline])
def test_the_trainer_learns_on_flow_models(pipeline, model, dataset, tmp_path):
    """Two iterations, twice: what is random follows from the seed, sources included."""
    if pipeline is FluxPipeline:
        build_edits(model, tmp_path / "texts", pipeline="FluxPipeline", prompts="scenes:train")
        dataset = PreviewDataset(tmp_path / "texts")
    solvers = []
    for name in ("a", "b"):
        pipe = open_pipeline(str(model), pipeline=pipeline.__name__)
        scheduler = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)
        torch.manual_seed(0)
        args = ConsistencySolverConfig(
            str(tmp_path / name), num_iterations=2, prompts_per_iteration=2, group_size=2, inference_steps=[2, 3],
            eval_inference_steps=[2], num_ppo_epochs=1, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, contact_sheet_rows=2,
        )  # fmt: skip
        reward = load_reward("pixels")
        trainer = ConsistencySolverTrainer(
            pipe, scheduler, reward, args, dataset, torch.utils.data.Subset(dataset, [0, 1])
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert torch.isfinite(torch.tensor(metrics["eval_reward"]))
        solvers.append(scheduler.policy.state_dict())
    assert all(torch.equal(solvers[0][key], solvers[1][key]) for key in solvers[0])
    assert json.loads((dataset.folder / "teacher.json").read_text())["pipeline"] == pipeline.__name__
