"""Plans against the published tables, and what is refused."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_flux import save_tiny_flux

import sample
from evaluation.rendering import load_pipeline
from evaluation.single import save_png
from solver import ConsistencySolverScheduler
from solver.samplers.calls import text_length
from solver.samplers.grids import shifted
from solver.samplers.hiflow.explain import FAMILIES, as_table, explain
from solver.samplers.hiflow.plan import PRESETS, known_size, plan_stages, with_changes, with_steps
from solver.samplers.latents import default_size, initial_noise, latent_shape, pack

LADDER = (1024, 2048, 4096)
CODE, PAPER = PRESETS["code"], PRESETS["paper"]


def test_the_codes_ladder_on_flux_dev():
    """The tail that the public code really runs: μ = 1.15 of 4096 tokens, at every stage."""
    base, second, third = explain("flux", LADDER)["stages"]
    assert [stage["steps"] for stage in (base, second, third)] == [30, 16, 10]
    assert len(base["sigmas"]) == 31 and base["sigmas"][0] == 1 and base["sigmas"][-1] == 0
    tail = [0.783, 0.760, 0.734, 0.707, 0.678, 0.646, 0.612, 0.575, 0.535, 0.490, 0.441, 0.387, 0.327, 0.260]
    assert second["sigmas"] == pytest.approx([*tail, 0.184, 0.098, 0], abs=6e-4)
    assert third["sigmas"] == second["sigmas"][6:] == base["sigmas"][20:]
    assert [stage["guidance_scale"] for stage in (base, second, third)] == [3.5, 4.5, 6.0]
    assert [(stage["cutoff"], stage["alpha"], stage["beta"]) for stage in (base, second, third)] == [
        (None, 0, 0),
        (0.2, 1.0, 0.5),
        (0.2, 0.25, 0.5),
    ]


def test_static_shift_of_three_begins_the_tails_where_the_table_says():
    """18, 16, 10 and 9 of 30 steps, on the grid that the public code means to run."""
    grid = shifted(30, 4096, shift=3.0).tolist()
    starts = [grid[30 - count] for count in (18, 16, 10, 9)]
    assert starts == pytest.approx([0.818, 0.774, 0.600, 0.5625], abs=5e-4)  # the table has 0.563


def test_the_papers_ladder():
    stages = explain("flux", (1024, 2048, 3072, 4096), "paper")["stages"]
    assert [stage["steps"] for stage in stages] == [30, 18, 9, 9]
    assert [round(stage["sigmas"][0], 3) for stage in stages[1:]] == [0.826, 0.575, 0.575]
    assert {(stage["cutoff"], stage["alpha"], stage["beta"]) for stage in stages[1:]} == {(0.4, 1.0, 1.0)}
    assert [stage["text_copies"] for stage in stages] == [1, 4, 9, 16]


def test_flops_and_memory_of_the_codes_ladder():
    """8.9 PFLOP to 2K and 48 to 4K; 74.4, 418 and 3908 TFLOP a step; 81 % in the last stage; 48 to 50 GB reported."""
    report = explain("flux", LADDER)
    small, middle, large = report["tflops"]["per_stage"]
    assert report["tflops"]["total"] == pytest.approx(small + middle + large)
    assert small + middle == pytest.approx(8900, rel=0.02)
    assert small + middle + large == pytest.approx(48000, rel=0.02)
    assert large / (small + middle + large) == pytest.approx(0.81, abs=0.01)
    assert 40 < report["memory_gib"] < 60
    assert explain("flux", LADDER[:2])["memory_gib"] < report["memory_gib"]
    plain = explain("flux", LADDER, replace(CODE, shifted_patches=False))["tflops"]["per_stage"]
    steps = (30, 16, 10)
    assert [total / k for total, k in zip(plain, steps, strict=True)] == pytest.approx([74.4, 418, 3908], rel=2e-3)


def test_ramps_fall_to_one_step():
    stage = plan_stages(LADDER, CODE, 16)[1]
    assert stage.ramp(stage.beta) == pytest.approx([0.5 * (16 - k) / 16 for k in range(16)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_plan(family):
    report = explain(family, (1024, 1536, 2048))
    steps = [stage["steps"] for stage in report["stages"]]
    assert steps == ([4, 2, 1] if family == "flux-schnell" else [30, 16, 10])
    for stage in report["stages"]:
        assert len(stage["sigmas"]) == stage["steps"] + 1
        assert all(a > b for a, b in zip(stage["sigmas"][:-1], stage["sigmas"][1:], strict=True))
    costs = report["tflops"]["per_stage"]
    each = [cost / count for cost, count in zip(costs, steps, strict=True)]
    assert each == sorted(each)


def test_schnell_has_its_few_steps(capsys):
    assert [stage["steps"] for stage in explain("flux-schnell", LADDER)["stages"]] == [4, 2, 1]
    sample.main(["hiflow", "--explain", "--family", "flux-schnell", "--json"])
    assert [stage["steps"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [4, 2, 1]
    sample.main(["hiflow", "--explain", "--family", "flux-schnell", "--json", "--steps", "8", "--stage_steps", "3"])
    assert [stage["steps"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [8, 3, 3]


def test_guidance_is_the_recipes_only_for_distilled_models():
    assert {stage["guidance_scale"] for stage in explain("sdxl", LADDER[:2])["stages"]} == {5.0}
    assert [stage["guidance_scale"] for stage in explain("flux", LADDER, guidance_scale=(1, 2, 3))["stages"]] == [
        1,
        2,
        3,
    ]
    assert {stage["guidance_scale"] for stage in explain("flux", LADDER, guidance_scale=2)["stages"]} == {2.0}


def test_a_recipe_without_guidance_leaves_it_to_the_pipeline():
    report = explain("flux", LADDER, replace(CODE, guidance_scales=None))
    assert [stage["guidance_scale"] for stage in report["stages"]] == [3.5] * 3
    assert "3.5" in as_table(report)


def test_other_sizes_and_step_counts():
    stages = plan_stages(((768, 1024), (1536, 2048)), CODE, 16)
    assert [(stage.height, stage.width) for stage in stages] == [(768, 1024), (1536, 2048)]
    assert [stage.steps for stage in plan_stages((128, 256, 512), with_steps(CODE, 15), 16)] == [15, 8, 5]
    assert [stage.steps for stage in plan_stages((64, 128), with_steps(CODE, 1), 16)] == [1, 1]
    changed = with_changes(CODE, tau=(0.5,), alpha=None)
    assert changed.stage_steps is None and changed.alpha == CODE.alpha
    assert [stage.steps for stage in plan_stages((64, 128), changed, 16)] == [30, 15]


def test_a_given_image_need_not_have_the_size_that_the_model_knows():
    assert known_size((1024, 1024), None, 16) == known_size((1024, 1024), (1024, 1024), 16) == (1024, 1024)
    assert known_size((512, 512), (1024, 1024), 16) == (1024, 1024)
    assert known_size((1536, 2048), (1024, 1024), 16) == (880, 1184)  # 4 to 3, of 1024² pixels
    _, stage = plan_stages((2048, 4096), PAPER, 16, known=(1024, 1024))
    assert stage.text_copies == (4, 4)
    _, known, above = plan_stages((512, 1024, 2048), CODE, 16, known=(1024, 1024))
    assert not known.shifted_patches and not known.proportional_attention and known.ntk_factor == 1
    assert above.shifted_patches and above.proportional_attention and above.ntk_factor == 10


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("size 64.0: expected whole pixels", {"sizes": (64.0, 128.0)}),
        ("size .64.: expected whole pixels", {"sizes": ("64", "128")}),
        (r"size \(32,\): expected whole pixels", {"sizes": ((32,), (64,))}),
        (r"size \.\.\. x \.\.\.: height", {"sizes": (10**5000,)}),
        ("guidance_scale nan: expected a number from 0 on", {"guidance_scale": float("nan")}),
        ("guidance_scale -3", {"guidance_scale": -3.0}),
        ("guidance_scale 'a'", {"guidance_scale": "a"}),
        ("guidance_scales=nan|guidance_scales=.nan", {"recipe": replace(CODE, guidance_scales=(float("nan"),))}),
        (r"alpha=\('a',\): expected numbers", {"recipe": replace(CODE, alpha=("a",))}),
        ("steps=5.5: the base needs a whole number", {"recipe": replace(CODE, steps=5.5)}),
        (r"stage_steps=\(2.5,\): expected whole numbers", {"recipe": replace(CODE, stage_steps=(2.5,))}),
        (r"stage_steps=\(True,\): expected whole numbers", {"recipe": replace(CODE, stage_steps=(True,))}),
        ("steps=True: the base needs a whole", {"recipe": replace(CODE, steps=True)}),
        (r"alpha=\(True,\): expected numbers", {"recipe": replace(CODE, alpha=(True,))}),
        (
            "proportional_attention='no': expected True or False",
            {"recipe": replace(CODE, proportional_attention="no")},
        ),
        ("text_copies=2: expected True or False", {"recipe": replace(CODE, text_copies=2)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_another_kind(message, changes):
    with pytest.raises(ValueError, match=message):
        plan_stages(**{"sizes": (64, 128), "recipe": CODE, "multiple": 16, **changes})


def test_sizes_of_numpy_are_sizes():
    assert plan_stages((np.int64(64), np.int64(128)), CODE, 16) == plan_stages((64, 128), CODE, 16)
    assert explain("flux", (np.int64(1024), np.int64(2048))) == explain("flux", (1024, 2048))


def test_before_the_model_is_known_only_the_order_of_sizes_is_checked():
    """Whether they divide, and how far rounding may change proportions, is the model's to say."""
    sizes = ((768, 1024), (1153, 1540))
    assert [stage.height for stage in plan_stages(sizes, CODE, None)] == [768, 1153]
    assert len(plan_stages(sizes, replace(CODE, edges_first=(0.5, 0.3)), None)) == 2
    for bad in ((1024, 512), (0, 512)):
        with pytest.raises(ValueError, match=r"ascend|positive numbers, at most 65536"):
            plan_stages(bad, CODE, None)


def test_ablations():
    strengths = {
        name: [(stage.alpha, stage.beta) for stage in plan_stages(LADDER, CODE, 16, alignment=name)]
        for name in ("none", "init", "init+direction", "full")
    }
    assert strengths["init"] == [(0, 0)] * 3
    assert strengths["init+direction"] == [(0, 0), (1, 0), (0.25, 0)]
    assert strengths["full"] == [(0, 0), (1, 0.5), (0.25, 0.5)]
    (alone,) = plan_stages(LADDER, CODE, 16, alignment="none")
    assert (alone.height, alone.steps, alone.alpha, alone.beta) == (4096, 30, 0, 0)


BAD = {
    "ascend": {"sizes": (2048, 1024)},
    "1024 x 1024 comes after": {"sizes": (1024, 1024)},
    "multiples of 16": {"sizes": (1024, 2040)},
    "at most 65536": {"sizes": (1024, 2**20)},
    "proportions": {"sizes": ((1024, 1024), (2048, 1024))},
    "expected a sequence": {"sizes": 1024},
    "sizes=": {"sizes": ()},
    "31 steps": {"recipe": replace(CODE, stage_steps=(31,))},
    "17 steps, but the stage before it has 16": {"recipe": replace(CODE, stage_steps=(16, 17))},
    "Stage 1 has 0 steps": {"recipe": replace(CODE, stage_steps=(0,))},
    "16 steps, but the stage before it has 4": {"recipe": replace(CODE, steps=4)},
    "steps=0": {"recipe": replace(CODE, steps=0)},
    "tau=1.0": {"recipe": replace(PAPER, tau=(1.0,))},
    "tau=0": {"recipe": replace(PAPER, tau=(0,))},
    "tau=(nan,)": {"recipe": replace(PAPER, tau=(float("nan"),))},
    "give one of the two": {"recipe": replace(CODE, tau=(0.3,))},
    "cutoff=0": {"recipe": replace(CODE, cutoff=(0,))},
    "cutoff=-0.2": {"recipe": replace(CODE, cutoff=(-0.2,))},
    "cutoff=0.2: expected a tuple": {"recipe": replace(CODE, cutoff=0.2)},
    "alpha=1.5": {"recipe": replace(CODE, alpha=(1.5,))},
    "beta=-1": {"recipe": replace(CODE, beta=(-1,))},
    "ntk_factor=0": {"recipe": replace(CODE, ntk_factor=(0,))},
    "start='picture'": {"recipe": replace(CODE, start="picture")},
    "acceleration='paper'": {"recipe": replace(CODE, acceleration="paper")},
    "alignment='A_i'": {"alignment": "A_i"},
    "one for each of 3 stages": {"guidance_scale": (1, 2)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_plans(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_stages(**{"sizes": LADDER, "recipe": CODE, "multiple": 16, **BAD[message]})


def test_bad_reports():
    with pytest.raises(ValueError, match=r"'flux2'.*flux, flux-kontext"):
        explain("flux2", LADDER)
    with pytest.raises(ValueError, match="'fixed-noise' is for flow models"):
        explain("sdxl", LADDER[:2], replace(CODE, acceleration="fixed-noise"))
    with pytest.raises(ValueError, match="3072 pixels a side"):
        explain("sd3", LADDER)
    with pytest.raises(ValueError, match="'code', 'paper'"):
        explain("flux", LADDER, "codes")


def test_flops_count_the_branches_of_guidance():
    """SDXL without guidance costs half; FLUX dev is told its scale; schnell with true guidance costs twice."""

    def total(family, scale=None):
        return explain(family, LADDER[:2], guidance_scale=scale)["tflops"]["total"]

    assert total("sdxl", 1.0) == pytest.approx(total("sdxl") / 2) and total("sdxl", 5.0) == total("sdxl")
    assert total("flux", 1.0) == total("flux")
    assert total("flux-schnell", 3.0) == pytest.approx(2 * total("flux-schnell"))


def test_a_plan_is_json():
    report = explain("flux", LADDER, replace(CODE, cutoff=(math.inf,)))
    text = json.dumps(report, allow_nan=False)
    assert [stage["cutoff"] for stage in json.loads(text)["stages"]] == [None, "inf", "inf"]
    assert "inf" in as_table(report)


def test_the_command_explains(capsys):
    sample.main(
        ["hiflow", "--explain", "--family", "flux", "--sizes", "1024", "2048", "4096", "--preset", "code", "--json"]
    )
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= {"stages", "tflops", "memory_gib"}
    assert set(report["stages"][0]) >= {"size", "steps", "sigmas", "guidance_scale", "cutoff", "alpha", "beta"}
    assert [stage["size"] for stage in report["stages"]] == [1024, 2048, 4096]
    assert set(report["tflops"]) == {"per_stage", "total"}
    sample.main(["hiflow", "--explain", "--sizes", "768x1024", "1536x2048", "--tau", "0.5", "--guidance_scale", "4"])
    table = capsys.readouterr().out
    assert "1536 x 2048    15" in table and "GiB" in table
    with pytest.raises(ValueError, match="--model, --prompt, --seed: needed"):
        sample.main(["hiflow"])
    with pytest.raises(ValueError, match=r"--cutoff \(0.1, 0.2, 0.3\): expected at most 2, one a larger stage"):
        sample.main(["hiflow", "--explain", "--cutoff", "0.1", "0.2", "0.3"])
    sample.main(["hiflow", "--explain", "--json", "--ntk_factor", "4", "--text_copies", "--no-shifted_patches"])
    stage = json.loads(capsys.readouterr().out)["stages"][1]
    assert (stage["ntk_factor"], stage["text_copies"], stage["shifted_patches"]) == (4.0, 4, False)
    assert stage["proportional_attention"] is True


def test_options_without_a_use_are_refused():
    for option in (
        *(["--model", "zoo/mini-flux"], ["--seed", "0"], ["--output", "x.png"], ["--device", "cpu"], ["--all_sizes"]),
        *(["--dtype", "float32"], ["--solver", "x"], ["--negative_prompt", ""], ["--offload"], ["--ignore_memory"]),
    ):
        message = f"{option[0]}: --explain plans a published model, --family; leave it out"
        with pytest.raises(ValueError, match=message):
            sample.main(["hiflow", "--explain", *option])
    for option in (["--json"], ["--family", "flux"]):
        with pytest.raises(ValueError, match=f"{option[0]}: only --explain has a use for it"):
            sample.main(["hiflow", "--model", "zoo/mini-sd", "--prompt", "x", "--seed", "1", *option])


def test_what_needs_no_model_is_said_before_it_is_opened(tmp_path):
    given = ["hiflow", "--model", "zoo/none", "--prompt", "x", "--output", str(tmp_path / "x.png")]
    picture = tmp_path / "small.png"
    Image.new("RGB", (48, 48)).save(picture)
    for message, options in (
        ("sizes have to ascend", ["--sizes", "128", "64"]),
        ("cutoff=0.0: expected", ["--cutoff", "0"]),
        ("seed=-1000.*: expected a whole number of 64 bits", ["--seed", str(-(10**21))]),
        ("'A_i': expected one of", ["--alignment", "A_i"]),
        ("image of 48 x 48 pixels, but sizes begin with 64 x 64", ["--image", str(picture), "--sizes", "64", "128"]),
        (
            "--negative_prompt: it needs --guidance_scale above 1",
            ["--negative_prompt", "a cube", "--guidance_scale", "1"],
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([*given, *([] if "--seed" in options else ["--seed", "1"]), *options])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--offload: networks wait in main memory for a GPU, and here is none"):
            sample.main([*given, "--seed", "1", "--offload"])


def test_a_solver_and_a_negative_prompt_on_the_command_line(tmp_path):
    model = save_tiny_flux(tmp_path / "flux")
    pipe = load_pipeline(str(model), "float32", "cpu")
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2)
    with torch.no_grad():
        solver.policy.mlp[-1].bias.fill_(0.3)
    solver.save_pretrained(tmp_path / "solver")
    given = ["hiflow", "--model", str(model), "--prompt", "a red ring", "--seed", "7", "--all_sizes", "--steps", "3"]
    given += ["--sizes", "32x48", "64x96", "--guidance_scale", "3", "--ignore_memory"]
    made = {}
    for name, options in (
        ("plain", []),
        ("solved", ["--solver", str(tmp_path / "solver")]),
        ("without", ["--negative_prompt", "a blue cube"]),
    ):
        sample.main([*given, *options, "--output", str(tmp_path / f"{name}.png")])
        with Image.open(tmp_path / f"{name}.png") as large, Image.open(tmp_path / f"{name}_32x48.png") as small:
            made[name] = np.asarray(large).tobytes()
            assert large.size == (96, 64) and small.size == (48, 32)
            remembered = dict(large.text)
        for option, value in zip(options[::2], options[1::2], strict=True):
            assert remembered[f"proofsheet:{option.removeprefix('--')}"] == value
    assert len(set(made.values())) == 3


@pytest.mark.parametrize("size", ["1024x", "x1024", "-1024", "1024x1024x3", "1e3", "inf"])
def test_a_size_is_pixels(size, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["hiflow", "--explain", f"--sizes={size}"])
    assert stopped.value.code == 2 and f"{size!r}: expected pixels, or HEIGHTxWIDTH." in capsys.readouterr().err


def test_the_command_renders_with_the_length_and_the_guidance_that_the_model_knows(tmp_path):
    model = save_tiny_flux(tmp_path / "flux")
    output = tmp_path / "large.png"
    arguments = ["hiflow", "--model", str(model), "--prompt", "a red ring", "--seed", "7", "--output", str(output)]
    arguments += ["--sizes", "32", "48", "--steps", "2", "--all_sizes"]
    assert sample.main(arguments) == output  # guided by 3, as all commands are where nothing is said
    pipe = load_pipeline(str(model), "float32", "cpu")
    noise = pack(pipe, initial_noise([7], latent_shape(pipe, 32, 32)))
    call = {"height": 32, "width": 32, "latents": noise, "num_inference_steps": 2}
    call |= {"true_cfg_scale": 3.0, "negative_prompt": "", **text_length(pipe)}
    with Image.open(tmp_path / "large_32.png") as small, Image.open(output) as large:
        difference = np.asarray(small, float) - np.asarray(pipe("a red ring", **call).images[0], float)
        assert abs(difference).max() <= 1 and large.size == (48, 48)
        made = json.loads(large.text["proofsheet:hiflow"])
        assert made["sizes"] == [32, 48] and made["steps"] == 2 and made["stages"] == [[32, 32, 3.0], [48, 48, 3.0]]
    save_png(Image.new("RGB", (4, 4)), tmp_path / "ralu.png", {"prompt": "x", "seed": "7", "ralu": "{}"})
    for path, command in ((output, "hiflow"), (tmp_path / "ralu.png", "ralu")):
        with pytest.raises(ValueError, match=f"is a picture of `sample.py {command}`, which no plain run refines"):
            sample.main(["refine", "--preview", str(path), "--output", str(tmp_path / "full.png")])


def test_a_learned_solver_says_the_guidance_where_nothing_else_does(tmp_path):
    model = save_tiny_flux(tmp_path / "flux")
    pipe = load_pipeline(str(model), "float32", "cpu")
    solver = ConsistencySolverScheduler.from_scheduler(pipe.scheduler, order=2, guidance_scale=2.5)
    solver.save_pretrained(tmp_path / "solver")
    output = tmp_path / "large.png"
    given = ["hiflow", "--model", str(model), "--prompt", "a red ring", "--seed", "7", "--output", str(output)]
    given += ["--sizes", "32", "48", "--steps", "2", "--solver", str(tmp_path / "solver")]
    for option, scales in (([], (2.5, 2.5)), (["--guidance_scale", "1", "2"], (1.0, 2.0))):
        sample.main([*given, *option])
        with Image.open(output) as large:
            stages = json.loads(large.text["proofsheet:hiflow"])["stages"]
        assert tuple(scale for *_, scale in stages) == scales


def test_the_usual_sizes_are_those_that_the_model_has(tmp_path):
    for family, sizes in (("flux", [1024, 2048, 4096]), ("sd1.5", [512, 1024, 2048]), ("sd3", [1024, 2048])):
        assert [stage["size"] for stage in explain(family)["stages"]] == sizes
    model = save_tiny_flux(tmp_path / "flux")
    side = default_size(load_pipeline(str(model), "float32", "cpu"))[0]
    given = ["hiflow", "--model", str(model), "--prompt", "a red ring", "--seed", "7", "--steps", "2"]
    sample.main([*given, "--output", str(tmp_path / "x.png")])
    Image.new("RGB", (48, 32)).save(tmp_path / "small.png")
    sample.main([*given, "--image", str(tmp_path / "small.png"), "--output", str(tmp_path / "y.png")])
    with Image.open(tmp_path / "x.png") as own, Image.open(tmp_path / "y.png") as enlarged:
        assert own.size == (4 * side, 4 * side) and enlarged.size == (4 * 48, 4 * 32)


def test_numbers_a_stage_are_counted_by_the_sizes_that_the_model_has(capsys):
    sample.main(["hiflow", "--explain", "--family", "sd3", "--json", "--guidance_scale", "5", "4", "--alpha", "0.5"])
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(stage["guidance_scale"], stage["alpha"]) for stage in stages] == [(5, 0), (4, 0.5)]
    with pytest.raises(ValueError, match=r"--alpha \(1.0, 0.5\): expected at most 1, one a larger stage"):
        sample.main(["hiflow", "--explain", "--family", "sd3", "--alpha", "1", "0.5"])
