"""Preview and refine on prompts that are worked out by hand."""

import pytest
import torch

from evaluation.workflow import draws_until_accepted, simulate


def table(*rows):
    return torch.tensor([[character == "1" for character in row] for row in rows])


def test_draws():
    assert draws_until_accepted(table("0010", "1111", "0000")).tolist() == [3, 1, 4]


def test_by_hand():
    full = table("0010", "1000", "0000")
    preview = table("0110", "0100", "1000")
    # Full only: 3 + 1 + 4 renders for two pictures. Previews first, for one picture: prompt 1 looks at 3 and renders
    # two, one in vain; prompt 2 rejects its only good seed, looks at 4, renders 1; prompt 3 looks at 4, renders 1.
    result = simulate(preview, full, preview_cost=5, full_cost=40)
    assert result["full_only"]["mean"] == pytest.approx(40 * 8 / 2)
    assert result["preview_first"]["mean"] == pytest.approx(5 * 11 + 40 * 4)
    assert result["saving"]["mean"] == pytest.approx(1 - (5 * 11 + 40 * 4) / (40 * 8 / 2))
    assert result["false_accepts"]["mean"] == pytest.approx(3 / 12)
    assert result["false_rejects"]["mean"] == pytest.approx(1 / 12)
    assert result["full_only_success"]["mean"] == pytest.approx(2 / 3)
    assert result["preview_first_success"]["mean"] == pytest.approx(1 / 3)


def test_perfect_previews_cost_a_preview_a_seed_and_one_render():
    full = table("0001", "0100", "0001", "1000")
    result = simulate(full, full, preview_cost=5, full_cost=40)
    assert result["preview_first"]["mean"] == pytest.approx(5 * 11 / 4 + 40)
    low, high = result["saving"]["ci95"]
    assert low <= result["saving"]["mean"] <= high
    assert result["false_accepts"]["mean"] == result["false_rejects"]["mean"] == 0


def test_previews_that_find_nothing_save_nothing():
    """They are cheap, since nothing is ever refined; a picture from them is infinitely dear."""
    full = table("0100", "1000", "0010")
    result = simulate(torch.zeros_like(full), full, preview_cost=5, full_cost=40)
    assert result["preview_first"] == {"mean": None, "ci95": [None, None]}
    assert result["saving"] == {"mean": None, "ci95": [None, None]}
    assert result["full_only"]["mean"] == pytest.approx(40 * 6 / 3)


def test_an_interval_has_an_infinite_end_where_some_resamples_find_nothing():
    full = table("1000", "0000", "0000")
    result = simulate(full, full, preview_cost=5, full_cost=40)
    low, high = result["full_only"]["ci95"]
    assert low == pytest.approx(40) and high is None


def test_finishing_a_preview_may_cost_less_than_a_full_render():
    full = table("0001", "0100")
    result = simulate(full, full, preview_cost=5, full_cost=40, refine_cost=30)
    assert result["preview_first"]["mean"] == pytest.approx(5 * 6 / 2 + 30)
    assert result["full_only"]["mean"] == pytest.approx(40 * 6 / 2)
