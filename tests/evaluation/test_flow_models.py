"""Flow models and edits, through the sampler and through evaluate.py, on a tiny FLUX and Kontext pipeline."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_flux import save_tiny_flux
from torchvision.io import decode_png
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data.prompts import read_prompts, source_picture
from data.scenes import numbered_edit, render
from data.teacher import Row, Teacher, open_pipeline
from evaluate import main
from evaluation.metrics import edit_check
from evaluation.rendering import Cost, Sampler, Samples
from evaluation.single import sample
from evaluation.solvers import classical
from sample import main as sample_main
from solver import ConsistencySolverScheduler
from solver.rollout import Renderer

SIZE, GUIDANCE, STEPS = 32, 2.0, 3
PIPELINES = {"FluxPipeline": "scenes:test", "FluxKontextPipeline": "edits:test"}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("model") / "flux")


def samples_of(source, number=3):
    prompts = read_prompts(source, number)
    return Samples(prompts.texts, tuple(range(7, 7 + number)), GUIDANCE, prompts.sources, prompts.edited)


@pytest.fixture(params=PIPELINES)
def sampler_and_samples(flux, request):
    pipe = open_pipeline(str(flux), pipeline=request.param)
    return Sampler(pipe, SIZE, SIZE, batch_size=2), samples_of(PIPELINES[request.param])


def pictures(sampler, scheduler, samples, cost=None, guidance=GUIDANCE):
    return torch.cat(list(sampler.render(scheduler, samples, STEPS, guidance, cost)))


# -- as the offline dataset and the trainer render ------------------------------------------------------------------


def test_pictures_are_those_of_the_offline_dataset(sampler_and_samples):
    sampler, samples = sampler_and_samples
    sources = samples.sources or [None] * 3
    rows = [Row(p, s, GUIDANCE, x) for p, s, x in zip(samples.prompts, samples.seeds, sources, strict=True)]
    rendered = Teacher(sampler.pipe, [], STEPS, SIZE, SIZE).render(rows)
    targets = [decode_png(torch.frombuffer(bytearray(row["target"]["bytes"]), dtype=torch.uint8)) for row in rendered]
    mine = pictures(sampler, sampler.pipe.scheduler, samples)
    assert (mine - torch.stack(targets) / 255).abs().max() < 1.5 / 255
    unguided = pictures(sampler, sampler.pipe.scheduler, samples, guidance=1.0)
    assert (mine - unguided).abs().max() > 5 / 255  # so that guidance is a part of this comparison


def test_pictures_are_those_of_the_trainer(sampler_and_samples):
    sampler, samples = sampler_and_samples
    solver = ConsistencySolverScheduler.from_scheduler(sampler.pipe.scheduler, order=3, learn_grid=False)
    renderer = Renderer(sampler.pipe, solver, SIZE, SIZE)
    table = solver.coefficients(STEPS, GUIDANCE, **renderer.grid(STEPS))
    sources = samples.sources and [source_picture(source, SIZE, SIZE) for source in samples.sources]
    previews = renderer.render(samples.prompts, samples.seeds, GUIDANCE, table, sources)
    mine = pictures(sampler, solver, samples)
    torch.testing.assert_close(mine, previews.images_BCHW.cpu(), rtol=0, atol=1e-4)


def test_one_picture_is_that_of_the_sampler(flux):
    pipe = open_pipeline(str(flux), pipeline="FluxPipeline")
    samples = samples_of("scenes:test", 2)
    mine = pictures(Sampler(pipe, SIZE, SIZE), pipe.scheduler, samples)[1]
    picture = sample(pipe, samples.prompts[1], samples.seeds[1], STEPS, GUIDANCE, SIZE, SIZE)
    picture_CHW = torch.tensor(list(picture.getdata())).view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
    assert (mine - picture_CHW).abs().max() < 1.5 / 255


def test_an_edit_on_the_command_line_is_that_of_the_sampler(flux, tmp_path):
    """A few steps and in full; the PNG remembers what it edits, so that the second needs the first only."""
    samples = samples_of("edits:test", 1)
    source, few, full = (str(tmp_path / f"{name}.png") for name in ("source", "few", "full"))
    to_pil_image(source_picture(samples.sources[0], SIZE, SIZE)).save(source)
    pipe = open_pipeline(str(flux), pipeline="FluxKontextPipeline")
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2)
    solver.save_pretrained(tmp_path / "solver")
    picture = {"model": flux, "prompt": samples.prompts[0], "seed": 7, "guidance_scale": GUIDANCE, "image": source}
    command = [part for name, value in picture.items() for part in (f"--{name}", str(value))]
    sizes = ["--height", str(SIZE), "--width", str(SIZE), "--steps", str(STEPS)]
    sample_main(["solver", *command, *sizes, "--solver", str(tmp_path / "solver"), "--output", few])
    sample_main(["refine", "--preview", few, "--steps", str(STEPS), "--output", full])
    for path, scheduler in ((few, solver), (full, pipe.scheduler)):
        mine = pictures(Sampler(pipe, SIZE, SIZE), scheduler, samples)[0]
        with Image.open(path) as image:
            assert (mine - pil_to_tensor(image) / 255).abs().max() < 1.5 / 255
    Path(source).write_text("no picture")
    again = ["refine", "--preview", few, "--steps", str(STEPS), "--output", full]
    with pytest.raises(ValueError, match=r"source\.png has changed since it was edited"):
        sample_main(again)
    with pytest.raises(OSError, match=r"source\.png is no picture"):
        sample_main([*again, "--image", source])
    Path(source).unlink()
    with pytest.raises(ValueError, match=r"--image .*source\.png: there is no such file"):
        sample_main(["refine", "--preview", few, "--steps", str(STEPS), "--output", full])


def test_an_edit_is_made_again_from_the_picture_that_was_edited(flux, tmp_path):
    """The PNG has its sha256, so that the same file elsewhere will do, and no other."""
    names = ("source", "few", "full", "moved", "again")
    source, few, full, moved, again = (tmp_path / f"{name}.png" for name in names)
    to_pil_image(source_picture(samples_of("edits:test", 1).sources[0], SIZE, SIZE)).save(source)
    own = open_pipeline(str(flux), pipeline="FluxKontextPipeline").scheduler
    ConsistencySolverScheduler.from_scheduler(own, order=2).save_pretrained(tmp_path / "solver")
    picture = {"model": flux, "image": source, "prompt": "make it blue", "negative_prompt": "red", "seed": 7}
    picture |= {"guidance_scale": GUIDANCE, "height": SIZE, "width": SIZE, "steps": STEPS}
    command = [part for name, value in picture.items() for part in (f"--{name}", str(value))]
    sample_main(["solver", *command, "--solver", str(tmp_path / "solver"), "--output", str(few)])
    sample_main(["refine", *command, "--output", str(full)])
    for path in (few, full):
        with pytest.raises(ValueError, match=r"an edit of .*source\.png', which it does not contain; give .* --image"):
            sample_main(["remake", str(path)])
    source.rename(moved)
    for path in (few, full, again):  # a picture that was made again can be made again
        answer = sample_main(["remake", str(path), "--image", str(moved), "--output", str(again)])
        assert answer == f"{again}: the same picture, bit for bit."
    with pytest.raises(ValueError, match=r"not the picture that was edited, .*; its sha256 is another"):
        sample_main(["remake", str(few), "--image", str(full)])
    with pytest.raises(FileNotFoundError):
        sample_main(["remake", str(few), "--image", str(source)])


def test_a_model_of_another_pipeline_is_one_sentence(flux):
    with pytest.raises(ValueError, match="does not open as StableDiffusionPipeline; it is made for another pipeline"):
        open_pipeline(str(flux), pipeline="StableDiffusionPipeline")


# -- counting ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_one_of_prompt_and_empty_prompt(sampler_and_samples):
    """The denoiser is called twice for it. Solvers share two of them, and no picture changes."""
    sampler, samples = sampler_and_samples
    calls = []
    sampler.pipe.transformer.x_embedder.register_forward_pre_hook(lambda *_: calls.append(1))
    alone = Sampler(sampler.pipe, SIZE, SIZE, batch_size=2, share=False)
    own, batches = sampler.pipe.scheduler, 2
    for i, name in enumerate(("ddim", "dpm2m")):
        make, cost = classical(name, own)["own"], Cost()
        before, _ = sampler.evaluations, calls.clear()
        shared = pictures(sampler, make(own, STEPS, GUIDANCE), samples, cost)
        made = STEPS - 2 if i else STEPS
        assert len(calls) == 2 * batches * made
        assert sampler.evaluations - before == made * len(samples.prompts)
        assert cost.summary()["nfe"] == STEPS
        assert torch.equal(shared, pictures(alone, make(own, STEPS, GUIDANCE), samples))
    calls.clear()
    cost = Cost()
    pictures(alone, own, samples, cost, guidance=1.0)  # no guidance, no empty prompt
    assert len(calls) == batches * STEPS and cost.summary()["nfe"] == STEPS


def test_other_sources_are_other_pictures(flux):
    sampler = Sampler(open_pipeline(str(flux), pipeline="FluxKontextPipeline"), SIZE, SIZE)
    samples = samples_of("edits:test", 2)
    swapped = samples._replace(sources=samples.sources[::-1])
    assert samples.identity != swapped.identity != samples._replace(sources=None).identity
    a, b = (pictures(sampler, sampler.pipe.scheduler, given) for given in (samples, swapped))
    assert sampler.evaluations == 2 * STEPS * 2  # prompts and noise are the same, and yet nothing is shared
    assert (a - b).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    without = open_pipeline(str(flux), pipeline="FluxPipeline")
    with pytest.raises(ValueError, match="need pipeline: FluxKontextPipeline"):
        pictures(Sampler(without, SIZE, SIZE), without.scheduler, samples)


# -- the check of edits -----------------------------------------------------------------------------------------------


def test_edit_check_knows_the_truth_from_the_source():
    edits = (numbered_edit(n, "test")[1:] for n in count())
    pairs = [next(edits) for _ in range(6)]
    sources, edited = zip(*pairs, strict=True)

    def check(scenes):
        drawn = [render(scene, 64) for scene in scenes]
        images = torch.stack([picture.image for picture in drawn]).permute(0, 3, 1, 2) / 255
        return edit_check(images, torch.stack([picture.segmentation for picture in drawn]), sources, edited).tolist()

    assert check(edited) == [1.0] * 6
    assert check(sources) == [0.0] * 6


# -- evaluate.py ------------------------------------------------------------------------------------------------------


def arguments(models, flux, output_dir, **changes):
    columns = {"guidance_scale": GUIDANCE, "steps": [2, STEPS], "num_prompts": 4, "ranked": 2}
    knobs = {
        "model": flux, "pipeline": "FluxKontextPipeline", "output_dir": output_dir, "prompts": "edits:test",
        "learned": models / "flow_solver", "solvers": ["base", "euler", "dpm2m", "heun"], "grid_prompts": 2,
        "columns": json.dumps(columns),
        "scheduler": "FlowMatchEulerDiscreteScheduler", "num_inference_steps": 4, "height": SIZE, "width": SIZE,
        "rewards": ["pixels", "segmentation"], "reward_models": ["null", models / "segmentation"],
        "edit_check": models / "segmentation", "scorer": models / "clip", "rank_candidates": 2, "batch_size": 4,
        "resamples": 50, "sheet_steps": [STEPS], "sheet_rows": 2,
        "extra": json.dumps({"name": "same", "pipeline": str(flux), "steps": [STEPS]}),
    }  # fmt: skip
    return [
        part
        for name, value in (knobs | changes).items()
        for part in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def test_edits_are_evaluated(models, flux, tmp_path, caplog):
    own = FlowMatchEulerDiscreteScheduler.from_pretrained(flux, subfolder="scheduler")
    ConsistencySolverScheduler.from_scheduler(own, order=2).save_pretrained(models / "flow_solver")
    metrics = main(arguments(models, flux, tmp_path))
    assert metrics["pipeline"] == "FluxKontextPipeline"
    rows = {(row["solver"], row["steps"]): row for row in metrics["rows"]}
    for (solver, steps), row in rows.items():
        assert row["nfe"] == (1 if (solver, steps) == ("heun", 2) else steps)
        assert 0 <= row["metrics"]["edit_check"]["mean"] <= 1
    # Its own scheduler is Euler's method, and so is the base rule in 3 steps.
    assert rows["same", STEPS]["metrics"]["pixels"] == rows["base", STEPS]["metrics"]["pixels"]
    assert rows["euler", STEPS]["grids"].keys() == {"own", "flow_mode"}
    first = metrics["coefficients"][0]["learned"]  # on the pipeline's grid, shifted for 16 tokens
    assert [entry["steps"] for entry in metrics["coefficients"]] == [2, STEPS] and first["sigmas"][0] == 1
    assert (tmp_path / f"coefficients_cfg_{GUIDANCE:g}.png").is_file()
    assert metrics["metrics"]["edit_check"]["unit"] == "share of pictures"
    assert {entry["seeds"] for entry in metrics["workflow"]} == {2}
    assert "edit_check" in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 400

    with caplog.at_level("INFO", logger="evaluation"):
        again = main(arguments(models, flux, tmp_path))
    assert again["rows"] == metrics["rows"]
    assert "4 network evaluations were made (guidance counts once)." in caplog.messages  # the batch that is timed
