"""The light table's pictures are those of `sample.py`, bit for bit, and their PNGs make them again."""

import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.recipe import Recipe, options
from evaluation.remembered import read, recipe_of
from evaluation.single import PREFIX, save_png
from lighttable.visit import Visit
from sample import main

PROMPT = "a red ring"
SIZE = {"height": 32, "width": 32}
FLUX = {"full_steps": 6, "guidance_scale": 2.0, **SIZE}


def same(picture, path):
    with Image.open(path) as image:
        return picture.image.tobytes() == image.convert("RGB").tobytes()


def words(command, **knobs):
    return [command, *(word for name, value in knobs.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def by_hand(models, tmp_path):
    """Pictures of `sample.py`, of seed 7: name of the model, command and flags → path."""

    def run(name, command, **knobs):
        output = tmp_path / f"{command}.png"
        knobs = {"prompt": PROMPT, "seed": 7, "guidance_scale": 2.0, "output": output, "device": "cpu"} | knobs
        main(words(command, model=models / name, **knobs))
        return output

    return run


def recipe(models, name, method, **changes):
    solver = str(models / f"{name}-solver") if method in ("solver", "both") else None
    return Recipe(PROMPT, 7, method, steps=4, guidance_scale=2.0, solver=solver, **changes)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_few_step_pictures_are_those_of_sample(name, models, request, never, by_hand):
    table = request.getfixturevalue(f"{name}_table")
    size = SIZE if name == "flux" else {}
    asked = [recipe(models, name, method, full_steps=6, **size) for method in ("solver", "few")]
    learned, few = table.make(asked, never)
    assert same(learned, by_hand(name, "solver", steps=4, solver=models / f"{name}-solver", **size))
    assert same(few, by_hand(name, "refine", steps=4, **size))
    assert same(table.refine(learned, never), by_hand(name, "refine", steps=6, **size))
    assert learned.image.tobytes() != few.image.tobytes()


@pytest.mark.parametrize("method", ["half", "both"])
def test_half_size_pictures_are_those_of_sample(method, models, flux_table, never, by_hand, tmp_path):
    asked = recipe(models, "flux", method, full_steps=6, **SIZE)
    (picture,) = flux_table.make([asked], never)
    assert picture.image.size == (16, 16)
    chosen, folder = options(asked), tmp_path / "previews"
    knobs = {"steps": 6, "switch": chosen.switch, "guided_steps": chosen.guided_steps, "output": folder, **SIZE}
    knobs |= {"small_steps": 4, "solver": models / "flux-solver"} if method == "both" else {}
    by_hand("flux", "preview", **knobs)
    assert same(picture, folder / "1.png")

    kept = Visit(tmp_path).keep(picture)  # refined from what is on disk
    full = flux_table.refine(kept.picture(), never)
    main(words("refine", preview=folder, output=tmp_path / "full.png", device="cpu"))
    assert same(full, tmp_path / "full.png")
    assert full.evaluations == 6 - chosen.full_steps
    (whole,) = flux_table.make([asked.full], never)  # the run that was never left
    assert whole.image.tobytes() == full.image.tobytes() and whole.evaluations == 6


def test_a_negative_prompt_counts(models, sd_table, never, by_hand, tmp_path):
    plain = recipe(models, "sd", "few")
    there = recipe(models, "sd", "few", negative_prompt="a blue cube")
    one, other = sd_table.make([plain, there], never)
    assert one.image.tobytes() != other.image.tobytes()
    few = by_hand("sd", "refine", steps=4, negative_prompt="a blue cube")
    assert same(other, few)

    again = tmp_path / "again.png"  # a PNG remembers it, whoever wrote it
    for path in (few, Visit(tmp_path).keep(other).path):
        main(words("refine", preview=path, steps=4, output=again, device="cpu"))
        assert same(other, again)
    main(words("refine", preview=few, steps=4, negative_prompt="", output=again, device="cpu"))
    assert same(one, again)
    with pytest.raises(ValueError, match="a negative prompt needs more than 1"):
        by_hand("sd", "solver", solver=models / "sd-solver", negative_prompt="fog", guidance_scale=1)


@pytest.mark.parametrize("method", ["solver", "both", "full"])
def test_a_picture_is_made_again(method, models, flux_table, never, tmp_path):
    asked = recipe(models, "flux", method, full_steps=6, negative_prompt="a „blue“ cube", **SIZE)
    (picture,) = flux_table.make([asked], never)
    path = Visit(tmp_path).keep(picture).path
    assert recipe_of(read(path)[1]).full == asked.full
    answer = main(["remake", str(path), "--device", "cpu", "--output", str(tmp_path / "again.png")])
    assert answer == f"{tmp_path / 'again.png'}: the same picture, bit for bit."
    assert same(picture, tmp_path / "again.png")


def test_remake_says_what_differs(models, sd_table, never, by_hand, tmp_path):
    path = by_hand("sd", "solver", steps=3, solver=models / "sd-solver")
    assert "the same picture, bit for bit" in main(["remake", str(path), "--device", "cpu"])

    (picture,) = sd_table.make([recipe(models, "sd", "few")], never)
    save_png(picture.image, tmp_path / "old.png", picture.facts | {"versions": "torch 1.0"})
    picture.image.putpixel((3, 5), (1, 2, 3))
    save_png(picture.image, tmp_path / "painted.png", picture.facts)
    assert "bit for bit." in main(["remake", str(tmp_path / "old.png"), "--device", "cpu"])
    answer = main(["remake", str(tmp_path / "painted.png"), "--device", "cpu"])
    assert "0.4% of the pixels differ" in answer and "the picture in it was changed" in answer  # 1 of 256
    save_png(picture.image, tmp_path / "both.png", picture.facts | {"versions": "torch 1.0"})
    assert "versions: 'torch 1.0' then, " in main(["remake", str(tmp_path / "both.png"), "--device", "cpu"])
    facts = {"guidance_scale": "2", "versions": "torch 1.0"}  # 2 is 2.0
    save_png(picture.image, tmp_path / "both.png", picture.facts | facts)
    assert "guidance" not in main(["remake", str(tmp_path / "both.png"), "--device", "cpu"])


FACTS = {"model": "zoo/none", "prompt": "x", "seed": "7", "solver": "DDIMScheduler", "steps": "3"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": None}, "does not say its seed"),
        ({"seed": "<script>"}, "says seed '<script>', which is no number"),
        ({"seed": "9" * 30}, "expected a whole number of 64 bits"),
        ({"seed": "9" * 5000}, "which is no number"),
        ({"steps": "1000000"}, "expected 1 to 999"),
        ({"guidance_scale": "nan"}, "expected 0 to 100"),
        ({"height": "-8", "model": "MODEL"}, "height=-8"),
        ({"method": "os.system"}, "method 'os.system': expected one of"),
        ({"method": "solver", "solver": ""}, "needs a learned solver"),
        ({"solver": "ralu 4x"}, "made by `sample.py ralu`"),
        ({"solver": "SchedulerMixin", "model": "MODEL"}, "not a scheduler class of diffusers"),
        ({"solver": "VQDiffusionScheduler", "model": "MODEL"}, "VQDiffusionScheduler cannot take the place of"),
        ({"dtype": "eval"}, "says dtype 'eval'"),
        ({"image": "/etc/passwd"}, "an edit of '/etc/passwd', which it does not contain"),
        ({"model": None}, "does not say its model"),
        ({"model": "../../etc/passwd"}, "etc/passwd"),
        ({"model": "somebody/something"}, "To fetch what the file names, say so: --model somebody/something"),
        ({"model": "MODEL", "method": "solver", "solver": "somebody/solver"}, "say so: --solver somebody/solver"),
        ({"model": "MODEL", "method": "solver", "solver": "a/b; rm x"}, "say so: --solver 'a/b; rm x'"),  # for a shell
        (
            {"model": "MODEL", "height": "512", "width": "512"},
            "has 16 x 16 pixels, and remembers a picture of 512 x 512",
        ),
    ],
)
def test_hostile_chunks_are_sentences(changes, message, models, tmp_path):
    facts = {name: text for name, text in (FACTS | changes).items() if text is not None}
    if facts.get("model") == "MODEL":
        facts["model"] = str(models / "sd")
    save_png(Image.new("RGB", (16, 16)), tmp_path / "x.png", facts)
    with pytest.raises((ValueError, OSError), match=message):
        main(["remake", str(tmp_path / "x.png"), "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_broken_files_are_sentences(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(FileNotFoundError):
        main(["remake", str(path)])
    path.write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        main(["remake", str(path)])
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match="does not say how it was made"):
        main(["remake", str(path)])
    whole = path.read_bytes()
    for name, data in ((b"cHRM", b"x"), (b"gAMA", b""), (b"iCCP", b""), (b"tRNS", b"x")):
        chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        path.write_bytes(whole[:-12] + chunk + whole[-12:])  # before the last chunk
        with pytest.raises((ValueError, OSError)):
            main(["remake", str(path)])
    chunks = PngInfo()
    chunks.add(b"zTXt", PREFIX.encode() + b"prompt\0\0" + zlib.compress(b"x" * 10**8))
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)
    with pytest.raises(ValueError):
        main(["remake", str(path)])
