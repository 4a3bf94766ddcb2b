"""What is on the page: gradio components, made in the order in which they appear."""

from dataclasses import dataclass, field

import gradio as gr

from evaluation.recipe import METHODS
from lighttable.form import COMPARED, NAMES
from lighttable.table import LightTable


@dataclass
class Parts:
    """The components that events read or change, and a place for a message under each that can be wrong."""

    more: gr.Accordion | None = None  # opens where one of its fields is wrong
    fields: dict[str, gr.components.Component] = field(default_factory=dict)
    slots: dict[str, gr.HTML] = field(default_factory=dict)
    sheet: dict = field(default_factory=dict)
    refine: dict = field(default_factory=dict)
    compare: dict = field(default_factory=dict)
    history: dict = field(default_factory=dict)

    def place(self, name: str, component: gr.components.Component) -> None:
        """A field of the form, with the place for its message."""
        component.elem_id = f"field-{name}"
        self.fields[name] = component
        self.slots[name] = slot(name)


class Picks(gr.CheckboxGroup):
    """Gives whatever was picked; gradio's own raises where the choices have changed since the page was seen."""

    is_template = True  # for gradio: in the browser it is what it derives from

    def preprocess(self, payload):
        return payload


def slot(name: str) -> gr.HTML:
    """The place for what is wrong with a field."""
    return gr.HTML(visible=False, elem_id=f"wrong-{name}")


def lay_out(table: LightTable) -> Parts:
    """Everything, within `gr.Blocks`."""
    parts = Parts()
    gr.Markdown("# The light table\nMany quick previews, one pick, one full render of exactly that picture.")
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            _form(parts, table)
        with gr.Column(scale=5, min_width=320), gr.Tabs():
            with gr.Tab("Proof sheet"):
                _sheet_tab(parts)
            with gr.Tab("Compare"):
                _compare_tab(parts, table)
            with gr.Tab("History"):
                _history_tab(parts)
    solver = f"learned solver: `{table.solver}`" if table.solver else "no learned solver (`--solver`)"
    gr.Markdown(f"Model: `{table.model}`, {solver}")
    for part in (parts.sheet, parts.refine, parts.compare):  # out of all columns, which would show it with themselves
        part["ticket"] = gr.Textbox(label="Ticket", visible="hidden")  # where it changes, a run joins the queue
    return parts


def _form(parts: Parts, table: LightTable) -> None:
    height, width = table.default_size
    about = "What the picture shows. Several prompts: one a line."
    parts.place("prompts", gr.Textbox(label="Prompt", info=about, lines=2))
    parts.place("method", gr.Radio(_methods(table), value=table.methods[0], label="Method"))
    _row(parts, ("steps", 5, "Steps", "Of a preview."), ("candidates", 8, "Candidates", "Seeds of each prompt."))
    random = ("is_random", False, "Random", "Another first seed each time.")
    _row(parts, ("seed", 7, "First seed", "The others follow it."), random)
    with gr.Accordion("More settings", open=False) as parts.more:
        parts.place("negative_prompt", gr.Textbox(label="Negative prompt", info="What the picture shall not show."))
        _row(parts, ("guidance_scale", 3, "Guidance", None), ("full_steps", 40, "Steps of a full render", None))
        _row(parts, ("height", height, "Height in pixels", None), ("width", width, "Width in pixels", None))
    parts.fields = {name: parts.fields[name] for name in NAMES}


def _row(parts: Parts, *fields: tuple[str, float | bool, str, str | None]) -> None:
    """Fields side by side, each (name, value, label, info); the places for their messages are below the row."""
    with gr.Row(equal_height=True):
        for name, value, label, about in fields:
            kind = gr.Checkbox if isinstance(value, bool) else gr.Number
            parts.fields[name] = kind(value, label=label, info=about, min_width=140, elem_id=f"field-{name}")
    for name, *_ in fields:
        parts.slots[name] = slot(name)


def _sheet_tab(parts: Parts) -> None:
    sheet, refine = parts.sheet, parts.refine
    sheet["cost"] = gr.HTML(elem_classes="cost")
    _run_and_stop(sheet, "Make the proof sheet")
    sheet["gallery"] = _gallery("Proof sheet: click a picture to pick it", allow_preview=False, elem_id="sheet")
    with gr.Column(visible=False) as sheet["picking"]:
        sheet["picks"] = Picks([], label="Picked", info="The pictures to refine.", elem_id="picks")
        parts.slots["picks"] = slot("picks")
        refine["cost"] = gr.HTML(elem_classes="cost")
        _run_and_stop(refine, "Refine the picked pictures")
    with gr.Column(visible=False) as refine["results"]:
        with gr.Row():
            refine["slider"] = gr.ImageSlider(
                label="Preview, and full render",
                format="png",
                interactive=False,
                max_height=512,
                min_width=300,
                buttons=["fullscreen"],  # a download from here would not remember how it was made
            )
            refine["gallery"] = _gallery("Refined: click one to see it beside its preview", columns=2)
        refine["scores"] = gr.HTML()


def _compare_tab(parts: Parts, table: LightTable) -> None:
    fewest, most = COMPARED
    compare = parts.compare
    about = f"{fewest} to {most} methods, a row each, from the seeds of the form."
    compare["methods"] = gr.CheckboxGroup(_methods(table), value=table.methods[:fewest], label="Methods", info=about)
    parts.slots["methods"] = slot("methods")
    compare["cost"] = gr.HTML(elem_classes="cost")
    _run_and_stop(compare, "Compare")
    compare["rows"] = [_gallery("", columns=8, visible=False) for _ in range(most)]


def _history_tab(parts: Parts) -> None:
    parts.history["gallery"] = _gallery("All pictures of this visit, the newest first")
    parts.history["facts"] = gr.HTML()
    about = "PNG files; each remembers how it was made (sample.py remake)"
    parts.history["files"] = gr.Files(label=about, interactive=False)


def _run_and_stop(part: dict, label: str) -> None:
    with gr.Row():
        part["run"] = gr.Button(label, variant="primary", scale=4)
        part["stop"] = gr.Button("Stop", variant="stop", scale=1, min_width=80)
    part["status"] = gr.HTML(elem_classes="status")


def _gallery(label: str, columns: int = 4, **settings) -> gr.Gallery:
    fixed = {"object_fit": "contain", "height": "auto", "fit_columns": False, "elem_classes": "shelf"}
    fixed |= {"interactive": False, "buttons": ["download", "fullscreen"]}
    return gr.Gallery(label=label, columns=columns, **fixed, **settings)


def _methods(table: LightTable) -> list[tuple[str, str]]:
    return [(METHODS[name], name) for name in table.methods]
