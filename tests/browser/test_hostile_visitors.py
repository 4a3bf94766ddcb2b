"""What is wrong is said next to its field, what is typed is text, and the server lives on: in a headless Chromium."""

import re
import threading

import pytest
from steps import SECONDS, api, ask, make_sheet, prompt_of, says

pytestmark = pytest.mark.browser
HTML = '<img src=x onerror="alert(1)"> ring'


@pytest.fixture(scope="module")
def table(tiny_table):
    return tiny_table


def settled(page, element):
    """The box of an element that the page may be about to draw anew."""
    for _ in range(100):
        if element.count() and (box := element.bounding_box()):
            return box
        page.wait_for_timeout(0.1 * SECONDS)
    raise AssertionError(f"{element} does not stay.")


@pytest.mark.parametrize(
    "label, typed, sentence",
    [
        ("Prompt", "", "Write a prompt: what the picture shows."),
        ("Prompt", "x" * 10_000, "10,000 characters; a prompt has at most 1,000."),
        ("Candidates", "500", "Candidates 500: expected a whole number from 1 to 64."),
        ("First seed", "-1", "The first seed -1: expected a whole number from 0 to"),
        ("First seed", "1e30", "The first seed 1e+30: expected a whole number from 0 to"),
        ("Height in pixels", "17", "needs multiples of 2"),
    ],
)
def test_what_is_wrong_is_said_below_its_field(label, typed, sentence, visit):
    page = visit()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    if label != "Prompt":
        prompt_of(page).fill("a red ring")
    page.get_by_role("button", name="More settings").click()
    field = page.get_by_label(label, exact=True) if label != "Prompt" else prompt_of(page)
    field.fill(typed)
    page.get_by_role("button", name="Make the proof sheet").click()
    alert = page.get_by_role("alert").filter(has_text=sentence)
    api.expect(alert).to_be_visible(timeout=60 * SECONDS)
    box = settled(page, field)
    assert -5 < settled(page, alert)["y"] - (box["y"] + box["height"]) < 150  # pixels: below its field, or its row
    api.expect(field).to_have_attribute("aria-invalid", "true")
    api.expect(field).to_have_accessible_description(re.compile(re.escape(sentence)))
    assert page.get_by_text("Traceback").count() == 0 and not errors
    field.fill({"Prompt": "a blue cube", "Candidates": "1", "First seed": "7"}.get(label, "16"))
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "1 picture." if label == "Candidates" else "of 8 pictures.")
    api.expect(alert).to_have_count(0, timeout=60 * SECONDS)
    api.expect(field).not_to_have_attribute("aria-invalid", "true")


def test_what_is_wrong_is_said_before_the_device_is_free(visit, table):
    other = visit()
    with table._turn(threading.Event()):
        prompt_of(other).fill("a red ring")
        other.get_by_role("button", name="Make the proof sheet").click()
        page = visit()  # takes long enough for the other's run to begin
        page.get_by_role("button", name="Make the proof sheet").click()
        api.expect(page.get_by_role("alert").filter(has_text="Write a prompt")).to_be_visible()
    says(other, "8 of 8 pictures.")
    make_sheet(page, candidates=1)


def test_who_asks_again_gets_the_new_sheet(visit):
    page = visit()
    ask(page, candidates=64)
    page.get_by_label("Steps", exact=True).fill("100")
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "1 of 64 pictures.")
    page.get_by_label("Steps", exact=True).fill("2")
    make_sheet(page, "a blue cube", candidates=3)
    api.expect(page.locator("#sheet .thumbnail-item")).to_have_count(3)
    page.get_by_role("button", name="Stop").first.click()
    says(page, "Nothing is running.")


def test_html_is_text(visit):
    page = visit()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(1), dialog.dismiss()))
    make_sheet(page, prompt=f"{HTML}\na red ring", candidates=1)
    api.expect(page.locator("#sheet .caption-label").first).to_contain_text(HTML, timeout=60 * SECONDS)
    page.get_by_role("tab", name="History").click()
    page.get_by_role("button", name="seed 7").last.click()
    api.expect(page.get_by_role("row").filter(has_text=HTML)).to_be_visible(timeout=60 * SECONDS)
    assert not dialogs and page.locator("img[onerror]").count() == 0
