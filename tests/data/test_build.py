import io
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from tiny_teacher import build_args, save_models
from torchvision.transforms.functional import pil_to_tensor
from trl import TrlParser

from data.build import main, plan_rows
from data.build_config import BuildConfig
from data.shards import write_whole
from data.teacher import make_scheduler

CONFIGS = Path(__file__).parents[2] / "configs"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # what makes two processes compute as one does


@pytest.fixture(scope="module", autouse=True)
def environment():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(models, tmp_path_factory):
    """An uninterrupted build of one process."""
    folder = tmp_path_factory.mktemp("reference")
    report = main(build_args(models, folder))
    assert (report.rows, report.shards, report.rendered) == (18, 4, 4)
    return folder


@pytest.fixture(scope="module", autouse=True)
def forkserver(environment):
    """Starts processes whose libraries have been imported already: `forkserver(function, *args)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_teacher", "data.build", "data.teacher", "datasets", "trl"])
    ensure_running()  # it imports while the first tests run

    def start(function, *args):
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return start


@pytest.fixture
def copy(reference, tmp_path):
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_rows(folder):
    return [row for path in sorted(folder.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]


def make_config(**knobs):
    return BuildConfig(model="zoo/mini-sd", output_dir="datasets/test", **knobs)


# Content


def test_targets_are_those_of_the_stock_pipeline(models, reference):
    pipe = StableDiffusionPipeline.from_pretrained(models / "sd")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", timestep_spacing="linspace"
    )
    for row in read_rows(reference)[4:7]:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(row["seed"]))
        call = {"num_inference_steps": 3, "guidance_scale": row["guidance_scale"], "latents": noise}
        image = pipe(row["prompt"], output_type="pt", **call).images[0]
        latents = pipe(row["prompt"], output_type="latent", **call).images[0]
        stored = torch.frombuffer(bytearray(row["target_latents"]), dtype=torch.float16).view(row["latent_shape"])
        torch.testing.assert_close(stored, latents.half(), rtol=2e-3, atol=2e-4)
        target = pil_to_tensor(Image.open(io.BytesIO(row["target"]["bytes"])))
        assert (target / 255 - image).abs().max() <= 0.5 / 255 + 1e-4
        assert row["noise_check"] == noise.flatten()[:8].tolist()


def test_rows_are_numbered(reference):
    rows = read_rows(reference)
    assert [row["seed"] for row in rows] == list(range(18))
    assert [row["guidance_scale"] for row in rows] == [3.0, 7.5] * 9
    prompts = [row["prompt"] for row in rows]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts)) == 9


def test_results_hardly_depend_on_the_batch(models, reference, tmp_path):
    main(build_args(models, tmp_path / "singly", batch_size=1, shard_size=18))
    for together, alone in zip(read_rows(reference), read_rows(tmp_path / "singly"), strict=True):
        assert [together[key] for key in ("prompt", "seed", "noise_check")] == [
            alone[key] for key in ("prompt", "seed", "noise_check")
        ]
        values = [torch.frombuffer(bytearray(row["target_latents"]), dtype=torch.float16) for row in (together, alone)]
        torch.testing.assert_close(*values, rtol=2e-3, atol=2e-4)


def test_a_guidance_range_is_drawn_by_seed():
    rows = plan_rows([str(n) for n in range(500)], make_config(guidance_range=[1.5, 7.5], first_seed=40))
    scales = [row.guidance_scale for row in rows]
    counts = Counter(scales)
    assert sorted(counts) == [1.5 + 0.5 * n for n in range(13)]
    assert min(counts.values()) > 20  # of 38 in the mean
    later = plan_rows([str(n) for n in range(50)], make_config(guidance_range=[1.5, 7.5], first_seed=140))
    assert [row.guidance_scale for row in later] == scales[100:150]
    thirds = plan_rows([str(n) for n in range(50)], make_config(guidance_range=[1.0, 2.0], guidance_step=0.3))
    assert {row.guidance_scale for row in thirds} == {1.0, 1.3, 1.6, 1.9}


def test_the_card_and_the_teacher_say_what_was_done(reference):
    teacher = json.loads((reference / "teacher.json").read_text())
    assert teacher["scheduler"]["_class_name"] == "DPMSolverMultistepScheduler"
    assert teacher["scheduler"]["beta_schedule"] == "scaled_linear"  # the model's own
    assert teacher["scheduler"]["algorithm_type"] == "dpmsolver"
    assert teacher["components"]["unet"] == "UNet2DConditionModel"
    assert teacher["rewards"]["dino"]["shape"] == [32]
    pixels, dino = (dict(teacher["rewards"][name]) for name in ("pixels", "dino"))
    assert len(pixels.pop("weights")) == 64 and dino["weights"] != teacher["rewards"]["pixels"]["weights"]
    assert pixels == {"model": None, "shape": [3, 16, 16], "dtype": "uint8"}
    card = (reference / "README.md").read_text()
    assert "18 rows" in card and "`features_dino`" in card and "guidance scale 3.0, 7.5" in card


# Interruptions


def build_and_die(args, at_rename):
    """A build that is killed when it has written a file aside, and would rename it now."""
    renames, rename = count(1), os.replace

    def rename_or_die(*paths):
        if next(renames) == at_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = rename_or_die
    main(args)


def test_a_killed_build_goes_on(forkserver, models, reference, tmp_path):
    folder = tmp_path / "killed"
    args = build_args(models, folder)

    # With a first shard rendered, and nothing of it in place. (The first rename is that of teacher.json.)
    first = forkserver(build_and_die, args, 2)
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == {"teacher.json", ".shard-00000.json.part"}

    # With a second shard on disk, all but renamed.
    second = forkserver(build_and_die, args, 4)
    second.join()
    assert second.exitcode == -signal.SIGKILL
    assert {path.name for path in folder.glob("shard-*.parquet")} == {"shard-00000.parquet"}
    assert (folder / ".shard-00001.parquet.part").read_bytes() == (reference / "shard-00001.parquet").read_bytes()

    # From outside, while it renders the third.
    third = forkserver(main, args)
    while third.is_alive() and not (folder / "shard-00001.parquet").exists():
        time.sleep(0.002)
    third.kill()
    third.join()
    assert third.exitcode == -signal.SIGKILL

    assert main(args).rows == 18
    assert contents(folder) == contents(reference)
    assert main(args).rendered == 0
    assert contents(folder) == contents(reference)


def join_and_build(args, rank, port):
    """What `torchrun` tells process `rank` of two, and a build that knows it."""
    from accelerate import PartialState

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (ranks | address).items()})
    report = main(args)
    assert (PartialState().num_processes, report.rendered) == (2, 4)


def test_two_processes_build_what_one_builds(forkserver, models, reference, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = build_args(models, tmp_path / "two")
    processes = [forkserver(join_and_build, args, rank, port) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "two") == contents(reference)


@pytest.mark.slow
def test_torchrun_builds_what_one_process_builds(models, reference, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "data.build"]
    command = [sys.executable, *launch, *build_args(models, tmp_path / "two")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2" in done.stderr
    assert "18 rows in 4 shards, 4 of them rendered now." in done.stderr
    assert contents(tmp_path / "two") == contents(reference)


def test_damaged_shards_are_built_again(models, reference, copy, caplog):
    truncated, altered, orphan, missing = (copy / f"shard-0000{i}.parquet" for i in range(4))
    truncated.write_bytes(truncated.read_bytes()[:-100])
    altered.write_bytes(altered.read_bytes().replace(b"PNG", b"BNG", 1))
    orphan.with_suffix(".json").write_text("{")
    missing.unlink()
    report = main(build_args(models, copy))
    assert report.rendered == 4
    assert contents(copy) == contents(reference)
    for path in (truncated, altered, orphan):
        assert f"{path.name} does not match its checksum" in caplog.text


def test_only_the_damaged_shard_is_built_again(models, reference, copy):
    kept = (copy / "shard-00000.parquet").stat().st_ino
    (copy / "shard-00002.parquet").write_bytes(b"")
    assert main(build_args(models, copy)).rendered == 1
    assert (copy / "shard-00000.parquet").stat().st_ino == kept
    assert contents(copy) == contents(reference)


# Skips


def test_empty_and_repeated_prompts_are_counted(models, tmp_path, caplog, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\n\na blue cube\na red ball\n  \na red ball\na green star\n")
    with caplog.at_level(logging.INFO, "data"):
        report = main(build_args(models, tmp_path / "out", prompts=prompts, num_prompts=None))
    assert (report.rows, report.empty, report.duplicates) == (6, 2, 2)
    assert "2 empty and 2 repeated prompts" in caplog.text
    assert "2 empty and 2 repeated prompts" in (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"6/6 images, +[\d.]+ images/s, 00:00 left", capsys.readouterr().err)


def test_rows_with_nan_are_counted(models, reference, tmp_path, caplog):
    args = build_args(models, tmp_path / "out", guidance_scale=[3.0, 1e38])  # every second row overflows
    report = main(args)
    assert (report.rows, report.not_finite) == (9, 9)
    assert "Shard 1: seeds [5, 7, 9] gave NaN" in caplog.text
    assert json.loads((tmp_path / "out" / "shard-00001.json").read_text())["skipped"] == [5, 7, 9]
    finite = [row for row in read_rows(reference) if row["guidance_scale"] == 3.0]
    assert read_rows(tmp_path / "out") == finite
    assert main(args).not_finite == 9


def test_nothing_but_nan_is_an_error(models, tmp_path):
    with pytest.raises(ValueError, match="all 18 rows came out with NaN"):
        main(build_args(models, tmp_path / "out", guidance_scale=[1e38]))


# Errors


def test_another_teacher_is_refused(models, copy):
    with pytest.raises(ValueError) as error:
        main(
            build_args(
                models, copy, num_inference_steps=4, guidance_scale=[5.0], rewards=["pixels"], reward_models=None
            )
        )
    assert "num_inference_steps: 3 in teacher.json, 4 here" in str(error.value)
    assert "guidance_scale: [3.0, 7.5] in teacher.json, [5.0] here" in str(error.value)
    assert "rewards.dino.shape: [32] in teacher.json, 'nothing' here" in str(error.value)
    assert "shard_size" not in str(error.value)


def test_retrained_weights_are_noticed(models, reference, copy, tmp_path):
    from tiny_teacher import make_tiny_sd

    retrained = Path(shutil.copytree(models, tmp_path / "models"))
    make_tiny_sd(seed=1).save_pretrained(retrained / "sd")
    with pytest.raises(ValueError, match="weights: "):
        main(build_args(retrained, copy))


def test_shards_of_an_unknown_teacher_are_refused(models, copy):
    (copy / "teacher.json").unlink()
    with pytest.raises(ValueError, match=r"no teacher\.json"):
        main(build_args(models, copy))


def test_a_teacher_that_cannot_be_read_is_named(models, copy):
    (copy / "teacher.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"teacher\.json cannot be read: .* Bring it back"):
        main(build_args(models, copy))


def test_other_versions_draw_a_warning(models, reference, copy, caplog):
    teacher = json.loads((copy / "teacher.json").read_text())
    teacher["versions"]["torch"] = "2.0"
    (copy / "teacher.json").write_text(json.dumps(teacher))
    assert main(build_args(models, copy)).rendered == 0
    assert "torch: '2.0' in teacher.json" in caplog.text


@pytest.mark.parametrize("inside", ["", "out"])
def test_an_unwritable_folder_is_found_at_once(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir must be a folder"):
        main(build_args(tmp_path / "missing", tmp_path / "file" / inside))


def test_a_full_disk_leaves_no_half_file(tmp_path):
    write_whole(tmp_path / "shard", b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written.*make room"):
            write_whole(tmp_path / "shard", bytes(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {"shard": b"before"}


def build_on_a_full_disk(args):
    sys.stderr = io.StringIO()  # it may be a file, and no file may grow
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    with pytest.raises(OSError, match=r"could not be written\. Finished shards are safe"):
        main(args)


def test_a_build_goes_on_when_there_is_room_again(forkserver, models, reference, tmp_path):
    args = build_args(models, tmp_path / "out")
    process = forkserver(build_on_a_full_disk, args)
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path / "out").keys() == {"teacher.json", "shard-00000.json"}
    assert main(args).rendered == 4
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("DPMSolver", {}, "not a scheduler class"),
        ("AutoencoderKL", {}, "not a scheduler class"),
        ("DDIMScheduler", {"solver_order": 2}, "DDIMScheduler takes no solver_order"),
        ("EulerAncestralDiscreteScheduler", {}, "draws noise"),
        ("LCMScheduler", {}, "draws noise"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "draws noise"),
        ("FlowMatchEulerDiscreteScheduler", {}, "cannot replace"),
    ],
)
def test_unfit_schedulers_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, kwargs, DDIMScheduler())


def test_flow_models_keep_to_flow_schedulers():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert make_scheduler("FlowMatchEulerDiscreteScheduler", {}, flow).config.shift == 3.0
    with pytest.raises(ValueError, match="cannot replace"):
        make_scheduler("DDIMScheduler", {}, flow)
    kwargs = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert make_scheduler("DPMSolverMultistepScheduler", kwargs, flow).config.use_flow_sigmas


# Config


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 2.5}, "shard_size=2.5"),
        ({"dtype": "fp16"}, "dtype='fp16'"),
        ({"guidance_scale": []}, "guidance_scale="),
        ({"guidance_range": [7.0, 3.0]}, "guidance_range="),
        ({"guidance_range": [3.0, 7.0], "guidance_step": 5.0}, "guidance_step=5"),
        ({"guidance_step": 0.0}, "guidance_step=0"),
        ({"rewards": ["depth", "dino"], "reward_models": ["zoo/depth"]}, "one for each of"),
        ({"scheduler_kwargs": "[1]"}, "expected a mapping"),
        ({"scheduler_kwargs": "{solver_order: 3}"}, "scheduler_kwargs='{solver_order: 3}' is not JSON"),
        ({"guidance_scale": [math.nan]}, "guidance_scale="),
    ],
)
def test_bad_knobs_are_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        make_config(**knobs)


def test_unknown_keys_are_errors(tmp_path):
    (tmp_path / "config.yaml").write_text("model: a\noutput_dir: b\nsteps: 40\n")
    with pytest.raises(ValueError, match="--steps"):
        main(["--config", str(tmp_path / "config.yaml")])


def test_the_default_solver_lends_its_arguments_to_no_other():
    assert make_config().scheduler_kwargs["algorithm_type"] == "dpmsolver"
    assert make_config(scheduler="DDIMScheduler").scheduler_kwargs == {}
    assert make_config(scheduler_kwargs='{"solver_order": 3}').scheduler_kwargs == {"solver_order": 3}


def test_a_single_value_is_a_list_of_one():
    config = make_config(guidance_scale=3, rewards="depth", reward_models="zoo/depth")
    assert (config.guidance_scale, config.rewards, config.reward_models) == ([3], ["depth"], ["zoo/depth"])


@pytest.mark.parametrize("name", ["build_mini_sd", "build_sd15"])
def test_shipped_configs_parse(name):
    path = CONFIGS / f"{name}.yaml"
    assert len(path.read_text().splitlines()) <= 30
    (config,) = TrlParser((BuildConfig,)).parse_args_and_config(["--config", str(path)])
    assert config.num_inference_steps == 40
    scheduler = make_scheduler(config.scheduler, config.scheduler_kwargs, DDIMScheduler())
    scheduler.set_timesteps(40)
    assert scheduler.timesteps[0] == 999


def test_help_is_quick():
    code = "import sys, data.build; assert not {'torch', 'diffusers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)
