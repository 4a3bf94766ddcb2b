"""Contrast, focus and captions by WCAG 2.2 AA, and what a screen reader is told: in a headless Chromium."""

import pytest
from steps import SECONDS, api, make_sheet, prompt_of, says, tab_to

pytestmark = pytest.mark.browser
LEAST = {"text": 4.5, "large text": 3.0, "icon": 3.0, "outline": 3.0}  # WCAG 1.4.3 and 1.4.11
WITH_A_NAME = (
    "button checkbox combobox image img link listbox radio radiogroup searchbox slider spinbutton switch tab "
)
WITH_A_NAME = (WITH_A_NAME + "tabpanel textbox").split()


@pytest.fixture(scope="module")
def table(tiny_table):
    return tiny_table


# Contrast of colours that Chromium computed: whatever is transparent is laid over what is behind it, up to the page.
COLOURS = """
    const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = ([r, g, b, a], ground) => [r, g, b].map((one, i) => one * a + ground[i] * (1 - a));
    const ground = (element) => {
        if (!element) return [255, 255, 255];
        const colour = rgba(getComputedStyle(element).backgroundColor);
        return colour[3] === 1 ? colour.slice(0, 3) : over(colour, ground(element.parentElement));
    };
    const opacity = (element) => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;
    const light = (colour) => {
        const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = colour.map((one) => linear(one / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (a, b) => {
        const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
        return (bright + 0.05) / (dark + 0.05);
    };
"""
# Of every text, and of every outline of a field.
CONTRASTS = """
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
        if (!text || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
        if (element.closest("script, style, [aria-hidden=true], .sr-only, :disabled")) continue;
        const style = getComputedStyle(element), behind = ground(element), colour = rgba(style.color);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const seen = over([...colour.slice(0, 3), colour[3] * opacity(element)], behind);
        const kind = !/[\\p{L}\\p{N}]/u.test(text) ? "icon" : large ? "large text" : "text";
        found.push({kind, what: text.slice(0, 60), contrast: contrast(seen, behind)});
    }
    for (const field of document.querySelectorAll("input, textarea")) {
        if (field.type === "hidden" || field.disabled || !field.checkVisibility({checkOpacity: true})) continue;
        const behind = ground(field.parentElement), style = getComputedStyle(field), fill = ground(field);
        const edge = parseFloat(style.borderTopWidth) ? over(rgba(style.borderTopColor), behind) : behind;
        const best = Math.max(contrast(edge, behind), contrast(fill, behind));
        found.push({kind: "outline", what: `${field.type} ${field.value}`.slice(0, 60), contrast: best});
        if (field.matches("[type=checkbox], [type=radio]")) continue;
        const value = over(rgba(style.color), fill);
        found.push({kind: "text", what: `value ${field.value}`.slice(0, 60), contrast: contrast(value, fill)});
    }
    return found;
"""
# Of what has the focus: its outline, and on how many of its sides nothing cuts that off; none if all were seen before.
FOCUSED = """
    const one = document.activeElement, style = getComputedStyle(one);
    if (window.seen.has(one)) return null;
    window.seen.add(one);
    await Promise.all(one.getAnimations().map((change) => change.finished));
    const width = parseFloat(style.outlineWidth), offset = parseFloat(style.outlineOffset);
    const behind = ground(offset < 0 ? one : one.parentElement), box = one.getBoundingClientRect();
    const around = width + offset, drawn = {left: 1, right: 1, top: 1, bottom: 1};
    for (let frame = one.parentElement; frame; frame = frame.parentElement) {
        if (getComputedStyle(frame).overflow === "visible" || frame === document.documentElement) continue;
        const edge = frame.getBoundingClientRect();
        for (const [side, sign] of [["left", -1], ["right", 1], ["top", -1], ["bottom", 1]])
            if (sign * (box[side] + sign * around - edge[side]) > 0.5) drawn[side] = 0;
    }
    const tag = one.matches("input") ? one.type : one.matches(".thumbnail-item") ? "thumbnail" : one.localName;
    const {left, right, top, bottom} = drawn, name = one.ariaLabel || one.value || one.textContent.trim();
    return {
        kind: one.getAttribute("role") || tag, name: name.slice(0, 40),
        style: style.outlineStyle, width, sides: left + right + top + bottom,
        contrast: contrast(over(rgba(style.outlineColor), behind), behind),
    };
"""


def states(page):
    """Brings the page to its states, and tells the name of each."""
    page.get_by_role("button", name="More settings").click()
    page.get_by_role("button", name="Make the proof sheet").click()
    says(page, "Write a prompt")
    yield "wrong"
    make_sheet(page, candidates=2)
    page.get_by_role("checkbox", name="1 · seed 7").check()
    page.get_by_role("button", name="Refine the picked pictures").click()
    says(page, "refinement took")
    yield "refined"
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    says(page, "4 of 4 pictures.")
    yield "compare"
    page.get_by_role("tab", name="History").click()
    page.get_by_role("button", name="seed 7").last.click()
    says(page, "How it was made")
    yield "history"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme, visit):
    page = visit(color_scheme=scheme)
    for state in states(page):
        page.mouse.move(0, 0)
        for _ in range(20):  # until what fades in is there
            seen = page.evaluate(f"() => {{{COLOURS}{CONTRASTS}}}")
            low = [one for one in seen if one["contrast"] < LEAST[one["kind"]] - 0.005]
            if not low:
                break
            page.wait_for_timeout(0.5 * SECONDS)
        assert not low, f"{state}: {low}"
        assert len([one for one in seen if one["kind"] == "outline"]) >= 10 and len(seen) > 30


def focused(page, most=150):
    """The outlines of all that Tab comes to, from the top of the page to its end."""
    page.evaluate("window.seen = new Set([document.body])")
    page.get_by_role("heading", name="The light table").click()
    found = []
    for _ in range(most):
        page.keyboard.press("Tab")
        one = page.evaluate(f"async () => {{{COLOURS}{FOCUSED}}}")
        if one is None:
            return found
        found.append(one)
    raise AssertionError(f"{most} times Tab do not come to the end.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_has_the_focus_has_an_outline(scheme, visit):
    page = visit(color_scheme=scheme)
    kinds, wrong = set(), []
    for state in states(page):
        for one in focused(page):
            kinds.add(one["kind"])
            is_drawn = one["style"] == "solid" and one["width"] >= 2 and one["contrast"] >= LEAST["outline"]
            is_whole = one["sides"] == 4 or one["kind"] == "slider"  # which is as tall as its pictures
            if not (is_drawn and is_whole):
                wrong.append(f"{state}: {one}")
    assert not wrong, "\n".join(wrong)
    assert kinds >= {"textarea", "number", "radio", "checkbox", "button", "tab", "thumbnail", "slider", "a"}, kinds


# Of every thumbnail that is seen, left, top, right and bottom: of the button, its picture and its caption.
THUMBNAILS = """() => [...document.querySelectorAll(".shelf .thumbnail-lg")].filter((one) => one.checkVisibility())
    .map((one) => [one, one.querySelector("img"), one.querySelector(".caption-label")].map((part) => {
        const {left, top, right, bottom} = part.getBoundingClientRect();
        return [left, top, right, bottom, part.scrollWidth - part.clientWidth, part.scrollHeight - part.clientHeight];
    }))"""


@pytest.mark.parametrize("width", [1200, 390])
def test_captions_are_below_their_pictures(width, visit):
    page = visit(viewport={"width": width, "height": 844})
    make_sheet(page, candidates=8)
    page.get_by_role("checkbox", name="2 · seed 8").check()
    page.get_by_role("button", name="Refine the picked pictures").click()
    says(page, "refinement took")
    page.mouse.move(0, 0)
    thumbnails = page.evaluate(THUMBNAILS)
    assert len(thumbnails) == 9
    for thumbnail, picture, caption in thumbnails:
        left, top, right, bottom = thumbnail[:4]
        for part in (picture, caption):
            assert left <= part[0] < part[2] <= right and top <= part[1] < part[3] <= bottom
            assert max(part[4:]) <= 0  # nothing of it is cut off
        assert picture[3] <= caption[1]
        assert picture[2] - picture[0] == pytest.approx(picture[3] - picture[1], abs=1)  # the miniature's are square
    sheet = [[number for part in one for number in part[:4]] for one in thumbnails[:8]]
    assert len({round(one[6] - one[4]) for one in sheet}) == 1  # all of a width
    for one in sheet:
        row = [other for other in sheet if abs(other[1] - one[1]) < 0.9 * (one[3] - one[1])]
        assert len(row) > 1 and len({(round(other[1]), round(other[3])) for other in row}) == 1  # side by side
    assert page.evaluate("document.documentElement.scrollWidth") <= width


LOOK = """one => {
    const {outlineStyle, outlineWidth, outlineOffset, boxShadow} = getComputedStyle(one);
    return [outlineStyle, outlineWidth, outlineOffset, boxShadow].join(" ");
}"""


def test_a_picture_tells_whether_it_is_picked_and_whether_it_has_the_focus(visit):
    page = visit()
    make_sheet(page, candidates=2)
    picture, box = page.get_by_role("button", name="2 · seed 8"), page.get_by_role("checkbox", name="2 · seed 8")
    pressed = {flag: page.get_by_role("button", name="2 · seed 8", pressed=flag) for flag in (False, True)}
    api.expect(pressed[False]).to_have_attribute("aria-pressed", "false")
    looks = {"neither": picture.evaluate(LOOK)}
    tab_to(page, picture)
    looks["focus"] = picture.evaluate(LOOK)
    page.keyboard.press("Enter")
    api.expect(pressed[True]).to_have_attribute("aria-pressed", "true")
    api.expect(box).to_be_checked()
    looks["both"] = picture.evaluate(LOOK)
    page.keyboard.press("Tab")
    looks["picked"] = picture.evaluate(LOOK)
    assert len(set(looks.values())) == 4, looks
    tick = picture.locator(".caption-label").evaluate("one => getComputedStyle(one, '::before').content")
    assert "✓" in tick
    tab_to(page, picture)
    page.keyboard.press("Enter")
    api.expect(pressed[False]).to_have_attribute("aria-pressed", "false")
    api.expect(box).not_to_be_checked()
    box.check()  # by its box
    api.expect(picture).to_have_attribute("aria-pressed", "true")
    make_sheet(page, candidates=3)
    pressings = page.locator("#sheet .thumbnail-lg").evaluate_all("all => all.map(one => one.ariaPressed)")
    assert pressings == ["false"] * 3  # another sheet, of which none is picked yet


def nodes(page):
    """(role, name, properties) of all that a screen reader can come to."""
    session = page.context.new_cdp_session(page)
    for node in session.send("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            properties = {one["name"]: one["value"].get("value") for one in node.get("properties", ())}
            yield node["role"]["value"], node.get("name", {}).get("value", "").strip(), properties


def test_a_screen_reader_is_told_every_name_and_role(visit):
    page = visit()
    expected = {
        "wrong": {
            ("textbox", "Prompt"), ("radio", "Plain few steps"), ("spinbutton", "Steps"), ("spinbutton", "Candidates"),
            ("spinbutton", "First seed"), ("checkbox", "Random"), ("textbox", "Negative prompt"),
            ("spinbutton", "Guidance"), ("spinbutton", "Steps of a full render"), ("spinbutton", "Height in pixels"),
            ("spinbutton", "Width in pixels"), ("button", "Make the proof sheet"), ("button", "Stop"),
            ("tab", "Proof sheet"), ("tab", "Compare"), ("tab", "History"),
        },
        "refined": {
            ("checkbox", "1 · seed 7"), ("button", "2 · seed 8"), ("button", "Refine the picked pictures"),
            ("slider", "Preview, and full render"), ("image", "Preview"), ("image", "Full render"),
            ("button", "Seed 7: Full render, 40 steps"), ("columnheader", "pixels (dB)"),
        },
        "compare": {("checkbox", "Full render"), ("button", "Compare")},
        "history": {("link", "Download 001-"), ("rowheader", "prompt")},
    }  # fmt: skip
    wrong = []
    for state in states(page):
        told = list(nodes(page))
        assert page.get_by_label("Ticket").count() == 3 and "Ticket" not in {name for _, name, _ in told}
        for role, name, properties in told:
            is_control = role in WITH_A_NAME or (
                properties.get("focusable") and role not in ("RootWebArea", "generic")
            )
            if is_control and not name:
                wrong.append(f"{state}: a {role} without a name, {properties}")
        for role, name in sorted(expected[state]):
            if not any(one[0] == role and one[1].startswith(name) for one in told):
                wrong.append(f"{state}: no {role} {name!r} among {sorted(one[1] for one in told if one[0] == role)}")
    assert not wrong, "\n".join(wrong)
    live = page.locator(".status[role=status], .cost[role=status]")
    assert live.count() >= 3 and prompt_of(page).get_attribute("aria-label") is None  # named by its visible label
