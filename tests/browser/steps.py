"""What a visitor does on the page, and what the page shows."""

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

PROMPT = "a small red ring above a blue cube"
SECONDS = 1000 * float(os.environ.get("PATIENCE", "1"))  # playwright counts milliseconds


def opened(page, address):
    """The page, when it has said what its form will cost."""
    page.set_default_timeout(60 * SECONDS)
    page.goto(address)
    page.get_by_role("button", name="Make the proof sheet").wait_for()
    says(page, "network evaluations (guidance counts once)")
    return page


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
    says(page, f"{pictures} of {pictures} picture")


def shoot(page, name):
    """A small picture of the whole page, if the environment asks for it."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.mouse.move(0, 0)
        with Image.open(BytesIO(page.screenshot(full_page=True, animations="disabled"))) as image:
            colours = image.convert("RGB").quantize(256)
            dithered = image.convert("RGB").quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
        dithered.save(Path(folder) / f"{name}.png", optimize=True)


def rewards_of_pictures():
    """What scores a refined picture where pages are photographed; elsewhere nothing does."""
    return {"depth": "zoo/depth", "clip": "zoo/clip", "dino": "zoo/dino"} if os.environ.get("SCREENSHOTS") else {}


def shown(page, gallery="#sheet"):
    """The pictures of a gallery, as the browser gets them."""
    sources = page.locator(f"{gallery} .thumbnail-item img").evaluate_all("all => all.map(one => one.src)")
    return [fetched(page, source) for source in sources]


def fetched(page, source):
    return Image.open(BytesIO(page.request.get(source).body())).convert("RGB")


def tab_to(page, element, most=80):
    """Presses Tab until the element has the focus."""
    for _ in range(most):
        if element.evaluate("one => one === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{most} times Tab do not reach {element}.")
