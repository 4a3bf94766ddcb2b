"""The commands that make a solver, from a model folder and a dataset that `data.build` made."""

import shutil

import pytest
from tiny_teacher import build_args, save_models
from toy_mixture import latent_psnr, toy_pipeline

from data.build import main as build
from data.dataset import PreviewDataset
from solver import ConsistencySolverScheduler
from solver.amed import main as fit_amed
from solver.distillation import main as distill
from solver.run_config import find_checkpoint
from solver.trainer import ConsistencySolverTrainer
from solver.trainer_config import ConsistencySolverConfig
from train import check_output
from train import main as train

load = ConsistencySolverScheduler.from_pretrained


def words(**settings) -> list[str]:
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The model and its dataset, as words of a command line."""
    folder = tmp_path_factory.mktemp("source")
    models = save_models(folder / "models")
    build(build_args(models, folder / "dataset", num_prompts=8))
    return words(model=models / "sd", dataset=folder / "dataset", num_eval_rows=4, solver_order=2)


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """Arguments of a run of two updates, and its folder."""
    folder = tmp_path_factory.mktemp("train") / "run"
    settings = {
        "num_iterations": 2, "num_ppo_epochs": 1, "prompts_per_iteration": 2, "group_size": 2, "inference_steps": 3,
        "eval_inference_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "rewards": "pixels",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "output_dir": folder,
    }  # fmt: skip
    arguments = [*source, *words(**settings)]
    train(arguments)
    return arguments, folder


def test_training_leaves_solvers_and_resumes(run):
    arguments, folder = run
    assert load(folder / "checkpoint-2").config.solver_order == 2
    assert load(folder / "best").policy is not None
    assert load(folder / "final").config.trained_steps == [3, 3]
    assert load(folder / "best").config.trained_model == arguments[arguments.index("--model") + 1]
    train([*arguments, *words(resume_from_checkpoint="last", num_iterations=3)])
    assert (folder / "checkpoint-3").is_dir()


def test_a_checkpoint_that_was_cut_off_is_passed_over(run, tmp_path, caplog):
    """Killed while it writes one, a run leaves a checkpoint without its last file, or with a part of that."""
    arguments, folder = run
    shutil.copytree(folder, tmp_path / "run")
    for number, rest in ((4, ""), (10, None)):  # not in the order of the alphabet
        shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / f"checkpoint-{number}")
        (tmp_path / "run" / f"checkpoint-{number}" / "trainer_state.json").unlink()
        if rest is not None:
            (tmp_path / "run" / f"checkpoint-{number}" / "trainer_state.json").write_text(rest)
    latest = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert find_checkpoint("last", tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{latest}")
    assert f"checkpoint-10 is not whole; going on from checkpoint-{latest}" in caplog.text
    train([*arguments, *words(resume_from_checkpoint="last", output_dir=tmp_path / "run", num_iterations=latest + 1)])
    for path in (tmp_path / "run").glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        find_checkpoint("last", tmp_path / "run")


def test_a_run_without_checkpoints_cannot_be_gone_on_with(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match=r"has best of an earlier run\. Delete it, or choose another folder"):
        check_output(tmp_path, None)


def test_training_goes_on_from_a_solver_and_writes_what_tensorboard_reads(run, tmp_path):
    arguments, folder = run
    dataset = arguments[arguments.index("--dataset") + 1]
    others = {"eval_dataset": dataset, "initial_solver": folder / "best", "report_to": "tensorboard"}
    train([*arguments, *words(**others, num_iterations=1, output_dir=tmp_path)])
    assert any(tmp_path.rglob("events.out.tfevents.*"))
    before, after = (load(path).policy.parameters() for path in (folder / "best", tmp_path / "final"))
    moved = max((a - b).abs().max() for a, b in zip(after, before, strict=True))
    assert 0 < moved < 0.1  # one small update away from where it began


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"output_dir": "RUN"}, "checkpoint-1, checkpoint-2.*best, final of an earlier run"),
        ({"dtype": "fp16"}, "dtype='fp16': expected one of"),
        ({"resume_from_checkpoint": "last"}, "has no checkpoint to resume from"),
        ({"resume_from_checkpoint": "no/checkpoint"}, "resume_from_checkpoint='no/checkpoint': there is no such"),
        ({"resume_from_checkpoint": "RUN/best"}, "best' is no whole checkpoint: it has no trainer_state.json"),
        ({"resume_from_checkpoint": "RUN/checkpoint-2", "base_rule": "ddim"}, "is of another solver than this run"),
        ({"inference_steps": 1001}, "inference_steps: 1001 steps are more than the 1000"),
        ({"eval_inference_steps": 2000}, "eval_inference_steps: 2000 steps are more than the 1000"),
        ({"model": "no/model"}, "model 'no/model' is no pipeline folder here"),
        ({"initial_solver": "RUN/best", "base_rule": "ddim"}, "is of another kind: base_rule 'dpm2m', not 'ddim'"),
        ({"group_size": 1}, "group_size=1: expected a whole number of at least 2"),
    ],
)
def test_bad_input_of_the_training_ends_in_a_sentence(run, tmp_path, changes, sentence):
    arguments, folder = run
    changes = {"output_dir": tmp_path} | {
        name: str(value).replace("RUN", str(folder)) for name, value in changes.items()
    }
    with pytest.raises(SystemExit, match=sentence):
        train([*arguments, *words(**changes)])


def test_a_dataset_of_another_teacher_is_refused(source, tmp_path):
    pipe, settings = toy_pipeline(), {"report_to": "none", "use_cpu": True}
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=3)
    dataset = PreviewDataset(source[source.index("--dataset") + 1])
    with pytest.raises(ValueError, match="rendered by another teacher"):
        config = ConsistencySolverConfig(output_dir=str(tmp_path), **settings)
        ConsistencySolverTrainer(pipe, solver, latent_psnr, config, dataset)


def test_fits_are_commands(source, tmp_path, capsys):
    fit = words(num_rows=2, teacher_substeps=2)
    distill([*source, *fit, *words(min_inference_steps=3, max_inference_steps=4, output_dir=tmp_path / "distilled")])
    assert load(tmp_path / "distilled").config.trained_steps == [3, 4]
    fit += ["--evaluations", "4", *words(guidance_scale=3.0, candidates=3, output_dir=tmp_path / "amed")]
    fit_amed([*source, *fit])
    assert list(load(tmp_path / "amed").config.coefficients) == ["4"]
    assert "AMED's steps for 4 evaluations" in capsys.readouterr().out
