"""What a visitor may type: recipes, or one sentence about the field that is wrong."""

import math

import pytest

from lighttable.form import MOST_SEED, Form, FormError, compared, picks, recipes
from lighttable.table import LightTable


def test_a_form_is_recipes(sd_table, models):
    form = Form("a red ring\n\n  two blue cubes \na red ring", "fog", 2, 5, False, 2.5, None, 32, "solver", 4, 30)
    made = recipes(form, sd_table)
    assert [(one.prompt, one.seed) for one in made] == [
        ("a red ring", 5),
        ("a red ring", 6),
        ("two blue cubes", 5),
        ("two blue cubes", 6),
    ]
    one = made[0]
    assert (one.negative_prompt, one.guidance_scale, one.height, one.width) == ("fog", 2.5, 16, 32)
    assert (one.method, one.steps, one.full_steps, one.solver) == ("solver", 4, 30, str(models / "sd-solver"))
    assert one.full.steps == 30
    (full,) = recipes(Form("x", candidates=1, method="full", steps=4, full_steps=30), sd_table)
    assert full.steps == 30


def test_random_seeds_differ_and_fit(sd_table):
    first = [recipes(Form("x", is_random=True, seed=None), sd_table)[0].seed for _ in range(4)]
    assert len(set(first)) == 4 and all(0 <= seed <= MOST_SEED for seed in first)


@pytest.mark.parametrize(
    "changes, field, message",
    [
        ({"prompts": ""}, "prompts", "Write a prompt"),
        ({"prompts": " \n\t\n"}, "prompts", "Write a prompt"),
        ({"prompts": None}, "prompts", "Write a prompt"),
        ({"prompts": "x" * 10_000}, "prompts", "10,000 characters; a prompt has at most 1,000"),
        ({"prompts": "a \ud800 cube"}, "prompts", "no text"),
        ({"prompts": "a \0 cube"}, "prompts", "no text"),
        ({"negative_prompt": "x" * 1001}, "negative_prompt", "1,001 characters"),
        ({"negative_prompt": "fog", "guidance_scale": 1}, "negative_prompt", "a negative prompt needs more than 1"),
        ({"candidates": 500}, "candidates", "expected a whole number from 1 to 64"),
        ({"candidates": 0}, "candidates", "expected a whole number from 1 to 64"),
        ({"candidates": 2.5}, "candidates", "Candidates 2.5: expected"),
        ({"candidates": None}, "candidates", "expected a whole number"),
        ({"candidates": 40, "prompts": "a\nb"}, "candidates", "80 pictures; one run makes at most 64"),
        ({"seed": -1}, "seed", "The first seed -1: expected a whole number from 0"),
        ({"seed": 2**32}, "seed", "The first seed 4294967296"),
        ({"seed": 1e400}, "seed", "expected a whole number"),
        ({"seed": math.nan}, "seed", "expected a whole number"),
        ({"seed": "7"}, "seed", "expected a whole number"),
        ({"guidance_scale": math.nan}, "guidance_scale", "expected a number from 0 to 30"),
        ({"guidance_scale": -1}, "guidance_scale", "expected a number from 0 to 30"),
        ({"height": 17}, "height", "needs multiples of 2"),
        ({"width": 17}, "width", "needs multiples of 2"),
        ({"height": 17, "width": 17}, "height", "needs multiples of 2"),
        ({"height": -16}, "height", "Height -16: expected"),
        ({"width": 0}, "width", "Width 0: expected"),
        ({"height": 64, "width": 64}, "height", "at most 4 times 16 x 16"),
        ({"method": "half"}, "method", "is no flow model"),
        ({"method": "os.system"}, "method", "Choose a method"),
        ({"method": ["few"]}, "method", "Choose a method"),
        ({"steps": 0}, "steps", "Steps 0: expected a whole number from 1 to 200"),
        ({"full_steps": 10**9}, "full_steps", "Steps of a full render 1000000000: expected"),
    ],
)
def test_bad_input_is_a_sentence_about_its_field(changes, field, message, sd_table):
    form = Form(**{"prompts": "a red ring", "candidates": 2, **changes})
    with pytest.raises(FormError, match=message) as raised:
        recipes(form, sd_table)
    assert raised.value.field == field
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, field, message",
    [
        ({"height": 24}, "height", "need multiples of 16"),
        ({"width": 24}, "width", "need multiples of 16"),
        ({"full_steps": 4}, "method", "distilled model"),
    ],
)
def test_half_size_previews_have_needs(changes, field, message, flux_table):
    form = Form(**{"prompts": "a red ring", "method": "half", "height": 32, "width": 32, **changes})
    with pytest.raises(FormError, match=message) as raised:
        recipes(form, flux_table)
    assert raised.value.field == field


def test_without_a_learned_solver(sd_table):
    table = LightTable(sd_table.pipe, "sd")
    with pytest.raises(FormError, match="started without a learned solver"):
        recipes(Form("x", method="solver"), table)


def test_a_comparison_has_the_same_seeds_in_every_row(sd_table):
    rows = compared(Form("x", candidates=2, seed=3), ["full", "few", "solver"], sd_table)
    assert [row[0].method for row in rows] == ["solver", "few", "full"]
    assert all([one.seed for one in row] == [3, 4] for row in rows)
    for methods, changes, field, message in (
        (["few"], {}, "methods", "Choose 2 to 4"),
        (None, {}, "methods", "Choose 2 to 4"),
        (["few", "half"], {}, "methods", "no flow model"),
        (["few", "full"], {"prompts": "a\nb"}, "prompts", "one line"),
        (["few", "full"], {"candidates": 40}, "candidates", "80 pictures"),
        (["few", "full"], {"seed": -1}, "seed", "expected"),
    ):
        with pytest.raises(FormError, match=message) as raised:
            compared(Form(**{"prompts": "x", **changes}), methods, sd_table)
        assert raised.value.field == field


def test_picks_are_pictures_of_the_sheet():
    sheet = ["4-few", "5-few", "6-few"]
    assert picks(["6-few", "4-few", "6-few"], sheet) == [0, 2]
    for chosen in (None, [], ["1-few"], ["4-few", "7-few"], ["../x"], [None], [["4-few"]], "4-few", 4):
        with pytest.raises(FormError, match=r"Pick one|not on the sheet any more"):
            picks(chosen, sheet)
    with pytest.raises(FormError, match="Make a sheet first"):
        picks([], [])
