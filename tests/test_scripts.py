"""The scripts at the root: help at once, errors in one sentence, pictures that say how they were made."""

import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import app
from sample import main
from solver import ConsistencySolverScheduler

sys.path.append(str(Path(__file__).parent / "data"))

from tiny_teacher import make_tiny_sd

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    ["train.py"],
    ["-m", "data.build"],
    ["evaluate.py"],
    ["sample.py"],
    ["sample.py", "solver"],
    ["sample.py", "refine"],
    ["sample.py", "preview"],
]
HEAVY = {"torch", "transformers", "diffusers", "trl", "matplotlib"}


def children_seconds():
    """Of the processor, so that a busy machine does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    pipe = make_tiny_sd()
    pipe.save_pretrained(folder / "sd")
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    solver.save_pretrained(folder / "solver")
    return folder


def arguments(folder, command, output, **changes):
    knobs = {"model": folder / "sd", "prompt": "a red ring", "seed": 7, "output": output}
    knobs |= {"solver": folder / "solver"} if command == "solver" else {}
    pairs = ((f"--{name}", str(value)) for name, value in (knobs | changes).items() if value is not None)
    return [command, *(word for pair in pairs for word in pair)]


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_help_answers_at_once(script):
    before = children_seconds()
    command = [sys.executable, "-X", "importtime", *script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "options" in done.stdout
    assert children_seconds() - before < 3
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported.intersection(HEAVY)


@pytest.mark.parametrize("module", ["solver.distillation", "solver.amed"])
def test_help_of_the_fits(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and f"python -m {module}" in done.stdout and "--teacher_substeps" in done.stdout


def test_root_scripts_are_short():
    for name in ("train.py", "evaluate.py", "sample.py", "app.py"):
        assert len((ROOT / name).read_text().splitlines()) < 80


def test_the_app_passes_on_what_it_is_told(monkeypatch, tmp_path):
    served, opened = [], []

    class Table:
        def warm_up(self):
            opened.append("warm")

    def open_table(*given):
        opened.extend(given)
        return Table()

    monkeypatch.setattr("lighttable.table.LightTable.open", open_table)
    monkeypatch.setattr("lighttable.page.serve", lambda *given, **launch: served.append((*given[1:], launch)))
    words = f"--model m --solver s --reward depth=zoo/depth clip --output {tmp_path} --device cpu --dtype bfloat16"
    app.main([*words.split(), "--host", "0.0.0.0", "--port", "7999", "--waiting", "3"])
    assert opened == ["m", "bfloat16", "cpu", "s", {"depth": "zoo/depth", "clip": None}, "warm"]
    assert served == [(tmp_path, 3, {"server_name": "0.0.0.0", "server_port": 7999})]


NO_STEPS = '{"guidance_scale":3,"steps":[0],"num_prompts":4}'


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("evaluate.py", "--model zoo/none --output_dir OUT", "model 'zoo/none' is no pipeline folder here"),
        (
            "evaluate.py",
            f"--model zoo/none --output_dir OUT --columns {NO_STEPS}",
            "steps=[0]: expected whole numbers",
        ),
        ("sample.py", "refine --model zoo/none --prompt x --seed 1 --output OUT", "model 'zoo/none' is no pipeline"),
        ("sample.py", "refine --model zoo/none --prompt x --output OUT", "--seed: needed"),
        ("solver/export.py", "runs/none --to solver OUT", "solver 'runs/none' is no solver folder here"),
        ("app.py", "--model zoo/none --port 65536", "--port 65536: expected 1 to 65535"),
    ],
)
def test_errors_are_one_sentence(script, words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *words.replace("OUT", str(tmp_path / "out")).split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = stopped.value.code  # what Python prints before it exits with status 1
    assert message in said and "\n" not in said and said.endswith("."), said


def pixels(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB")).float() / 255


def stock_picture(folder, scheduler, steps, guidance_scale):
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd")
    pipe.scheduler = scheduler(pipe.scheduler)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    return pipe("a red ring", latents=noise, **call).images[0]


def test_preview_and_its_refinement(folder, tmp_path):
    preview, full = tmp_path / "pictures" / "preview.png", tmp_path / "full.png"
    main(arguments(folder, "solver", preview, steps=4, guidance_scale=5.0))

    def learned(own):
        solver = ConsistencySolverScheduler.from_pretrained(folder / "solver")
        solver.guidance_scale = 5.0
        return solver

    torch.testing.assert_close(pixels(preview), stock_picture(folder, learned, 4, 5.0), rtol=0, atol=0.6 / 255)
    with Image.open(preview) as image:
        text = {name.removeprefix("proofsheet:"): value for name, value in image.text.items()}
    assert text == {
        "prompt": "a red ring",
        "seed": "7",
        "model": str(folder / "sd"),
        "solver": str(folder / "solver"),
        "steps": "4",
        "guidance_scale": "5.0",
        "dtype": "float32",
    }

    main(["refine", "--preview", str(preview), "--output", str(full), "--steps", "12"])

    def teacher(own):
        settings = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}
        return DPMSolverMultistepScheduler.from_config(own.config, **settings)

    torch.testing.assert_close(pixels(full), stock_picture(folder, teacher, 12, 5.0), rtol=0, atol=0.6 / 255)
    by_hand = tmp_path / "by_hand.png"
    main(arguments(folder, "refine", by_hand, steps=12, guidance_scale=5.0))
    assert by_hand.read_bytes() == full.read_bytes()


def test_sampling_errors(folder, tmp_path):
    out = tmp_path / "x.png"
    with pytest.raises(ValueError, match="--steps 0: expected at least 1"):
        main(arguments(folder, "solver", out, steps=0))
    with pytest.raises(OSError, match=r"zoo/none.*no pipeline"):
        main(arguments(folder, "solver", out, model="zoo/none"))
    with pytest.raises(ValueError, match="--seed: needed"):
        main(arguments(folder, "solver", out, seed=None))
    ConsistencySolverScheduler.from_scheduler(FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="noise schedules differ"):
        main(arguments(folder, "solver", out, solver=tmp_path / "flow"))
    with pytest.raises(ValueError, match="draws noise"):
        main(arguments(folder, "refine", out, scheduler="EulerAncestralDiscreteScheduler"))
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="does not say how it was made"):
        main(["refine", "--preview", str(tmp_path / "plain.png"), "--output", str(out)])
    assert not out.exists()
