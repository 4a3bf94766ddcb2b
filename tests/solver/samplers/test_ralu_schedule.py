"""Stages, grids and NT-matching against the published numbers and against what they are derived from."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from solver.samplers.ralu.schedule import (
    FAR,
    PRESETS,
    Schedule,
    _smallest_matching_Z,
    at_bound,
    density,
    js_distance,
    published_search,
    restart,
    scheduler_shift,
    sigma_grid,
    solve,
    stage_starts,
)

GOLDEN = {
    "4x": [
        [1, 0.9695, 0.9304, 0.8786, 0.8066, 0.7],
        [0.9365, 0.8925, 0.8426, 0.7854, 0.7192, 0.6418, 0.55],
        [0.8853, 0.8157, 0.7347, 0.6396, 0.5260, 0.3881, 0.2173, 0],
    ],
    "5x": [
        [1, 0.9611, 0.9072, 0.8281, 0.7],
        [0.9461, 0.8925, 0.8295, 0.7543, 0.6630, 0.55],
        [0.9019, 0.8202, 0.7220, 0.6020, 0.4517, 0.2583, 0],
    ],
    "7x": [[1, 0.9417, 0.8], [0.9616, 0.8946, 0.8101, 0.7], [0.9359, 0.8336, 0.7052, 0.5390, 0.3158, 0]],
    "2x": [
        [1, 0.978, 0.9504, 0.9149, 0.8672, 0.8],
        [0.9429, 0.9101, 0.8747, 0.8364, 0.7948, 0.7495, 0.7],
        [0.906, 0.8474, 0.7824, 0.7097, 0.6281, 0.5356, 0.4301, 0.3086, 0.167, 0],
    ],
    "3x": [
        [1, 0.9561, 0.8851, 0.75],
        [0.9494, 0.8827, 0.8014, 0.7],
        [0.9359, 0.8546, 0.756, 0.6341, 0.4795, 0.277, 0],
    ],
    "turbo": [[1, 0.7], [0.8235, 0.55], [0.7097, 0.3361, 0]],
}
DISTANCES = {"4x": 0.01746, "5x": 0.01626, "7x": 0.02664, "2x": 0.03666, "3x": 0.02131}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_grids(name):
    """The published presets' sigmas, to four decimals."""
    for sigmas, golden in zip(PRESETS[name].stage_sigmas(), GOLDEN[name], strict=True):
        assert sigmas == pytest.approx(golden, abs=6e-5)
    first, mixed, full = PRESETS[name].stage_sigmas()
    assert first[0] == 1 and full[-1] == 0  # exactly
    assert [len(sigmas) - 1 for sigmas in (first, mixed, full)] == list(PRESETS[name].steps)


def test_restart_points():
    """The published points, and the identities they come from."""
    for name, (s2, s3, a2, b2, a3, b3) in {
        "4x": (0.0635, 0.1147, 0.2118, 0.9365, 0.2548, 0.8853),
        "7x": (0.0384, 0.0641, 0.1920, 0.9616, 0.2136, 0.9359),
        "2x": (0.0571, 0.0940, 0.2853, 0.9430, 0.3132, 0.9060),
    }.items():
        preset = PRESETS[name]
        found = (*preset.starts[1:], *restart(preset.ends[0], preset.Z)[1:], *restart(preset.ends[1], preset.Z)[1:])
        assert found == pytest.approx((s2, s3, a2, b2, a3, b3), abs=6e-5)
    for end in (0.1, 0.45, 0.9):
        for Z in (2.0, 6.3, 50.0):
            s, a, b = restart(end, Z)
            assert s < end and a * end == pytest.approx(s) and b == pytest.approx(1 - s)
            assert a * (1 - end) == pytest.approx(b / Z)  # the copies' noise fills what the new noise lacks
        assert restart(end, 2.0)[0] == pytest.approx(end / (2 - end))  # Pyramidal Flow's choice
    assert restart(1.0, 6.0) == (1.0, 1.0, 0.0)


def test_grid_is_uniform_before_the_shift():
    sigmas = np.array(sigma_grid(0.9, 0.2, 4.0, 7))
    assert np.diff(sigmas / (4 - 3 * sigmas)) == pytest.approx(np.full(7, np.diff(sigmas / (4 - 3 * sigmas))[0]))
    assert sigma_grid(1.0, 0.0, 1.0, 4.0) == sigma_grid(1.0, 0.0, 1.0, 4)  # whole numbers are whole numbers
    assert sigma_grid(1.0, 0.0, 1.0, 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("name", DISTANCES)
def test_published_search_reproduces_the_presets(name):
    """With the public code's settings, to three decimals (SD3's as recomputed), and the distance that was printed.

    At 7x our search stops 0.0014 before the public code's, in a valley that is flat.
    """
    preset = PRESETS[name]
    shifts, Z = published_search(preset.steps, preset.ends)
    near = 1.5e-3 if name == "7x" else 6e-4
    assert shifts == pytest.approx(preset.shifts, abs=near)
    assert pytest.approx(preset.Z, abs=near) == Z
    assert preset.js_distance == pytest.approx(DISTANCES[name], abs=4e-5)


def test_unmatched_schedule_is_far():
    """Shift 3 in all stages and c = 1/4 at 4x: the published reference distance."""
    assert js_distance((5, 6, 7), (0.3, 0.45, 1.0), (3, 3, 3), 2.0, 3.0) == pytest.approx(0.0926, abs=6e-5)


def test_solve_keeps_more_of_the_small_picture_at_little_cost():
    """4x: 5 % slack gives Z about 6; the distance stays within the slack of the best that any Z has (0.01686)."""
    found = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 3.0, enough=0.0)
    assert 5 < found.Z < PRESETS["4x"].Z
    assert found.js_distance <= 1.055 * 0.01686
    loose = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 3.0, slack=0.17, enough=0.0)
    assert 4.5 < loose.Z < found.Z
    assert not at_bound(found)


def test_solve_stops_where_the_match_is_good_enough():
    """Two steps back to almost nothing but noise (Z = 18) buy a distance that nobody sees."""
    best = solve((1, 1, 2), (0.3, 0.45, 1.0), 0.3, 3.0, enough=0.0)
    found = solve((1, 1, 2), (0.3, 0.45, 1.0), 0.3, 3.0)
    assert best.Z > 15 and best.js_distance < 0.01
    assert found.Z < 8 and 0.0165 < found.js_distance <= 0.017


@pytest.mark.parametrize(("shift", "distance"), [(6.22, 0.02), (25.3, 0.06)])
def test_solve_follows_the_shift_of_large_pictures(shift, distance):
    """FLUX at 1440² and 2048²; between the public code's bounds, at most 10, the latter has a distance of 0.2."""
    found = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, shift)
    assert found.js_distance < distance and max(found.shifts) > 10 and not at_bound(found, Z_max=20)


def test_solve_at_an_enormous_shift():
    """FLUX at 4096 px, e^11.55: from shifts of 3 the search stays 0.19 away; a search in units of it does not."""
    found = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, math.exp(11.55))
    assert found.js_distance < 0.02 and min(found.shifts) > 1e5


def test_the_second_search_leaves_small_shifts_alone():
    """2x at a shift of 3 stays 0.036 away wherever the search begins: its answer is that of the first, to the bit."""
    preset = PRESETS["2x"]
    settings = preset.steps, preset.ends, 3.0, 0.05, 20.0, 0.017
    distance, Z, shifts = _smallest_matching_Z(*settings, first_guess=3.0, unit=1.0)
    found = solve(preset.steps, preset.ends, preset.ratio, 3.0)
    assert distance > FAR and (found.Z, found.shifts) == (Z, shifts)


def test_solve_does_not_run_away():
    """At Wan's shift 8 the public search ends at Z = 100 and forgets the small picture."""
    shifts, Z = published_search((5, 6, 7), (0.3, 0.45, 1.0), shift=8.0)
    assert pytest.approx(100) == Z
    assert stage_starts((0.3, 0.45, 1.0), Z)[1] == pytest.approx(0.0043, abs=1e-4)
    assert shifts[0] == pytest.approx(10.0)
    found = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 8.0)
    assert found.Z < 17 and found.js_distance < 0.02


def test_density_is_that_of_shifted_times():
    """Times of a shifted uniform grid fall as the density says."""
    u = (np.arange(200_000) + 0.5) / 200_000
    times = 1 - 3 * u / (1 + 2 * u)
    share, _ = np.histogram(times, bins=20, range=(0, 1))
    grid = density(3.0)
    expected = [grid[(np.linspace(0, 1, 1000) * 20).clip(max=19.999).astype(int) == k].mean() / 20 for k in range(20)]
    assert share / 200_000 == pytest.approx(np.array(expected), rel=0.01)
    cut = density(3.0, 0.2, 0.6)
    assert cut.sum() / 999 == pytest.approx(1, rel=5e-3) and not cut[:199].any() and not cut[601:].any()


def test_shift_that_the_scheduler_really_uses():
    """FLUX.1-dev at 1024 x 1024: e^1.15, and the grid of the scheduler itself is that shift's."""
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert scheduler_shift(dynamic, 4096) == pytest.approx(3.158, abs=1e-3)
    assert scheduler_shift(dynamic, 256) == pytest.approx(np.exp(0.5))
    assert scheduler_shift(FlowMatchEulerDiscreteScheduler(shift=2.5), 4096) == 2.5
    with pytest.raises(ValueError, match=r"16777216 image tokens: the scheduler shifts by e\^2840; take a smaller"):
        scheduler_shift(dynamic, 4096**2)
    dynamic.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.5)
    assert dynamic.sigmas.tolist() == pytest.approx(sigma_grid(1, 0, scheduler_shift(dynamic, 256), 4), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (5, 6, 7, 8), "ends": (0.2, 0.3, 0.5, 1.0)}, "three stages"),
        ({"steps": (5, 0, 7)}, "at least 1"),
        ({"ends": (0.3, 0.45, 0.9)}, "end at 1"),
        ({"ends": (0.45, 0.3, 1.0)}, "rise"),
        ({"ends": (0.0, 0.3, 1.0)}, "rise"),
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"shift": -1.0}, "shift=-1.0"),
        ({"shift": math.inf}, "shift=inf"),
        ({"shift": math.nan}, "shift=nan"),
        ({"shift": 2e6}, r"shift=2000000.0: expected a number from 1e-06 to 1e\+06"),
        ({"ends": np.eye(3)}, "end at 1"),
    ],
)
def test_bad_stages(change, message):
    with pytest.raises(ValueError, match=message):
        solve(**{"steps": (5, 6, 7), "ends": (0.3, 0.45, 1.0), "ratio": 0.3, "shift": 3.0, **change})


def test_stages_in_arrays():
    expected = solve((5, 6, 7), (0.3, 0.45, 1.0), 0.3, 3.0)
    assert solve(np.array([5, 6, 7]), np.array([0.3, 0.45, 1.0]), 0.3, 3.0) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Z": math.inf}, "Z=inf: expected a finite number"),
        ({"Z": math.nan}, "Z=nan: expected a finite number"),
        ({"shifts": (3.0, math.nan, 3.0)}, r"shifts=.*nan.*three positive finite numbers"),
        ({"shifts": (3.0, 3.0, math.inf)}, "three positive finite numbers"),
        ({"shift": math.nan}, "shift=nan"),
        ({"steps": np.array([5, 6, 7])}, "three stages in lists"),
    ],
)
def test_numbers_that_would_make_no_picture(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{**asdict(PRESETS["4x"]), **change})


def test_c_above_a_quarter():
    with pytest.raises(ValueError, match=r"Z=1.9, c=0.277.*at most 1/4"):
        Schedule((5, 6, 7), (0.3, 0.45, 1.0), 0.3, (3, 3, 3), 1.9)
