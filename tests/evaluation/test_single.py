"""`sample.py solver` and `refine`: whose guidance scale, and no picture of NaN."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from evaluation.rendering import NotFiniteError
from evaluation.single import save_png, to_picture
from sample import main
from solver import ConsistencySolverScheduler


def facts(path):
    with Image.open(path) as image:
        return {name.removeprefix("proofsheet:"): text for name, text in image.text.items()}


def test_guidance_is_that_of_the_solver_unless_it_is_given(models, tmp_path):
    solver = ConsistencySolverScheduler.from_pretrained(models / "solver")
    solver.bake([3], 5.0).save_pretrained(tmp_path / "baked")  # which knows no other
    picture = ["--model", str(models / "sd"), "--prompt", "a red ring", "--seed", "7", "--steps", "3"]
    own, given = tmp_path / "own.png", tmp_path / "given.png"
    main(["solver", *picture, "--solver", str(tmp_path / "baked"), "--output", str(own)])
    main(["solver", *picture, "--solver", str(models / "solver"), "--guidance_scale", "5", "--output", str(given)])
    assert facts(own)["guidance_scale"] == facts(given)["guidance_scale"] == "5.0"
    with Image.open(own) as a, Image.open(given) as b:
        assert a.tobytes() == b.tobytes()


def test_a_picture_remembers_its_dtype(models, tmp_path):
    picture = ["--model", str(models / "sd"), "--prompt", "a red ring", "--seed", "7", "--steps", "3"]
    path = tmp_path / "x.png"
    for command in (["solver", "--solver", str(models / "solver")], ["refine"]):
        main([*command, *picture, "--dtype", "bfloat16", "--device", "cpu", "--output", str(path)])
        assert facts(path)["dtype"] == "bfloat16"
        assert main(["remake", str(path), "--device", "cpu"]).endswith(": the same picture, bit for bit.")


def test_broken_pictures_are_sentences(tmp_path):
    path, again = tmp_path / "x.png", ["--output", str(tmp_path / "y.png")]
    save_png(Image.new("RGB", (4, 4)), path, {"model": "zoo/none", "prompt": "x", "seed": "seven"})
    with pytest.raises(ValueError, match=r"x\.png does not say how it was made: .*'seven'"):
        main(["refine", "--preview", str(path), *again])
    path.write_bytes(path.read_bytes().replace(b"iTXt", b"\0\0\0\0", 1))
    with pytest.raises((ValueError, OSError), match=r"x\.png"):
        main(["refine", "--preview", str(path), *again])


def test_a_file_does_not_decide_what_is_downloaded(models, tmp_path, monkeypatch):
    """The hub is never asked for a model that only the PNG names."""
    path, asked = tmp_path / "x.png", []
    save_png(Image.new("RGB", (4, 4)), path, {"model": "somebody/something", "prompt": "x", "seed": "7"})
    monkeypatch.setattr("evaluation.rendering.open_pipeline", lambda *given: asked.append(given) or _missing())
    refine = ["refine", "--preview", str(path), "--output", str(tmp_path / "y.png"), "--device", "cpu"]
    with pytest.raises(OSError, match="To fetch what the file names, say so: --model somebody/something"):
        main(refine)
    with pytest.raises(OSError, match=r"^not here$"):
        main([*refine, "--model", "somebody/something"])
    assert [only_here for *_, only_here in asked] == [True, False]


def _missing():
    raise OSError("not here")


def test_names_of_nothing_are_named(models, tmp_path):
    picture = ["solver", "--prompt", "x", "--seed", "7", "--output", str(tmp_path / "x.png"), "--device", "cpu"]
    with pytest.raises(OSError, match="solver 'no/solver' is no solver folder here"):
        main([*picture, "--model", str(models / "sd"), "--solver", "no/solver"])
    with pytest.raises(ValueError, match="model '' does not open"):
        main([*picture, "--model", "", "--solver", "no/solver"])


def test_a_picture_of_nan_is_an_error(models, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    picture = torch.full((1, 3, 4, 4), 0.5)
    assert to_picture(pipe, picture).getextrema() == ((128, 128),) * 3
    picture[0, 1, 2, 3] = float("nan")
    with pytest.raises(NotFiniteError, match="DDIMScheduler gives NaN or infinite pixels"):
        to_picture(pipe, picture)
    pipe.unet.conv_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    command = ["refine", "--model", str(tmp_path / "broken"), "--prompt", "x", "--seed", "1", "--steps", "2"]
    with pytest.raises(NotFiniteError):
        main([*command, "--output", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()
