"""The light table in a headless Chromium, at the size of a desk and of a phone: `make test-browser`.

Needs playwright (pip) and a Chromium: Debian's package, or the program that CHROMIUM names. Screenshots of each page
go to the folder that SCREENSHOTS names, if it does; PATIENCE multiplies all limits on a busy machine.
"""

import os
import shutil
import threading
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from evaluation.recipe import Recipe
from lighttable.table import LightTable

pytestmark = pytest.mark.browser
api = pytest.importorskip("playwright.sync_api")
serve = pytest.importorskip("lighttable.page").serve

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
PROMPT = "a small red ring above a blue cube"
SECONDS = 1000 * float(os.environ.get("PATIENCE", "1"))  # playwright counts milliseconds


@pytest.fixture(scope="module")
def table():
    table = LightTable.open("zoo/mini-sd")
    table.warm_up()
    return table


@pytest.fixture(scope="module")
def address(table, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "unset")  # put back afterwards
        served = serve(table, tmp_path_factory.mktemp("app"), prevent_thread_lock=True, quiet=True)
        yield served.local_url
        served.close()


@pytest.fixture(scope="module")
def chromium():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the page for a new visitor; keywords are playwright's, such as viewport and color_scheme."""
    contexts = []

    def open_page(**settings):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60 * SECONDS)
        page.goto(address)
        page.get_by_role("button", name="Make the proof sheet").wait_for()
        api.expect(page.get_by_text("network evaluations").first).to_be_visible(timeout=60 * SECONDS)
        return page

    yield open_page
    for context in contexts:
        context.close()


def says(page, text):
    api.expect(page.get_by_text(text).first).to_be_visible(timeout=120 * SECONDS)


def prompt_of(page):
    return page.locator("textarea").first


def ask(page, prompt=PROMPT, candidates=3):
    prompt_of(page).fill(prompt)
    page.get_by_label("Candidates").fill(str(candidates))


def make_sheet(page, prompt=PROMPT, candidates=3):
    ask(page, prompt, candidates)
    page.get_by_role("button", name="Make the proof sheet").click()
    pictures = candidates * len(prompt.splitlines())
    says(page, f"{pictures} of {pictures} pictures.")


def shoot(page, name):
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def shown(page):
    """The pictures of the sheet, as the browser gets them."""
    sources = page.locator("#sheet .thumbnail-item img").evaluate_all("all => all.map(one => one.src)")
    return [Image.open(BytesIO(page.request.get(source).body())).convert("RGB") for source in sources]


def test_by_mouse_from_the_first_visit_to_the_refined_picture(visit, table):
    page = visit()
    shoot(page, "first")
    make_sheet(page)
    asked = [Recipe(PROMPT, seed, "few", 5) for seed in (7, 8, 9)]
    alone = [picture.image.tobytes() for picture in table.make(asked, threading.Event())]
    assert [image.tobytes() for image in shown(page)] == alone
    first, second = page.locator("#sheet .thumbnail-item").nth(0), page.locator("#sheet .thumbnail-item").nth(1)
    first.click()
    second.click()
    first.click()  # no longer
    api.expect(page.get_by_label("2 · seed 8")).to_be_checked()
    api.expect(second).to_have_css("outline-style", "solid")
    api.expect(first).to_have_css("outline-style", "none")
    says(page, "1 picture, 40 network evaluations")
    page.get_by_role("button", name="Refine the picked pictures").click()
    says(page, "refinement took")
    says(page, "pixels (dB)")
    shoot(page, "refined")
    page.get_by_role("tab", name="History").click()
    api.expect(page.get_by_label("001-few-seed7.png")).to_be_visible(timeout=60 * SECONDS)
    shoot(page, "history")


def test_by_keyboard(visit):
    page = visit()
    prompt_of(page).focus()
    page.keyboard.type(PROMPT)
    page.get_by_label("Candidates").fill("2")
    prompt_of(page).focus()
    button = page.get_by_role("button", name="Make the proof sheet")
    for _ in range(40):
        page.keyboard.press("Tab")
        if button.evaluate("one => one === document.activeElement"):
            break
    page.keyboard.press("Enter")
    says(page, "2 of 2 pictures.")
    page.get_by_label("1 · seed 7").focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Refine the picked pictures").focus()
    page.keyboard.press("Enter")
    says(page, "refinement took")


def test_a_stop_and_a_reload_in_the_middle(visit):
    page = visit()
    ask(page, candidates=64)
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "2 of 64 pictures.")
    page.get_by_role("button", name="Stop").first.click()
    says(page, "Stopped.")
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "of 64 pictures.")
    page.reload()
    page.get_by_role("button", name="Make the proof sheet").wait_for()
    make_sheet(page, candidates=2)  # the device is free


def test_a_comparison(visit):
    page = visit()
    ask(page, candidates=2)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    says(page, "4 of 4 pictures.")
    shoot(page, "compare")


def test_what_is_wrong_is_said_and_html_is_text(visit):
    page = visit()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(1), dialog.dismiss()))
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "Write a prompt")
    html = '<img src=x onerror="alert(1)">'
    make_sheet(page, prompt=f"{html}\na red ring", candidates=1)
    assert not dialogs and page.locator("img[onerror]").count() == 0
    shoot(page, "wrong")


def test_eight_visitors_at_once(visit):
    pages = [visit() for _ in range(8)]
    for n, page in enumerate(pages):
        ask(page, prompt=f"{n} red rings", candidates=2)
        page.get_by_role("button", name="Make the proof sheet").click()
    for page in pages:
        says(page, "2 of 2 pictures.")
        assert len({image.tobytes() for image in shown(page)}) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(scheme, visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True, has_touch=True)
    make_sheet(page, candidates=2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
    shoot(page, f"phone_{scheme}")
