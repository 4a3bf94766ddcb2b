import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from tiny_teacher import build_args, make_tiny_flux, make_tiny_sd, make_tiny_sd3, make_tiny_sdxl, save_models
from torch.utils.data import DataLoader, Subset

from data.build import main
from data.dataset import PreviewDataset
from data.noise import initial_noise, noise_check
from data.shards import write_shard
from rewards import load_reward
from solver.samplers.latents import decode, default_size, latent_shape, pack, unpack
from solver.training_data import check_features

EMBEDS = {"prompt_embeds": torch.ones(2, 5, 16), "pooled_prompt_embeds": torch.ones(2, 16)}
FAMILIES = {
    "sd": (make_tiny_sd, {"prompt_embeds": torch.ones(2, 32, 16), "guidance_scale": 1.0}),
    "sdxl": (make_tiny_sdxl, EMBEDS | {"guidance_scale": 1.0}),
    "sd3": (make_tiny_sd3, EMBEDS | {"guidance_scale": 1.0}),
    "flux": (make_tiny_flux, EMBEDS),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    main(build_args(models, folder))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def dataset(folder):
    return PreviewDataset(folder)


# Noise


def test_noise_is_a_function_of_its_seed():
    shape = (4, 8, 8)
    noise = initial_noise([3, 7, 3], shape)
    assert noise.dtype == torch.float32
    for row, seed in zip(noise, (3, 7, 3), strict=True):
        assert torch.equal(row, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(initial_noise([7], shape)[0], noise[1])
    assert noise_check(noise[1]) == noise[1, 0, 0].tolist()
    torch.manual_seed(0)  # the global generator has no say, and is left alone
    before = torch.random.get_rng_state()
    assert torch.equal(initial_noise([3, 7, 3], shape), noise)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match="at least one seed"):
        initial_noise([], shape)


# Latents


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_go_in_and_out_of_every_family(family):
    make, call = FAMILIES[family]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    shape = latent_shape(pipe, height=16, width=24)
    assert shape == (4, 8, 12)
    noise = initial_noise([1, 2], shape)
    assert torch.equal(unpack(pipe, pack(pipe, noise), shape), noise)
    call = call | {"height": 16, "width": 24, "num_inference_steps": 2, "latents": pack(pipe, noise)}
    latents = unpack(pipe, pipe(**call, output_type="latent").images, shape)
    assert latents.shape == noise.shape
    torch.testing.assert_close(decode(pipe, latents), pipe(**call, output_type="pt").images)


def test_packing_is_that_of_the_pipeline():
    pipe = make_tiny_flux()
    noise, _ = pipe.prepare_latents(1, 4, 16, 24, torch.float32, "cpu", torch.Generator().manual_seed(5))
    assert torch.equal(pack(pipe, initial_noise([5], (4, 8, 12))), noise)


def test_sizes():
    assert default_size(make_tiny_sd()) == (16, 16)
    assert latent_shape(make_tiny_sd3()) == (4, 8, 8)
    assert default_size(make_tiny_flux()) == (16, 16)
    with pytest.raises(ValueError, match=r"height=16, width=18.*multiples of 4"):
        latent_shape(make_tiny_flux(), 16, 18)
    pipe = make_tiny_sd()
    pipe.register_modules(vae=None)
    with pytest.raises(ValueError, match="NoneType as its vae"):
        latent_shape(pipe)


# Reading


def test_rows_fit_together(models, dataset):
    assert len(dataset) == 18
    pipe = make_tiny_sd()
    dino = load_reward("dino", model=str(models / "dino"))
    for row in (dataset[0], dataset[17]):
        assert row["target"].dtype == torch.uint8 and row["target"].shape == (3, 16, 16)
        assert row["target_latents"].dtype == torch.float32
        decoded = decode(pipe, row["target_latents"][None])[0] * 255
        assert (decoded - row["target"]).abs().max() < 1.5  # latents went through float16
        image_BCHW = row["target"][None] / 255
        torch.testing.assert_close(row["features"]["dino"], dino.features(image_BCHW)[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(row["features"]["pixels"], row["target"])
    assert [dataset[i]["seed"] for i in range(18)] == list(range(18))
    assert torch.equal(dataset.noise([5]), initial_noise([5], (4, 8, 8)))


def test_batches(dataset):
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=PreviewDataset.collate)))
    assert batch["prompt"] == [dataset[i]["prompt"] for i in range(4)]
    assert batch["seed"].tolist() == [0, 1, 2, 3]
    assert batch["guidance_scale"].tolist() == [3.0, 7.5, 3.0, 7.5]
    assert batch["target"].shape == (4, 3, 16, 16)
    assert batch["features"]["dino"].shape == (4, 32)
    assert torch.equal(batch["target_latents"][2], dataset[2]["target_latents"])


def test_keys_can_be_ignored(folder):
    assert PreviewDataset(folder, ignore=["target", "features"])[0].keys() == {
        "prompt", "seed", "guidance_scale", "target_latents",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'depth'"):
        PreviewDataset(folder, ignore=["depth"])


def test_datasets_reads_the_folder_by_itself(folder):
    rows = load_dataset(str(folder), split="train")
    assert rows.num_rows == 18
    assert rows[0]["target"].size == (16, 16)


# Errors


def test_another_teacher_is_refused(models, dataset):
    dataset.check_teacher(model=str(models / "sd"), height=16, scheduler={"solver_order": 2})
    with pytest.raises(ValueError, match=r"height: 16 in teacher\.json, 64 here"):
        dataset.check_teacher(model=str(models / "sd"), height=64)
    with pytest.raises(ValueError, match=r"scheduler\.solver_order: 2 in teacher\.json, 3 here"):
        dataset.check_teacher(scheduler={"solver_order": 3})
    with pytest.raises(ValueError, match=r"model: .*/sd' in teacher.json, 'zoo/mini-sd' here"):
        dataset.check_teacher(model="zoo/mini-sd")
    with pytest.raises(ValueError, match=r"no steps; it has model"):
        dataset.check_teacher(steps=3)


def test_damaged_shards_are_refused(copy):
    shard = copy / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes().replace(b"PNG", b"BNG", 1))
    with pytest.raises(ValueError, match=r"shard-00001\.parquet differ"):
        PreviewDataset(copy)
    assert len(PreviewDataset(copy, verify=False)) == 18


def test_an_unfinished_build_is_refused(copy, tmp_path):
    (copy / "shard-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 shards are missing"):
        PreviewDataset(copy)
    with pytest.raises(FileNotFoundError, match=r"no teacher\.json"):
        PreviewDataset(tmp_path)


def test_a_drifting_generator_is_noticed(copy):
    shard = copy / "shard-00002.parquet"
    rows = pq.read_table(shard).to_pylist()
    rows[1]["noise_check"][3] += 1e-3
    write_shard(shard, rows, ["pixels", "dino"], [])
    with pytest.raises(ValueError, match="noise of seed 11 began with"):
        PreviewDataset(copy)
    assert json.loads(shard.with_suffix(".json").read_text())["rows"] == 5


# Features


def test_features_of_another_network_are_refused(dataset, models):
    reward = load_reward("dino", models / "dino")
    check_features(dataset, [load_reward("pixels"), reward, print])
    with torch.no_grad():
        next(reward.network.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"another dino network than the reward's, that of model '.*/dino'"):
        check_features(Subset(dataset, [0, 1]), [reward])
