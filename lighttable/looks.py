"""How the page looks, and what it does in the browser by itself: style, script and theme."""

import gradio as gr

CSS = """
.wrong {color: #b91c1c; font-weight: 600; margin: 0.25rem 0}
.dark .wrong {color: #fca5a5}
.said {margin: 0.25rem 0}
.scores, .facts {border-collapse: collapse; width: 100%}
.scores caption, .facts caption {text-align: left; font-weight: 600; padding: 0.25rem 0}
.prose table :is(th, td) {border: 0; border-bottom: 1px solid var(--border-color-primary)}
.prose table :is(th, td) {text-align: left; padding: 0.25rem 0.75rem 0.25rem 0}
.prose table, .prose table tr {border: 0}
.facts td {overflow-wrap: anywhere}
.html-container {padding: 0}
.cost {min-height: 1.75rem}
.status {min-height: 2.5rem}
.shelf .grid-container {padding-top: 1.75rem; --least: max(5rem, 100% / (var(--grid-cols) + 1))}
.shelf .grid-container {grid-template-columns: repeat(auto-fill, minmax(var(--least), 1fr))}  /* none is cut off */
.shelf .grid-container {grid-auto-rows: auto; gap: 0.75rem}
.shelf .grid-wrap {min-height: 0; max-height: none; padding: 0.75rem}
.status .pending, .status.pending {opacity: 1}
.shelf:has(.preview) .grid-wrap {min-height: 24rem}
.shelf .thumbnail-lg {display: flex; flex-direction: column; aspect-ratio: auto; border-radius: var(--radius-lg)}
.shelf .thumbnail-lg > img {flex: none; aspect-ratio: 1; height: auto; border-radius: 0}
.shelf .caption-label {position: static; max-width: none; width: 100%; padding: 0.25rem 0.5rem; white-space: normal}
.shelf .caption-label {border: 0; background: none}
.shelf .thumbnail-lg:hover .caption-label {opacity: 1}
.shelf .preview::before {opacity: 1}
#sheet .thumbnail-item {border-color: var(--border-color-primary); box-shadow: none}
#sheet [aria-pressed=true] {outline: 4px solid var(--mark); box-shadow: 0 0 0 4px var(--mark)}
#sheet [aria-pressed=true] {background: var(--mark); border-color: var(--mark)}
#sheet [aria-pressed=true] .caption-label {color: var(--body-background-fill)}
#sheet [aria-pressed=true] .caption-label::before {content: "✓ "}
footer .divider, .label-clear-button {display: none}
:focus-visible {outline: 3px solid var(--mark) !important; outline-offset: 2px}
.icon-button-wrapper :focus-visible {outline-offset: -1px}  /* further out it would be cut off, and below too */
button[role=tab]:focus-visible {outline-offset: -3px}
.preview .media-button {padding: 0.5rem}
.preview .media-button:focus-visible {outline-offset: -5px}
[role=slider]:focus-visible {box-shadow: 0 0 0 2px var(--body-background-fill)}  /* on whatever picture */
#sheet [aria-pressed=true]:focus-visible {outline-offset: 6px}  /* around the frame of a picked one, which stays */
body {--mark: var(--input-border-color-focus)}
body.dark {color-scheme: dark}
button[role=tab][aria-selected=true] {color: var(--mark)}
"""
# A picture that is clicked checks its box, and is pressed while its box is checked: without a question to the server,
# so that none is lost, however quick the clicks are, and for the keyboard too.
PICK = """
const pictures = () => [...document.querySelectorAll("#sheet .thumbnail-lg")];
const press = () => {
    const boxes = document.querySelectorAll("#picks input");
    pictures().forEach((picture, n) => { picture.ariaPressed = Boolean(boxes[n]?.checked); });
};
document.addEventListener("change", press);
document.addEventListener("click", (event) => {
    const picture = event.target.closest("#sheet .thumbnail-lg");
    if (picture) document.querySelectorAll("#picks input")[pictures().indexOf(picture)]?.click();
});
"""
# gradio's slider over two pictures knows the mouse alone: it gets a name, a place in the order of Tab, and arrow keys,
# which drag it as a mouse would.
SLIDE = """
const moves = {
    ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, PageDown: -25, PageUp: 25, Home: -100, End: 100,
};
const place = (handle) => {  // of the picture in its frame, in pixels, and of the line on the picture, in percent
    const frame = handle.parentNode.getBoundingClientRect(), picture = handle.parentNode.querySelector("img");
    const width = Math.min(frame.width, frame.height * picture.naturalWidth / picture.naturalHeight);
    const left = (frame.width - width) / 2, line = new DOMMatrix(getComputedStyle(handle).transform).m41;
    return {frame, left, width, percent: Math.round(100 * (line - left) / width) || 0};
};
const drag = (handle, percent) => {
    const {frame, left, width} = place(handle);
    const there = {view: window, clientX: frame.left + left + width * percent / 100, clientY: frame.top + 1};
    handle.dispatchEvent(new MouseEvent("mousedown", there));
    window.dispatchEvent(new MouseEvent("mouseup", there));
};
const slide = (handle) => {
    handle.tabIndex = 0;
    Object.assign(handle, {role: "slider", ariaLabel: "Preview, and full render", ariaValueMin: 0, ariaValueMax: 100});
    const tell = () => {
        const {percent} = place(handle);
        Object.assign(handle, {ariaValueNow: percent, ariaValueText: `${percent}% preview, ${100 - percent}% full`});
    };
    handle.addEventListener("keydown", (event) => {
        const move = moves[event.key];
        if (!move) return;
        event.preventDefault();
        drag(handle, Math.min(Math.max(place(handle).percent + move, 0), 100));
    });
    new MutationObserver(tell).observe(handle, {attributeFilter: ["style"]});
    new ResizeObserver(tell).observe(handle.parentNode);
    handle.parentNode.addEventListener("load", tell, true);  // of its pictures, whose sizes count
    tell();
};
"""
# A field says that it is wrong, and where that is explained; what is explained out of sight comes into it.
WRONG = """
const explain = () => {
    for (const place of document.querySelectorAll("[id^=field-]")) {
        const slot = document.getElementById(place.id.replace("field-", "wrong-"));
        const wrong = slot?.querySelector(".wrong");
        for (const field of place.querySelectorAll("input, textarea")) {
            if (wrong) Object.assign(field, {ariaInvalid: "true"}).setAttribute("aria-describedby", slot.id);
            else if (field.ariaInvalid) { field.ariaInvalid = null; field.removeAttribute("aria-describedby"); }
        }
        if (wrong && !wrong.dataset.seen) { wrong.dataset.seen = "yes"; wrong.scrollIntoView({block: "nearest"}); }
    }
};
"""
# What gradio names by a number, or not at all, is named by what is written on it; places for news say that they are.
NAME = """
const name = (one, label) => { if (label && one.ariaLabel !== label) one.ariaLabel = label; };
const mend = () => {
    explain();
    press();
    for (const picture of document.querySelectorAll(".shelf .thumbnail-item")) {
        const image = picture.querySelector("img");
        name(picture, picture.querySelector(".caption-label")?.textContent.trim() || image?.title);
        if (image && !image.alt) image.ariaHidden = "true";  // the button has its name
    }
    for (const link of document.querySelectorAll(".file-preview tr a"))
        name(link, `Download ${link.closest("tr").querySelector(".filename").ariaLabel}, ${link.textContent.trim()}`);
    for (const panel of document.querySelectorAll("[role=tabpanel]"))
        name(panel, document.querySelector(`[role=tab][aria-controls="${panel.id}"]`)?.textContent.trim());
    for (const icon of document.querySelectorAll("svg:not([aria-hidden])")) icon.ariaHidden = "true";
    for (const news of document.querySelectorAll(".status:not([role]), .cost:not([role])")) news.role = "status";
    for (const handle of document.querySelectorAll("[data-testid=slider]")) {
        if (handle.role === "none") slide(handle);
        handle.parentNode.querySelectorAll("img").forEach((one, n) => { one.alt = ["Preview", "Full render"][n]; });
    }
};
new MutationObserver(mend).observe(document.body, {childList: true, subtree: true, attributeFilter: ["aria-label"]});
mend();
"""
SCRIPT = f"() => {{{PICK}{SLIDE}{WRONG}{NAME}}}"
DARK_TEXT, LIGHT_TEXT = "*neutral_700", "*neutral_200"


def theme() -> gr.themes.Base:
    """gradio's own, with contrasts of at least 4.5 to 1 where that has less, and 3 to 1 around fields."""
    texts = ("block_info_text_color", "block_label_text_color", "block_title_text_color", "body_text_color_subdued")
    colours = dict.fromkeys(texts, DARK_TEXT) | {f"{name}_dark": LIGHT_TEXT for name in texts}
    for button, fill in (("primary", "#1d4ed8"), ("cancel", "#b91c1c")):
        for state in ("", "_hover"):
            for mode in ("", "_dark"):
                colours[f"button_{button}_background_fill{state}{mode}"] = fill
                colours[f"button_{button}_text_color{state}{mode}"] = "white"
    for state in ("", "_hover", "_visited", "_active"):
        colours |= {f"link_text_color{state}": "*secondary_700", f"link_text_color{state}_dark": "*secondary_300"}
    for field in ("input", "checkbox"):
        colours |= {f"{field}_border_color_focus": "#1d4ed8", f"{field}_border_color_focus_dark": "#93c5fd"}
        colours |= {f"{field}_border_color": "*neutral_500", f"{field}_border_color_dark": "*neutral_400"}
    return gr.themes.Default(primary_hue="blue").set(**colours)
