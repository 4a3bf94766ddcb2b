"""What is on the page: gradio components, made in the order in which they appear."""

from dataclasses import dataclass, field

import gradio as gr

from evaluation.recipe import METHODS
from lighttable.form import COMPARED, NAMES
from lighttable.table import LightTable

CSS = """
.wrong {color: #b91c1c; font-weight: 600; margin: 0.25rem 0}
.dark .wrong {color: #fca5a5}
.said {margin: 0.25rem 0}
.scores {border-collapse: collapse; width: 100%}
.scores caption {text-align: left; font-weight: 600; padding: 0.25rem 0}
.scores th, .scores td {text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; overflow-wrap: anywhere}
.status {min-height: 3.5rem}
button:focus-visible, input:focus-visible, textarea:focus-visible {outline: 3px solid var(--primary-500)}
"""
DARK_TEXT, LIGHT_TEXT = "*neutral_700", "*neutral_200"


def theme() -> gr.themes.Base:
    """gradio's own, with contrasts of at least 4.5 to 1 where that has less: labels, hints, buttons."""
    texts = ("block_info_text_color", "block_label_text_color", "block_title_text_color", "body_text_color_subdued")
    colours = dict.fromkeys(texts, DARK_TEXT) | {f"{name}_dark": LIGHT_TEXT for name in texts}
    for button, fill in (("primary", "#1d4ed8"), ("cancel", "#b91c1c")):
        for state in ("", "_hover"):
            for mode in ("", "_dark"):
                colours[f"button_{button}_background_fill{state}{mode}"] = fill
                colours[f"button_{button}_text_color{state}{mode}"] = "white"
    return gr.themes.Default(primary_hue="blue").set(**colours)


@dataclass
class Parts:
    """The components that events read or change, and a place for a message under each that can be wrong."""

    visit: gr.State
    fields: dict[str, gr.components.Component] = field(default_factory=dict)
    slots: dict[str, gr.HTML] = field(default_factory=dict)
    sheet: dict = field(default_factory=dict)
    compare: dict = field(default_factory=dict)
    history: dict = field(default_factory=dict)
    status: gr.HTML | None = None

    def place(self, name: str, component: gr.components.Component) -> None:
        """A field of the form, with the place for its message."""
        self.fields[name] = component
        self.slots[name] = gr.HTML(visible=False)


def lay_out(table: LightTable, forget) -> Parts:
    """Everything, within `gr.Blocks`. `forget` is called with a visit that is over."""
    parts = Parts(gr.State(None, delete_callback=forget))
    gr.Markdown("# The light table\nMany quick previews, one pick, one full render of exactly that picture.")
    _form(parts, table)
    parts.status = gr.HTML(elem_classes="status")
    with gr.Tabs():
        with gr.Tab("Proof sheet"):
            _sheet_tab(parts)
        with gr.Tab("Compare"):
            _compare_tab(parts, table)
        with gr.Tab("History"):
            _history_tab(parts)
    gr.Markdown(f"Model: `{table.model}`" + (f", learned solver: `{table.solver}`" if table.solver else ""))
    return parts


def _form(parts: Parts, table: LightTable) -> None:
    height, width = table.default_size
    about = "What the picture shows. Several prompts: one a line."
    parts.place("prompts", gr.Textbox(label="Prompt", info=about, lines=2))
    method = "solver" if table.solver else "few"
    parts.place("method", gr.Radio(_methods(METHODS), value=method, label="Method"))
    with gr.Row():
        with gr.Column(min_width=140):
            parts.place("steps", gr.Number(5, label="Steps", info="Of a preview."))
        with gr.Column(min_width=140):
            parts.place("candidates", gr.Number(8, label="Candidates", info="Seeds of each prompt."))
        with gr.Column(min_width=140):
            parts.place("seed", gr.Number(7, label="First seed", info="The others follow it."))
        with gr.Column(min_width=140):
            parts.place("is_random", gr.Checkbox(False, label="Random", info="Another first seed each time."))
    with gr.Accordion("More settings", open=False):
        parts.place("negative_prompt", gr.Textbox(label="Negative prompt", info="What the picture shall not show."))
        with gr.Row():
            for name, value, label in (
                ("guidance_scale", 3, "Guidance"),
                ("full_steps", 40, "Steps of a full render"),
                ("height", height, "Height in pixels"),
                ("width", width, "Width in pixels"),
            ):
                with gr.Column(min_width=140):
                    parts.place(name, gr.Number(value, label=label))
    parts.fields = {name: parts.fields[name] for name in NAMES}


def _sheet_tab(parts: Parts) -> None:
    sheet = parts.sheet
    sheet["cost"] = gr.HTML()
    sheet["run"], sheet["stop"] = _run_and_stop("Make the proof sheet")
    sheet["gallery"] = _gallery("Proof sheet: click a picture to pick it", allow_preview=False, elem_id="sheet")
    sheet["picks"] = gr.CheckboxGroup([], label="Picked", info="The pictures to refine.")
    parts.slots["picks"] = gr.HTML(visible=False)
    sheet["refine"] = gr.Button("Refine the picked pictures", variant="primary")
    with gr.Row():
        sheet["slider"] = gr.ImageSlider(
            label="Preview, and full render", format="png", interactive=False, max_height=512, min_width=300
        )
        sheet["refined"] = _gallery("Refined: click one to see it beside its preview", columns=2)
    sheet["scores"] = gr.HTML()


def _compare_tab(parts: Parts, table: LightTable) -> None:
    fewest, most = COMPARED
    compare = parts.compare
    first = ["solver", "few"] if table.solver else ["few", "full"]
    about = f"{fewest} to {most} methods, a row each, from the seeds of the form."
    compare["methods"] = gr.CheckboxGroup(_methods(METHODS), value=first, label="Methods", info=about)
    parts.slots["methods"] = gr.HTML(visible=False)
    compare["cost"] = gr.HTML()
    compare["run"], compare["stop"] = _run_and_stop("Compare")
    compare["rows"] = [_gallery("", columns=8, visible=False) for _ in range(most)]


def _history_tab(parts: Parts) -> None:
    parts.history["gallery"] = _gallery("All pictures of this visit, the newest first")
    parts.history["facts"] = gr.HTML()
    about = "PNG files; each remembers how it was made (sample.py remake)"
    parts.history["files"] = gr.Files(label=about, interactive=False)


def _run_and_stop(label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(label, variant="primary"), gr.Button("Stop", variant="stop")


def _gallery(label: str, columns: int = 4, **settings) -> gr.Gallery:
    fixed = {"object_fit": "contain", "interactive": False, "buttons": ["download", "fullscreen"]}
    return gr.Gallery(label=label, columns=columns, **fixed, **settings)


def _methods(names) -> list[tuple[str, str]]:
    return [(METHODS[name], name) for name in names]
