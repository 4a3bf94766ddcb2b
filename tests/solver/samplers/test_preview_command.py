"""`sample.py preview` and `refine --pick` on a folder of a tiny FLUX with its text encoders."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_flux import save_tiny_flux

from evaluation.commands.preview import FACTS
from evaluation.rendering import load_pipeline
from sample import main
from solver.samplers.calls import text_length
from solver.samplers.latents import initial_noise, latent_shape, pack

SIZE = 32
ARGUMENTS = ["--prompt", "a red ring", "--seed", "7", "--height", str(SIZE), "--width", str(SIZE)]
OPTIONS = ["--steps", "6", "--switch", "2", "--guided_steps", "0.34", "--kappa", "1", "--guidance_scale", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("previews") / "new"
    arguments = ["preview", "--model", str(model), "--candidates", "5", "--output", str(folder)]
    assert main([*arguments, *ARGUMENTS, *OPTIONS]) == folder / "sheet.png"
    return folder


def test_a_proof_sheet_and_the_picked_picture(model, folder, tmp_path):
    facts = json.loads((folder / "previews.json").read_text())
    assert [one["seed"] for one in facts["candidates"]] == [7, 8, 9, 10, 11]
    assert facts["candidates"][0]["network_calls"] == {"full": 3, "small": 4}
    with Image.open(folder / "sheet.png") as sheet, Image.open(folder / "3.png") as one:
        assert one.size == (SIZE // 2, SIZE // 2) and one.text["proofsheet:seed"] == "9"
        assert sheet.width > 4 * SIZE and sheet.height > 2 * SIZE  # four, and one below
    full = main(["refine", "--preview", str(folder), "--pick", "3", "--output", str(tmp_path / "full.png")])
    same = main(["refine", "--preview", str(folder / "3.png"), "--output", str(tmp_path / "same.png")])
    assert same.read_bytes() == full.read_bytes()
    pipe = load_pipeline(str(model), "float32", "cpu")
    noise = pack(pipe, initial_noise([9], latent_shape(pipe, SIZE, SIZE)))
    call = {"height": SIZE, "width": SIZE, "latents": noise, "num_inference_steps": 6}
    call |= {"true_cfg_scale": 2.0, "negative_prompt": "", **text_length(pipe)}  # what guidance is for this model
    with Image.open(full) as refined:
        assert refined.tobytes() == pipe("a red ring", **call).images[0].tobytes()
        assert refined.text["proofsheet:seed"] == "9"
    again = main(["remake", str(full), "--output", str(tmp_path / "again.png")])  # the whole run, from what it says
    assert str(again).endswith("again.png: the same picture, bit for bit.")


def test_what_the_files_say_of_previews(folder):
    facts = json.loads((folder / "previews.json").read_text())
    assert facts["options"]["method"] == "mean" and facts["options"]["kappa"] == 1 and facts["guidance_scale"] == 2
    assert facts["versions"].keys() == {"torch", "diffusers"} and (facts["height"], facts["width"]) == (SIZE, SIZE)
    with Image.open(folder / "3.png") as one:
        said = {name.removeprefix("proofsheet:"): text for name, text in one.text.items()}
    assert json.loads(said["options"]) == facts["options"] and said["guidance_scale"] == "2.0"
    with pytest.raises(ValueError, match=r"one of `sample\.py preview`; `refine` makes its full picture"):
        main(["remake", str(folder / "3.png")])


def test_without_a_guidance_scale_it_is_that_of_the_other_commands(model, folder, tmp_path):
    """The full picture of a preview is the one that `refine` makes of its prompt and seed."""
    few = ["--steps", "6", "--switch", "2", "--guided_steps", "1"]
    main(["preview", "--model", str(model), *ARGUMENTS, *few, "--output", str(tmp_path)])
    picked = main(["refine", "--preview", str(tmp_path), "--output", str(tmp_path / "picked.png")])
    alone = ["refine", "--model", str(model), *ARGUMENTS, "--steps", "6", "--output", str(tmp_path / "alone.png")]
    with Image.open(picked) as one, Image.open(main(alone)) as other:
        assert one.tobytes() == other.tobytes()
        assert one.text["proofsheet:guidance_scale"] == other.text["proofsheet:guidance_scale"] == "3.0"


@pytest.mark.parametrize(
    "given, message",
    [
        (["--negative_prompt", "dog", "--guidance_scale", "1"], "guidance_scale=1: a negative prompt needs more than"),
        (["--negative_prompt", "dog", "--true_cfg_scale", "1"], "guidance_scale=1: a negative prompt needs more than"),
        (["--guidance_scale", "3", "--true_cfg_scale", "5"], "the same of this model; give one of them"),
        (["--alpha", "0.1", "--kappa", "1"], "--alpha, --kappa: the same strength in two units"),
        (["--selection", "argmax"], "selection='argmax': only method='subsample' has a choice there"),
        (["--family", "sd3"], "--family: only --explain has that"),
        (["--explain", "--solver", "nowhere"], "--model, --prompt, --seed, --solver: --explain makes no picture"),
    ],
    ids=str,
)
def test_nothing_given_is_without_effect(model, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        main(
            [
                "preview",
                "--model",
                str(model),
                *ARGUMENTS,
                *given,
                *([] if "--explain" in given else ["--output", str(tmp_path)]),
            ]
        )


def test_who_names_no_output_gets_the_next_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--pick: there is no outputs/preview-N; name the folder"):
        main(["refine", "--pick", "1"])
    few = ["preview", "--model", str(model), *ARGUMENTS, "--steps", "5"]
    written = [main([*few, "--candidates", number]) for number in ("1", "2")]
    assert written == [Path(f"outputs/preview-{number}/sheet.png") for number in (1, 2)]
    assert main(["refine", "--pick", "2"]) == Path("outputs/refine-1.png")  # of the second folder: the first has one
    assert main(["refine", "--pick", "1"]) == Path("outputs/refine-2.png")


def test_errors(model, folder, tmp_path):
    out = ["--output", str(tmp_path / "x.png")]
    with pytest.raises(ValueError, match="--pick None: expected 1 to 5"):
        main(["refine", "--preview", str(folder), *out])
    with pytest.raises(ValueError, match="--pick 6: expected 1 to 5"):
        main(["refine", "--preview", str(folder), "--pick", "6", *out])
    with pytest.raises(ValueError, match=r"--steps: the previews .* are of a run that has begun"):
        main(["refine", "--preview", str(folder), "--pick", "2", "--steps", "9", *out])
    with pytest.raises(ValueError, match=r"--dtype: the previews .* are of a run that has begun"):
        main(["refine", "--preview", str(folder), "--pick", "2", "--dtype", "bfloat16", *out])
    with pytest.raises(ValueError, match="--pick 2: --preview must be a folder"):
        main(["refine", "--preview", str(folder / "1.png"), "--pick", "2", *out])
    with pytest.raises(OSError, match="--preview nowhere: there is no such file or folder"):
        main(["refine", "--preview", "nowhere", "--pick", "1", *out])
    with pytest.raises(ValueError, match=r"sheet\.png: which preview is meant"):
        main(["refine", "--preview", str(folder / "sheet.png"), *out])
    far = shutil.copytree(folder, tmp_path / "far")
    (far / FACTS).write_text((far / FACTS).read_text().replace(json.dumps(str(model)), '"somebody/something"'))
    with pytest.raises(OSError, match="To fetch what the file names, say so: --model somebody/something"):
        main(["refine", "--preview", str(far), "--pick", "2", *out])
    shutil.copy(folder / "1.png", tmp_path / "alone.png")
    with pytest.raises(ValueError, match=r"alone\.png is a preview whose run goes on from the files beside it"):
        main(["refine", "--preview", str(tmp_path / "alone.png"), *out])
    with pytest.raises(ValueError, match=f"seed={2**64}: expected a whole number of 64 bits"):
        main(["preview", "--model", "m", "--prompt", "x", "--seed", str(2**64 - 2), "--candidates", "3", *out])
    with pytest.raises(ValueError, match="The picture has NaN or infinite pixels: take a smaller kappa"):
        main(["preview", "--model", str(model), *out, *ARGUMENTS, *OPTIONS, "--kappa", "1e38"])
    with pytest.raises(ValueError, match="--candidates 0: expected at least 1"):
        main(["preview", "--model", "m", "--candidates", "0", *out, *ARGUMENTS])
    with pytest.raises(ValueError, match="--num_frames: not an argument of FluxPipeline"):
        main(["preview", "--model", str(model), "--num_frames", "5", *out, *ARGUMENTS])


def test_an_interrupted_run_into_a_used_folder_leaves_no_list_of_the_earlier_previews(model, tmp_path, monkeypatch):
    """`refine --pick` would finish a picture of the new run under the prompt of the old one."""
    command = ["preview", "--model", str(model), "--candidates", "2", "--output", str(tmp_path), *ARGUMENTS, *OPTIONS]
    main(command)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.commands.preview.proof_sheet", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--kappa", "2"])
    assert (tmp_path / "2.json").exists() and not (tmp_path / "sheet.png").exists()

    monkeypatch.setattr("evaluation.commands.preview.save_picture", killed)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with pytest.raises(OSError, match=r"there is no previews\.json in it"):
        main(["refine", "--preview", str(tmp_path), "--pick", "2", "--output", str(tmp_path / "full.png")])
