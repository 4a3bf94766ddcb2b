"""Plans and their cost against the published FLOPs, and the command that prints them."""

import json

import pytest

import sample
from evaluation.commands.ralu import FAMILIES
from solver.samplers.cost import NETWORKS, decoding_flops, run_flops, text_length
from solver.samplers.ralu.plan import as_schedule, plan, stage_tokens
from solver.samplers.ralu.schedule import PRESETS, PUBLISHED_SHIFT, js_distance, solve


def test_shorter_prompts_cost_the_text_encoder_less_too():
    """The published 5x row is one of 256 text tokens, in T5 as in the transformer."""
    given = {"plain_steps": 50, "text_tokens": 256, "attention": False}
    assert plan(NETWORKS["flux-dev"], PRESETS["5x"], 1024, 1024, **given)["tflops"]["total"] == pytest.approx(
        540.47, rel=1e-3
    )
    for family in ("sd3-medium", "sdxl", "qwen-image"):  # the usual length, said: nothing changes
        usual = text_length(NETWORKS[family], NETWORKS[family].text_tokens)
        assert usual == NETWORKS[family]
    for family, tokens in (("flux-dev", -1), ("sd3-medium", 76), ("qwen-image", -1)):
        with pytest.raises(ValueError, match=f"text_tokens={tokens}"):
            text_length(NETWORKS[family], tokens)


@pytest.mark.parametrize(
    ("row", "family", "preset", "ratio", "plain_steps", "published"),
    [
        (426.01, "flux-dev", "7x", None, 50, 7.02),
        (187.92, "flux-schnell", "turbo", None, 4, 252.88 / 187.92),
        (181.09, "sd3-medium", "2x", None, 28, 1.94),
        (116.61, "sd3-medium", "3x", None, 28, 3.02),
    ],
)
def test_published_flops(row, family, preset, ratio, plain_steps, published):
    """Without attention, as the tables were made."""
    cost = plan(NETWORKS[family], as_schedule(preset, ratio=ratio), 1024, 1024, plain_steps, attention=False)["tflops"]
    assert cost["total"] == pytest.approx(row, rel=1e-3)
    assert cost["ratio"] == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(("full", "published"), [((3, 3, 4), 410.70), ((2, 3, 3), 331.38)])
def test_published_flops_with_taylorseer(full, published):
    """Only steps in full count there, of the 5x preset with 0.3 fine cells."""
    network = NETWORKS["flux-dev"]
    tokens = stage_tokens(as_schedule("5x", ratio=0.3), 4096)
    denoiser = run_flops(network, list(zip(tokens, full, strict=True)), attention=False)
    decoded = sum(decoding_flops(network, side, side, attention=False) for side in (512, 1024))
    assert (network.text_encoding + denoiser + decoded) / 1e12 == pytest.approx(published, rel=2.5e-3)


def test_with_attention_counted():
    """The presets are 4.34x, 5.30x and 7.31x of 50 steps with attention; the decoder's little one counts here too."""
    for preset, ratio in (("4x", 4.34), ("5x", 5.30), ("7x", 7.31)):
        planned = plan(NETWORKS["flux-dev"], PRESETS[preset], 1024, 1024, 50)
        assert planned["tflops"]["ratio"] == pytest.approx(ratio, rel=3e-3)
        assert planned["tflops"]["attention_counted"]


def test_stages_of_other_sizes():
    assert stage_tokens(PRESETS["4x"], 4096) == (1024, 1945, 4096)
    assert stage_tokens(PRESETS["5x"], 4096)[1] == 1636 and stage_tokens(PRESETS["7x"], 4096)[1] == 1330
    wide = plan(NETWORKS["qwen-image"], PRESETS["4x"], 768, 1344, 50)
    assert [stage["tokens"] for stage in wide["stages"]] == [1008, 1008 + 3 * 302, 4032]
    with pytest.raises(ValueError, match="height=1040"):
        plan(NETWORKS["flux-dev"], PRESETS["4x"], 1040, 1024, 50)
    edit = plan(NETWORKS["flux-dev"], PRESETS["4x"], 1024, 1024, 50, reference_tokens=4096)
    assert edit["tflops"]["total"] > 2 * plan(NETWORKS["flux-dev"], PRESETS["4x"], 1024, 1024, 50)["tflops"]["total"]


def test_schedules_that_are_meant():
    assert as_schedule("5x") is PRESETS["5x"]
    assert as_schedule("5x", ratio=0.25).ratio == 0.25
    assert as_schedule("4x", shift=2.0).shift == 2.0
    assert as_schedule(None, (5, 6, 7), (0.3, 0.45, 1.0)).shift == PUBLISHED_SHIFT
    with pytest.raises(ValueError, match="preset='9x'"):
        as_schedule("9x")
    with pytest.raises(ValueError, match="preset=None"):
        as_schedule(None)
    with pytest.raises(ValueError, match="needs both"):
        as_schedule("4x", ends=(0.3, 0.45, 1.0))
    for preset in (4, PRESETS):
        with pytest.raises(ValueError, match=r"preset=.*or a Schedule"):
            as_schedule(preset)
    for steps, ends in (
        ((5,), (1.0,)),
        (5, 1.0),
        ((2.0, 2.0, 2.0), (0.3, 0.45, 1.0)),
        ((float("nan"), 1, 1), (0.3, 0.45, 1)),
    ):
        with pytest.raises(ValueError, match=r"expected (three stages|whole numbers)"):
            as_schedule(None, steps, ends)
    with pytest.raises(ValueError, match=r"rise from above 0 to 1, by 0\.001 or more"):
        as_schedule(None, (5, 6, 7), (0.3, 1 - 1e-16 * 2, 1.0))
    with pytest.warns(UserWarning, match="h_1, h_2 on its bound"):
        as_schedule("4x", shift=0.05)


def command(line):
    sample.main(["ralu", *line.split()])


def test_command_explains(capsys):
    """JSON with the promised keys, and a table; numbers of a schedule of one's own."""
    command("--explain --family flux --width 1024 --height 1024 --preset 4x --json")
    planned = json.loads(capsys.readouterr().out)
    assert set(planned) == {"stages", "nt_matching", "tflops"}
    assert [set(stage) for stage in planned["stages"]] == [{"tokens", "steps", "sigmas"}] * 3
    assert set(planned["nt_matching"]) == {"h", "Z", "c", "js_distance", "own_shift"}
    assert planned["nt_matching"]["c"] == pytest.approx(0.02506, abs=1e-5)
    assert set(planned["tflops"]) == {"total", "plain", "ratio", "attention_counted"}
    command("--explain --family flux --steps 5 6 7 --ends .3 .45 1 --ratio .3 --shift 3")
    table = capsys.readouterr().out
    assert "1945" in table and "4.33x" in table
    with pytest.raises(ValueError, match="--family"):
        sample.main(["ralu", "--explain"])
    with pytest.raises(ValueError, match="height=0"):
        command("--explain --family flux --height 0")
    with pytest.raises(ValueError, match="three stages"):
        command("--explain --family flux --steps 5 6 7 8 --ends .1 .3 .45 1")
    with pytest.raises(ValueError, match="--seed: needed"):
        sample.main(["ralu", "--model", "somewhere", "--prompt", "x"])


def test_distance_to_the_shift_that_the_scheduler_has(capsys):
    """Published presets are matched to 3, and FLUX's scheduler has 3.158 at 1024 px."""
    command("--explain --family flux --json")
    own = json.loads(capsys.readouterr().out)["nt_matching"]["own_shift"]
    preset = PRESETS["4x"]
    distance = js_distance(preset.steps, preset.ends, preset.shifts, preset.Z, own["shift"])
    assert own == {"shift": pytest.approx(3.158, abs=1e-3), "js_distance": distance} and distance > preset.js_distance
    command("--explain --family flux")
    assert "0.0191 to the scheduler's own shift, 3.158\nTFLOPs" in capsys.readouterr().out
    for line in ("--family flux --shift own", "--family sd3", "--family flux --height 16384 --width 16384"):
        command(f"--explain --json {line}")
        assert "own_shift" not in json.loads(capsys.readouterr().out)["nt_matching"]
    command("--explain --family qwen-image")
    assert "Farther than 0.03 from the plain run's timesteps" in capsys.readouterr().out


def test_plans_of_guided_and_unguided_runs(capsys):
    """Two evaluations a step where the pipeline makes two: not of FLUX.1-dev, which is told, nor of few steps."""

    def tflops(line):
        command(f"--explain --json --plain_steps 4 --without_attention {line}")
        return json.loads(capsys.readouterr().out)["tflops"]["plain"]

    for family, usual in (("sd3", 2), ("qwen-image", 2), ("flux", 1), ("flux-schnell", 1), ("sd3.5-large-turbo", 1)):
        told = family == "flux"
        scales = {f"--guidance_scale {scale}": 1 if told else branches for scale, branches in ((1, 1), (3, 2))}
        for given, branches in {"": usual, **scales}.items():
            network = NETWORKS[FAMILIES[family].network]
            planned = plan(network, PRESETS["4x"], 1024, 1024, 4, attention=False, branches=branches)
            assert tflops(f"--family {family} {given}") == pytest.approx(planned["tflops"]["plain"])
    one, two = (tflops(f"--family sd3 --guidance_scale {scale}") for scale in (1, 3))
    decoding = decoding_flops(NETWORKS["sd3-medium"], 1024, 1024, attention=False) / 1e12
    assert two - decoding == pytest.approx(2 * (one - decoding))
    assert tflops("--family sd3 --preset turbo") == one


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--explain --family flux --seed 0 --prompt x", "--prompt, --seed: --explain plans a published model"),
        ("--explain --family flux --dtype bfloat16 --published", "--dtype, --published: --explain plans"),
        ("--model x --prompt x --seed 1 --family flux --json", "--family, --json: said to --explain only"),
        ("--explain --family flux --preset 7x --steps 5 6 7 --ends .3 .45 1", "--preset 7x: --steps and --ends"),
        ("--explain --family flux --guidance_scale nan", "--guidance_scale=nan"),
        ("--explain --family flux --height 65536 --width 65536 --steps 5 6 7 --ends .3 .45 1", r"e\^2840"),
        ("--explain --family flux --height 16384 --width 16384 --shift own", r"to 1e\+06"),
    ],
)
def test_options_that_would_do_nothing(line, message):
    with pytest.raises(ValueError, match=message):
        command(line)


def test_a_shift_that_is_none(capsys):
    with pytest.raises(SystemExit):
        command("--explain --family flux --shift abc")
    assert "argument --shift: 'abc': expected a number, or own." in capsys.readouterr().err


def test_the_command_plans_the_run_that_it_would_make(capsys):
    """Of the family's own scheduler: dynamic for FLUX, at the picture's size; 1 for schnell. And its usual preset."""

    def planned(line):
        command(f"--explain --json {line}")
        return json.loads(capsys.readouterr().out)

    own = "--steps 5 6 7 --ends .3 .45 1"
    for line, shift in (
        (f"--family flux {own}", 3.158),
        (f"--family flux {own} --width 1440 --height 1440", 6.222),
        (f"--family flux-schnell {own}", 1.0),
        (f"--family sd3 {own}", 3.0),
        ("--family flux --shift own", 3.158),
    ):
        expected = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, shift)
        assert planned(line)["nt_matching"]["h"] == pytest.approx(expected.shifts, rel=0.01)
    steps = {name: [stage["steps"] for stage in planned(f"--family {name}")["stages"]] for name in FAMILIES}
    assert steps["flux"] == steps["flux-kontext"] == [5, 6, 7]
    assert steps["sd3"] == [5, 6, 9] and steps["flux-schnell"] == steps["sd3.5-large-turbo"] == [1, 1, 2]
    kontext, flux = (planned(f"--family {name} --plain_steps 28")["tflops"] for name in ("flux-kontext", "flux"))
    assert kontext["plain"] > 2 * flux["plain"]  # the picture to edit runs along
    command("--explain --family flux-schnell --preset 4x")
    assert "costs more than the plain run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="text_tokens=99999999999999999999: expected 1 to 65536"):
        command("--explain --family flux --text_tokens 99999999999999999999")
