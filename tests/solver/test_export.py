"""Exports, loaded in a fresh process that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from solver import ConsistencySolverScheduler
from solver.export import KINDS, export, main, model_card
from solver.samplers.digest import solver_digest

sys.path.append(str(Path(__file__).parents[1] / "data"))

from tiny_teacher import make_tiny_sd

STEPS, GUIDANCE = 4, 7.5
HIDE = """
import sys

class Hidden:  # as on a machine where this package was never installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("solver", "data", "rewards", "evaluation"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
from diffusers import DiffusionPipeline
try:
    import solver
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is not hidden")
"""
RENDER = f"""
noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
image = pipe("a red ring", latents=noise, num_inference_steps={STEPS}, guidance_scale={GUIDANCE}, output_type="pt")
torch.save(image.images, {{path!r}})
"""


def trained(own, **overrides):
    solver = ConsistencySolverScheduler.from_scheduler(own, order=3, guidance_scale=3.0, **overrides)
    with torch.no_grad():
        solver.policy.mlp[-1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return solver


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    pipe = make_tiny_sd()
    pipe.save_pretrained(folder / "sd")
    trained(pipe.scheduler).save_pretrained(folder / "solver")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The picture of the solver inside this package."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd")
    pipe.scheduler = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    pipe.scheduler.guidance_scale = GUIDANCE
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return pipe("a red ring", latents=noise, **call).images


def usage(card):
    """The Python block of a model card."""
    return card.read_text().split("```python\n")[1].split("```")[0]


def test_loads_without_this_package_as_the_cards_say(folder, expected, tmp_path):
    """One process that has the exported folders and diffusers runs what their cards tell a user to run."""
    code = HIDE
    for kind in KINDS:
        options = ["--model", str(folder / "sd"), "--guidance_scale", str(GUIDANCE)]
        main([str(folder / "solver"), "--to", kind, str(tmp_path / kind), *options])
        if kind != "pipeline":
            code += f"pipe = DiffusionPipeline.from_pretrained({str(folder / 'sd')!r})\n"
        code += usage(tmp_path / kind / "README.md").rsplit("\npipe(", 1)[0]  # up to the call, which RENDER makes
        code += RENDER.format(path=str(tmp_path / f"{kind}.pt"))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        torch.testing.assert_close(torch.load(tmp_path / f"{kind}.pt"), expected, rtol=0, atol=1e-5)


def test_files_of_each_kind(folder, tmp_path):
    solver = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    names = {
        kind: export(solver, kind, tmp_path / kind, str(folder / "sd")) for kind in ("solver", "table", "pipeline")
    }
    files = {kind: {path.name for path in out.iterdir()} for kind, out in names.items()}
    assert files["table"] == {"README.md", "scheduler_config.json", "scheduling_consistency_solver.py"}
    assert files["solver"] == files["table"] | {"model.safetensors"}
    # Weights in a pipeline's scheduler folder would keep its config from being downloaded.
    scheduler = {path.name for path in (tmp_path / "pipeline" / "scheduler").iterdir()}
    assert scheduler == {"scheduler_config.json", "solver.scheduling_consistency_solver.py"}
    for path in (folder / "sd" / "unet").iterdir():
        assert (tmp_path / "pipeline" / "unet" / path.name).read_bytes() == path.read_bytes()


def test_solver_round_trip_keeps_every_guidance_scale(folder, tmp_path):
    main([str(folder / "solver"), "--to", "solver", str(tmp_path / "out")])
    one, other = (ConsistencySolverScheduler.from_pretrained(path) for path in (folder / "solver", tmp_path / "out"))
    for guidance in (1.0, 7.5):
        for a, b in zip(one.coefficients(5, guidance), other.coefficients(5, guidance), strict=True):
            assert torch.equal(a, b)


def test_solver_begins_with_the_guidance_scale_that_was_asked_for(folder, tmp_path):
    solver = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    export(solver, "solver", tmp_path / "out", guidance_scale=7.5)
    assert ConsistencySolverScheduler.from_pretrained(tmp_path / "out").guidance_scale == 7.5
    assert "guidance_scale = 7.5\n" in (tmp_path / "out" / "README.md").read_text()
    assert solver.guidance_scale == solver.config.guidance_scale == 3.0  # the caller's own
    for kind in ("solver", "table"):
        with pytest.raises(ValueError, match="guidance_scale=nan"):
            main([str(folder / "solver"), "--to", kind, str(tmp_path / kind), "--guidance_scale", "nan"])
        assert not (tmp_path / kind).exists()


def said_by_card(path):
    return " ".join((path / "README.md").read_text().split())


def test_card_says_what_it_was_trained_on(folder, tmp_path):
    solver = trained(DDIMScheduler(clip_sample=False), trained_steps=[3, 8])
    card = said_by_card(export(solver, "solver", tmp_path / "solver"))
    assert "trained on 3 to 8 steps; in any other number of steps it is that rule" in card and "every" not in card
    # Within what it was trained on there is no other number of steps in a table ...
    card = said_by_card(export(solver, "table", tmp_path / "table"))
    assert "trained on 3 to 8 steps. The numbers for guidance 3 and 3 to 8 steps are" in card
    config = json.loads((tmp_path / "table" / "scheduler_config.json").read_text())
    assert set(config["coefficients"]) == set("345678")
    # ... unless it was asked for; and a table without a gap is not the same as one with gaps.
    card = said_by_card(export(solver, "table", tmp_path / "wide", steps=[5, 12]))
    assert "that rule" in card and "guidance 3 and 5, 12 steps" in card
    unknown = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    assert "not recorded" in said_by_card(export(unknown, "solver", tmp_path / "unknown"))
    spans = {"trained_steps": [3, 8], "trained_guidance_scales": [1.5, 7.5]}
    grid_only = trained(DDIMScheduler(clip_sample=False), learn_weights=False, **spans)
    card = said_by_card(export(grid_only, "solver", tmp_path / "grid"))
    assert "3 to 8 steps and at guidance scales of 1.5 to 7.5" in card and "time grid was learned" in card
    one = trained(DDIMScheduler(clip_sample=False), trained_steps=[3, 8], trained_guidance_scales=[3.0, 3.0])
    assert "and at a guidance scale of 3;" in said_by_card(export(one, "solver", tmp_path / "one"))
    published = trained(DDIMScheduler(clip_sample=False), inputs="published", learn_grid=False)
    assert "does not look at the guidance" in said_by_card(export(published, "solver", tmp_path / "published"))


def test_card_of_a_table_that_is_exported_again_counts_upwards(folder, tmp_path):
    main([str(folder / "solver"), "--to", "table", str(tmp_path / "one"), "--steps", "9", "10", "11"])
    main([str(tmp_path / "one"), "--to", "table", str(tmp_path / "other")])  # its keys are sorted as text
    assert "9 to 11 steps" in said_by_card(tmp_path / "other")


def test_table_has_the_numbers_that_were_asked_for(folder, tmp_path):
    args = ["--to", "table", "--steps", "4", "6", "--guidance_scale", "5"]
    main([str(folder / "solver"), str(tmp_path / "out"), *args])
    config = json.loads((tmp_path / "out" / "scheduler_config.json").read_text())
    assert set(config["coefficients"]) == {"4", "6"} and config["guidance_scale"] == 5
    solver = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    assert config["coefficients"]["6"]["weights"] == solver.coefficients(6, 5.0).weights.tolist()
    # A table can be exported again, and put into a pipeline; its weights are gone.
    again = [str(tmp_path / "out"), "--model", str(folder / "sd")]
    main([*again, "--to", "pipeline", str(tmp_path / "pipeline")])
    with pytest.raises(ValueError, match="no weights"):
        main([*again, "--to", "solver", str(tmp_path / "solver")])


def test_flow_models_are_baked_on_the_grid_of_their_pipelines(tmp_path):
    solver = trained(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    export(solver, "table", tmp_path / "out", steps=[4])
    baked = ConsistencySolverScheduler.from_pretrained(tmp_path / "out")
    sigmas = torch.linspace(1, 1 / 4, 4).tolist()
    baked.set_timesteps(4)
    for a, b in zip(baked.table, solver.coefficients(4, sigmas=sigmas, mu=1.15), strict=True):
        assert torch.equal(a, b)
    assert "w3" in (tmp_path / "out" / "README.md").read_text()
    export(solver, "solver", tmp_path / "solver")


def test_public_checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"mlp.0": (256, 2), "mlp.2": (256, 256), "mlp.4": (33, 256)}
    state = {f"{name}.weight": torch.randn(shape, generator=generator) / 16 for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in shapes.items()}
    state["action_values"] = torch.stack([torch.linspace(*ends, 11) for ends in ((0, 2), (-2, 0), (-1, 1))])
    torch.save(state, tmp_path / "model.ckpt")
    main(["--from-public", str(tmp_path / "model.ckpt"), "--to", "solver", str(tmp_path / "out")])
    solver = ConsistencySolverScheduler.from_pretrained(tmp_path / "out")
    assert solver.config.solver_order == 4 and solver.guidance_scale == 3.0


def test_card_has_the_evaluation_table(folder, tmp_path):
    def row(solver, value):
        metrics = {"pixels": {"mean": value, "ci95": [value - 0.5, value + 0.5]}}
        return {"solver": solver, "steps": 5, "guidance_scale": 3.0, "metrics": metrics}

    full = row("full", 0.0) | {"metrics": {}}  # in as many steps
    rows = [row("learned", 33.0), row("ddim", 29.0), row("dpm2m", 30.0), full]
    metrics = {"model": "zoo/mini-sd", "dataset": {"prompts": "scenes:test"}, "rows": rows, "paired": []}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    main(
        [str(folder / "solver"), "--to", "solver", str(tmp_path / "out"), "--metrics", str(tmp_path / "metrics.json")]
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 3 | 5 | learned | 33 ± 0.5 |" in card and "| 3 | 5 | dpm2m | 30 ± 0.5 |" in card and "ddim" not in card


def test_metrics_of_another_solver_are_refused(folder, tmp_path):
    solver = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    rows = [
        {"solver": "learned", "steps": 5, "guidance_scale": 3.0, "metrics": {"pixels": {"mean": 1, "ci95": [0, 2]}}}
    ]
    metrics = {"model": "m", "dataset": {"prompts": "p"}, "rows": rows, "learned": "runs/other"}
    metrics["learned_digest"] = solver_digest(solver)
    export(solver, "solver", tmp_path / "own", metrics=metrics)
    with torch.no_grad():
        solver.policy.mlp[-1].weight.add_(0.1)
    with pytest.raises(ValueError, match="The metrics are of another solver, runs/other"):
        export(solver, "solver", tmp_path / "other", metrics=metrics)
    assert not (tmp_path / "other").exists()


def test_the_model_is_the_one_it_was_trained_on(folder, tmp_path):
    solver = ConsistencySolverScheduler.from_pretrained(folder / "solver")
    solver.register_to_config(trained_model=str(folder / "sd"))
    solver.save_pretrained(tmp_path / "best")
    main([str(tmp_path / "best"), "--to", "pipeline", str(tmp_path / "out")])
    assert (tmp_path / "out" / "unet").is_dir()
    fresh = ConsistencySolverScheduler.from_scheduler(ConsistencySolverScheduler.from_pretrained(tmp_path / "best"))
    assert fresh.config.trained_model is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"rows": []}', '{"rows": [{"solver": "learned"}]}'])
def test_metrics_that_are_none(content, folder, tmp_path):
    path, out = tmp_path / "metrics.json", tmp_path / "out"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OSError if content is None else ValueError, match=r"metrics\.json .* evaluate\.py"):
        main([str(folder / "solver"), "--to", "solver", str(out), "--metrics", str(path)])
    assert not out.exists()


def test_errors_name_what_is_wrong(folder, tmp_path):
    out = str(tmp_path / "out")
    DDIMScheduler(beta_schedule="linear").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="from_scheduler"):
        main([str(tmp_path / "stock"), "--to", "solver", out])
    for text in ("{", "[1]", "3"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=r"is no pipeline: its model_index\.json cannot be read"):
            main([str(folder / "solver"), "--to", "pipeline", out, "--model", str(tmp_path), "--steps", "3"])
    with pytest.raises(OSError, match="nothing' is no solver folder here"):
        main([str(tmp_path / "nothing"), "--to", "solver", out])
    ConsistencySolverScheduler.from_pretrained(folder / "solver").save_config(tmp_path / "weightless")
    with pytest.raises(OSError, match="weights of the solver are missing"):
        main([str(tmp_path / "weightless"), "--to", "table", out])
    with pytest.raises(ValueError, match="needs --model"):
        main([str(folder / "solver"), "--to", "pipeline", out])
    trained(FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="noise schedules differ"):
        main([str(tmp_path / "flow"), "--to", "pipeline", out, "--model", str(folder / "sd")])
    with pytest.raises(ValueError, match="either the folder of a solver or"):
        main(["--to", "solver", out])
    with pytest.raises(ValueError, match="not empty"):
        main([str(folder / "solver"), "--to", "solver", str(folder)])
    with pytest.raises(ValueError, match="--steps 4: a solver keeps all that it was trained on"):
        main([str(folder / "solver"), "--to", "solver", out, "--steps", "4"])
    assert not Path(out).exists()


@pytest.mark.parametrize("told", [True, False])
def test_the_card_guides_as_the_model_does(told, tmp_path):
    """`guidance_scale` would be ignored by a FLUX that is told none."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": told}))
    solver = trained(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    for kind in KINDS:
        card = model_card(solver, kind, "out", str(tmp_path), None)
        assert ("num_inference_steps=5, guidance_scale=3)" in card) == told
        assert ('num_inference_steps=5, negative_prompt="", true_cfg_scale=3)' in card) == (not told)


def test_the_card_says_for_which_size_a_table_is(tmp_path):
    solver = trained(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.2))
    for kind, mu, said in (("table", None, "μ = 1.2"), ("table", 0.5, "μ = 0.5"), ("solver", None, None)):
        card = (export(solver, kind, tmp_path / f"{kind}{mu}", mu=mu) / "README.md").read_text()
        assert said in card if said else "μ" not in card
    again = ConsistencySolverScheduler.from_pretrained(tmp_path / "table0.5")
    with pytest.raises(ValueError, match="does not record the shift"):
        export(again, "table", tmp_path / "again")
    with pytest.raises(ValueError, match=r"--mu 0\.7: this solver's grid is not shifted"):
        export(trained(DDIMScheduler(clip_sample=False)), "table", tmp_path / "static", mu=0.7)
