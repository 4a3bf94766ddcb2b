"""The light table on `zoo/mini-sd` in a headless Chromium, at the size of a desk and of a phone."""

import threading

import pytest
from PIL import Image
from steps import PROMPT, SECONDS, api, ask, make_sheet, prompt_of, says, shoot, shown, tab_to

from lighttable.form import Form, recipes
from sample import main

pytestmark = pytest.mark.browser


def by_hand(table, seed, path):
    """Pixels of the picture of `sample.py` that the page's own form asks for."""
    command = ["solver", "--solver", table.solver] if table.solver else ["refine"]
    words = ["--model", table.model, "--prompt", PROMPT, "--seed", str(seed), "--steps", "5", "--guidance_scale", "3"]
    main([*command, *words, "--output", str(path)])
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def all_inside(page, pictures):
    """Asserts that a sheet shows every picture whole, inside its box and beside the others."""
    boxes = [one.bounding_box() for one in page.locator("#sheet .thumbnail-item").all()]
    around = page.locator("#sheet").bounding_box()
    assert len(boxes) == pictures
    for n, box in enumerate(boxes):
        assert box["width"] >= 64 and box["height"] >= 64  # pixels, of the miniature's pictures
        assert around["x"] <= box["x"] and box["x"] + box["width"] <= around["x"] + around["width"]
        assert around["y"] <= box["y"] and box["y"] + box["height"] <= around["y"] + around["height"]
        for other in boxes[:n]:
            is_beside = other["x"] + other["width"] <= box["x"] + 1 or box["x"] + box["width"] <= other["x"] + 1
            assert is_beside or other["y"] + other["height"] <= box["y"] + 1


def test_by_mouse_from_the_first_visit_to_the_refined_picture(visit, table, tmp_path):
    page = visit()
    make_sheet(page, candidates=8)
    all_inside(page, 8)
    shoot(page, "sheet")
    assert shown(page)[1].tobytes() == by_hand(table, 8, tmp_path / "8.png")
    first, second = page.locator("#sheet .thumbnail-item").nth(0), page.locator("#sheet .thumbnail-item").nth(1)
    first.click()
    second.click()
    first.click()  # no longer
    api.expect(page.get_by_label("2 · seed 8").and_(page.get_by_role("checkbox"))).to_be_checked(timeout=60 * SECONDS)
    api.expect(second).to_have_css("outline-style", "solid", timeout=60 * SECONDS)
    api.expect(first).to_have_css("outline-style", "none", timeout=60 * SECONDS)
    says(page, "1 picture, 40 network evaluations")
    page.get_by_role("button", name="Refine the picked pictures").click()
    says(page, "refinement took")
    says(page, "pixels (dB)")
    shoot(page, "refined")
    page.evaluate("document.body.classList.add('dark')")  # as gradio does for a visitor who prefers it
    shoot(page, "dark")
    page.evaluate("document.body.classList.remove('dark')")
    page.get_by_role("tab", name="History").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download 002-").click()
    download.value.save_as(tmp_path / "downloaded.png")
    answer = main(["remake", str(tmp_path / "downloaded.png"), "--output", str(tmp_path / "again.png")])
    assert answer.endswith("the same picture, bit for bit.")
    page.get_by_role("button", name="seed 8").last.click()
    says(page, "How it was made")
    shoot(page, "history")


def test_by_keyboard_alone(visit):
    page = visit()
    tab_to(page, prompt_of(page))
    page.keyboard.type(PROMPT)
    tab_to(page, page.get_by_label("Candidates"))
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    tab_to(page, page.get_by_role("button", name="Make the proof sheet"))
    page.keyboard.press("Enter")
    says(page, "2 of 2 pictures.")
    tab_to(page, page.get_by_role("checkbox", name="1 · seed 7"))
    page.keyboard.press("Space")
    says(page, "1 picture, 40 network evaluations")
    tab_to(page, page.get_by_role("button", name="Refine the picked pictures"))
    page.keyboard.press("Enter")
    says(page, "refinement took")
    line = page.get_by_role("slider", name="Preview, and full render")
    tab_to(page, line)
    api.expect(line).to_have_attribute("aria-valuetext", "50% preview, 50% full", timeout=60 * SECONDS)
    half = line.bounding_box()["x"]
    page.keyboard.press("ArrowRight")
    api.expect(line).to_have_attribute("aria-valuenow", "55")
    assert line.bounding_box()["x"] > half
    page.keyboard.press("Home")
    api.expect(line).to_have_attribute("aria-valuetext", "0% preview, 100% full")


# The share that the progress bar shows; none while it is drawn anew.
SHARE = """first => {
    const [bar, frame] = [".progress-bar", ".progress-bar-wrap"].map((name) => document.querySelector(name));
    const share = bar && frame ? bar.getBoundingClientRect().width / frame.getBoundingClientRect().width : 0;
    return share > first && share;
}"""


def test_a_stop_and_a_reload_in_the_middle(visit, table):
    page, evaluations = visit(), []
    hook = table.pipe.unet.register_forward_pre_hook(lambda *given: evaluations.append(1))
    ask(page, candidates=64)
    page.get_by_label("Steps", exact=True).fill("100")  # long enough to be seen
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "Picture 2 of 64")
    shoot(page, "running")
    at_first = page.wait_for_function(SHARE, arg=1 / 64).json_value()
    assert at_first < page.wait_for_function(SHARE, arg=at_first).json_value() < 1
    page.get_by_role("button", name="Stop").first.click()
    says(page, "Stopped.")
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "1 of 64 pictures.")
    page.reload()
    page.get_by_role("button", name="Make the proof sheet").wait_for()
    make_sheet(page, candidates=2)
    hook.remove()
    assert len(evaluations) < 64 * 100 / 4  # neither of the two runs of 64 pictures in 100 steps went on


def test_a_comparison(visit):
    page = visit()
    ask(page, candidates=4)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    says(page, "8 of 8 pictures.")
    shoot(page, "compare")


def test_eight_visitors_at_once(visit, table):
    pages = [visit() for _ in range(8)]
    for n, page in enumerate(pages):
        ask(page, prompt=f"{n} red rings", candidates=2)
        page.get_by_role("button", name="Make the proof sheet").click()
    api.expect(pages[-1].get_by_text("queue: ").first).to_be_visible(timeout=60 * SECONDS)  # its place in the queue
    shoot(pages[-1], "queued")
    for n, page in enumerate(pages):
        says(page, "2 of 2 pictures.")
        form = Form(f"{n} red rings", candidates=2, seed=7, method=table.methods[0])
        made = table.make(recipes(form, table), threading.Event())
        assert [image.tobytes() for image in shown(page)] == [one.image.tobytes() for one in made]


def test_a_closed_tab_frees_the_device(visit, table):
    """Whether its run goes on or waits."""
    running, waiting, evaluations = visit(), visit(), []
    hook = table.pipe.unet.register_forward_pre_hook(lambda *given: evaluations.append(1))
    for page in (running, waiting):
        ask(page, candidates=64)
        page.get_by_label("Steps", exact=True).fill("100")
        page.get_by_role("button", name="Make the proof sheet").click()
        says(page, "Picture 2 of 64" if page is running else "queue: ")
    for page in (waiting, running):
        page.close(run_before_unload=False)
    make_sheet(visit(), candidates=2)
    hook.remove()
    assert len(evaluations) < 64 * 100 / 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(scheme, visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True, has_touch=True)
    make_sheet(page, candidates=8)
    all_inside(page, 8)
    page.get_by_role("checkbox", name="1 · seed 7").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
    shoot(page, f"phone_{scheme}")
