"""Half-size previews of `zoo/mini-flux` in a headless Chromium, from the form to the refined picture."""

import os
import threading

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from steps import PROMPT, make_sheet, rewards_of_pictures, says, shoot, shown

from evaluation.recipe import METHODS, Recipe
from lighttable.table import LightTable
from sample import main
from solver import ConsistencySolverScheduler

pytestmark = pytest.mark.browser
# Of the full steps the preview makes a third, and one more to see where the full-size run goes. More for screenshots.
CANDIDATES, STEPS, FULL_STEPS = (8, 8, 30) if os.environ.get("SCREENSHOTS") else (2, 4, 9)
LEFT = FULL_STEPS - FULL_STEPS // 3 - 1


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """With a solver that is its base rule, unless one is named: what counts is which steps are made at which size."""
    if (folder := os.environ.get("FLUX_SOLVER")) is None:
        folder = str(tmp_path_factory.mktemp("solver"))
        own = FlowMatchEulerDiscreteScheduler.from_pretrained("zoo/mini-flux", subfolder="scheduler")
        ConsistencySolverScheduler.from_scheduler(own, order=2).save_pretrained(folder)
    table = LightTable.open("zoo/mini-flux", solver=folder, rewards=rewards_of_pictures())
    table.warm_up()
    return table


@pytest.mark.parametrize("method", ["half", "both"])
def test_a_half_size_preview_goes_on_with_its_own_steps(method, visit, table, tmp_path):
    page = visit()
    page.get_by_role("radio", name=METHODS[method], exact=True).check()
    page.get_by_label("Steps", exact=True).fill(str(STEPS))
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Steps of a full render").fill(str(FULL_STEPS))
    make_sheet(page, candidates=CANDIDATES)
    previews = shown(page)
    words = ["--model", "zoo/mini-flux", "--prompt", PROMPT, "--seed", "8", "--steps", str(FULL_STEPS)]
    words += ["--height", "128", "--width", "128", "--guidance_scale", "3", "--output", str(tmp_path / "previews")]
    words += ["--small_steps", str(STEPS), "--solver", table.solver] if method == "both" else []
    main(["preview", *words])
    with Image.open(tmp_path / "previews" / "1.png") as alone:
        assert alone.size == previews[1].size == (64, 64)
        assert alone.convert("RGB").tobytes() == previews[1].tobytes()

    page.locator("#sheet .thumbnail-item").nth(1).click()
    says(page, f"1 picture, {LEFT} network evaluations")
    tokens = []
    network = table.pipe.transformer
    hook = network.register_forward_pre_hook(
        lambda _, __, given: tokens.append(given["hidden_states"].shape[1]), with_kwargs=True
    )
    page.get_by_role("button", name="Refine the picked pictures").click()
    says(page, "refinement took")
    hook.remove()
    if method == "both":
        shoot(page, "half_size")
    assert set(tokens) == {16 * 16} and len(tokens) == 2 * LEFT  # 128 pixels; prompt and negative prompt
    (refined,) = shown(page, ".shelf:has-text('Refined')")
    assert refined.size == (128, 128)
    whole = Recipe(PROMPT, 8, "full", FULL_STEPS, FULL_STEPS, height=128, width=128)
    (never_left,) = table.make([whole], threading.Event())
    assert never_left.image.tobytes() == refined.tobytes()
