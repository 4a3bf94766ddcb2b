"""The page: which function each of its components calls.

`build(table, output)` makes it, `serve(table, output)` starts a server. What the functions here answer is text,
numbers, or files that a visit wrote under `output`; what a visitor typed reaches HTML through `wording` alone.
"""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import torch

from evaluation.recipe import METHODS
from lighttable import runs, wording
from lighttable.components import Parts, lay_out
from lighttable.form import Form, FormError, compared, picks, recipes
from lighttable.looks import CSS, SCRIPT, theme
from lighttable.table import LightTable, Stopped
from lighttable.visit import Kept, Visit

log = logging.getLogger(__name__)
PROGRESS = gr.Progress()  # as a default argument, it asks gradio for the event's own
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ON_DEVICE = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
STOPPED = "Stopped. What was finished is in the history."
MORE = ("negative_prompt", "guidance_scale", "full_steps", "height", "width")  # fields that may be folded away
KEPT_SECONDS = 24 * 3600  # of gradio's copies of pictures


def build(table: LightTable, output: Path) -> gr.Blocks:
    """The page of a light table whose visits write under `output`."""
    with gr.Blocks(title="Light table", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        parts = lay_out(table, forget=lambda visit: visit and visit.end())
        _wire(page, parts, Events(table, output, parts, page))
    return page


def serve(table: LightTable, output: Path, waiting: int = 16, **launch) -> gr.Blocks:
    """Starts the server; what it serves is under `output`.

    Args:
        table: the light table.
        output: folder of all pictures.
        waiting: visitors who may wait for the device; the next one is told to come back.
        launch: of `gradio.Blocks.launch`: `server_name`, `server_port`, ...
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(output)  # the one folder that gradio serves files from
    page = build(table, output / "visits")
    page.queue(max_size=waiting, api_open=False)
    looks = {"css": CSS, "js": SCRIPT, "theme": theme(), "footer_links": ["settings"]}
    page.launch(show_error=False, max_file_size="1kb", ssr_mode=False, **looks, **launch)
    return page


class Events:
    """What happens on the page.

    Args:
        table: the light table, one for all visitors.
        output: folder of the visits.
        parts: the components, which are the keys of what is answered.
        page: whose queue they wait in.
    """

    def __init__(self, table: LightTable, output: Path, parts: Parts, page: gr.Blocks):
        self.table, self.output, self.parts, self.page = table, output, parts, page
        self.visits: dict[str, Visit] = {}  # of pages that are open, by gradio's name of the session

    # Coming and going

    def arrive(self, request: gr.Request) -> Visit:
        visit = Visit(self.output, request.session_hash)
        self.visits[visit.session] = visit
        return visit

    def leave(self, request: gr.Request) -> None:
        """A closed page frees the device; its files stay for an hour, in case it comes back."""
        visit = self.visits.pop(request.session_hash, None)
        if visit is not None:
            visit.stop.set()

    # Before a run

    def cost(self, given: dict) -> dict:
        """What sheet and comparison will cost, or what is wrong with the form.

        An empty prompt is not wrong yet, and what a run said of it stays: this answer may come after that one.
        """
        form, methods = self._form(given), given[self.parts.compare["methods"]]
        is_empty = not (isinstance(form.prompts, str) and form.prompts.strip())
        if is_empty:
            form = replace(form, prompts="?")
        sheet, error = self._cost(lambda: recipes(form, self.table))
        rows, compare_error = self._cost(lambda: [one for row in compared(form, methods, self.table) for one in row])
        if error is None and compare_error is not None and compare_error.field == "methods":
            error = compare_error
        messages = self._messages(error)
        if is_empty:
            del messages[self.parts.slots["prompts"]]
        return {self.parts.sheet["cost"]: sheet, self.parts.compare["cost"]: rows, **messages}

    def _cost(self, ask: Callable) -> tuple[str, FormError | None]:
        try:
            return wording.said(wording.costs(self.table.estimate(ask()))), None
        except FormError as error:
            return "", error

    def refine_cost(self, visit: Visit | None, picked: list | None) -> str:
        """What refining the picks will cost; nothing is wrong yet if there are none."""
        sheet = visit.sheet if visit else []
        try:
            recipes = [sheet[number].recipe for number in picks(picked, names(sheet))]
        except FormError:
            return ""
        return wording.said(wording.costs(self.table.estimate_refinements(recipes)))

    # What is wrong is said at once; what is right waits for the device

    def ask_for_sheet(self, given: dict) -> dict:
        return self._asked(self.parts.sheet, given, lambda: recipes(self._form(given), self.table))

    def ask_to_refine(self, given: dict) -> dict:
        return self._asked(self.parts.refine, given, lambda: self._picked(given))

    def ask_to_compare(self, given: dict) -> dict:
        methods = given[self.parts.compare["methods"]]
        return self._asked(self.parts.compare, given, lambda: compared(self._form(given), methods, self.table))

    def _asked(self, part: dict, given: dict, check: Callable) -> dict:
        """A new name for the run that is asked for, at which it joins the queue; or why it cannot be."""
        try:
            self._visit(given)
            check()
            self._check_queue()
        except FormError as error:
            return self._messages(error) | {part["status"]: ""}
        except ValueError as error:
            return self._messages() | {part["status"]: wording.wrong(str(error))}
        return self._messages() | {part["status"]: "", part["asked"]: secrets.token_hex(8)}

    def _check_queue(self) -> None:
        """Raises ValueError if it is full: gradio would say so in a corner of the page, for a few seconds."""
        queue = self.page._queue  # gradio has no public name for it
        if queue.max_size is not None and len(queue) >= queue.max_size:
            waiting = wording.count(queue.max_size, "run")
            raise ValueError(f"The queue for the device is full ({waiting}); please try again in a while.")

    # Runs

    def make_sheet(self, given: dict, progress=PROGRESS) -> Iterator[dict]:
        yield from self._guarded(self.parts.sheet, lambda: self._sheet(given, progress))

    def _sheet(self, given: dict, progress: gr.Progress) -> Iterator[dict]:
        sheet, refine, visit = self.parts.sheet, self.parts.refine, self._visit(given)
        asked = recipes(self._form(given), self.table)
        several = len({recipe.prompt for recipe in asked}) > 1
        yield {
            sheet["gallery"]: [],
            sheet["picks"]: gr.update(choices=[], value=[]),
            sheet["picking"]: gr.update(visible=False),
            refine["results"]: gr.update(visible=False),
            refine["status"]: "",
        }
        for made in runs.sheet(self.table, visit, asked, visit.begin(), told(progress, len(asked))):
            yield {
                sheet["gallery"]: shown(made, several),
                sheet["picks"]: gr.update(choices=choices(made)),
                sheet["picking"]: gr.update(visible=True),
                sheet["status"]: wording.said(f"{len(made)} of {wording.count(len(asked), 'picture')}."),
            }

    def refine(self, given: dict, progress=PROGRESS) -> Iterator[dict]:
        yield from self._guarded(self.parts.refine, lambda: self._refine(given, progress))

    def _refine(self, given: dict, progress: gr.Progress) -> Iterator[dict]:
        refine, visit = self.parts.refine, self._visit(given)
        numbers = self._picked(given)
        estimate = self.table.estimate([kept.recipe for kept in visit.sheet])
        for pairs in runs.refinements(self.table, visit, numbers, visit.begin(), told(progress, len(numbers))):
            refined = [pair.full.evaluations for pair in pairs]
            scores = wording.scores_table((wording.title(pair.preview.recipe), pair.scores) for pair in pairs)
            yield {
                refine["results"]: gr.update(visible=True),
                refine["slider"]: pairs[-1].side_by_side(),
                refine["gallery"]: [(str(pair.full.path), wording.title(pair.full.recipe)) for pair in pairs],
                refine["scores"]: scores,
                refine["status"]: wording.said(wording.saved(estimate, refined, pairs[-1].full.recipe.steps)),
            }

    def compare(self, given: dict, progress=PROGRESS) -> Iterator[dict]:
        yield from self._guarded(self.parts.compare, lambda: self._compare(given, progress))

    def _compare(self, given: dict, progress: gr.Progress) -> Iterator[dict]:
        visit, galleries = self._visit(given), self.parts.compare["rows"]
        asked = compared(self._form(given), given[self.parts.compare["methods"]], self.table)
        total, columns = sum(map(len, asked)), min(max(len(asked[0]), 4), 8)
        yield {gallery: gr.update(value=[], visible=False, columns=columns) for gallery in galleries}
        for made in runs.comparison(self.table, visit, asked, visit.begin(), told(progress, total)):
            done = sum(map(len, made))
            rows = {
                gallery: gr.update(value=shown(row), label=METHODS[row[0].recipe.method], visible=True)
                for gallery, row in zip(galleries, made, strict=False)
                if row
            }
            yield rows | {self.parts.compare["status"]: wording.said(f"{done} of {wording.count(total, 'picture')}.")}

    def stop(self, visit: Visit | None) -> str:
        if visit is not None:
            visit.stop.set()
        return wording.said(STOPPED if visit and visit.history else "Stopped.")

    # Looking

    def look(self, visit: Visit | None, event: gr.SelectData):
        """A refined picture beside its preview."""
        pairs = visit.refined if visit else []
        return pairs[event.index].side_by_side() if event.index < len(pairs) else None

    def history(self, visit: Visit | None) -> tuple:
        made = visit.look_back() if visit else []
        pictures = [(str(kept.path), wording.title(kept.recipe)) for kept in made]
        return pictures, [str(kept.path) for kept in made], ""

    def facts(self, visit: Visit | None, event: gr.SelectData) -> str:
        made = visit.seen if visit else []  # what is shown: a run that goes on has made more
        return wording.facts_table(made[event.index].facts) if event.index < len(made) else ""

    # Shared

    def _guarded(self, part: dict, run: Callable[[], Iterator[dict]]) -> Iterator[dict]:
        """What a run yields, after the messages of the last one; an error is a sentence, next to its field if any."""
        status = part["status"]
        yield self._messages() | {status: ""}
        try:
            yield from run()
        except FormError as error:
            yield self._messages(error)
        except Stopped:
            yield {status: wording.said(STOPPED)}
        except torch.OutOfMemoryError:
            yield {status: wording.wrong("The device has too little memory for this size; choose a smaller one.")}
        except ValueError as error:
            log.warning("%s", error)
            yield {status: wording.wrong(str(error))}
        except Exception:  # the page's edge: the visitor gets a sentence, the log the rest, and the server lives on
            log.exception("A run failed.")
            yield {status: wording.wrong("Something went wrong; the server's log says what. Please try again.")}

    def _messages(self, error: FormError | None = None) -> dict:
        """All places for messages: empty, but that of the error, which is unfolded."""
        field = error.field if error else None
        unfolded = {self.parts.more: gr.update(open=True)} if field in MORE else {}
        return unfolded | {
            slot: gr.update(value=wording.wrong(str(error)) if name == field else "", visible=name == field)
            for name, slot in self.parts.slots.items()
        }

    def _form(self, given: dict) -> Form:
        return Form(**{name: given[component] for name, component in self.parts.fields.items()})

    def _picked(self, given: dict) -> list[int]:
        return picks(given[self.parts.sheet["picks"]], names(self._visit(given).sheet))

    def _visit(self, given: dict) -> Visit:
        """Raises ValueError for a visitor whom the server does not know, or no longer."""
        visit = given[self.parts.visit]
        if visit is None:
            raise ValueError("The server does not know this page any more; please reload it.")
        self.visits[visit.session] = visit  # a page that was gone is here again, and may go again
        return visit


def _wire(page: gr.Blocks, parts: Parts, events: Events) -> None:
    """Which component calls what."""
    visit, sheet, refine, compare, history = parts.visit, parts.sheet, parts.refine, parts.compare, parts.history
    form = [*parts.fields.values()]
    rows = [*form, compare["methods"]]
    costs = {
        "fn": events.cost,
        "inputs": {*rows},
        "outputs": [sheet["cost"], compare["cost"], *parts.slots.values(), parts.more],
    }
    page.load(events.arrive, None, visit, **AT_ONCE).then(**costs, **AT_ONCE)
    page.unload(events.leave)
    changes = [component.change for component in rows]
    gr.on(changes, **costs, trigger_mode="always_last", **AT_ONCE)

    results = [refine[name] for name in ("results", "slider", "gallery", "scores")]
    outputs = [sheet["gallery"], sheet["picking"], sheet["picks"], *results, refine["status"]]
    asks = [sheet["run"].click, parts.fields["prompts"].submit]
    running = [
        _run(parts, sheet, asks, events.ask_for_sheet, events.make_sheet, form, outputs),
        _run(parts, refine, [refine["run"].click], events.ask_to_refine, events.refine, [sheet["picks"]], results),
        _run(parts, compare, [compare["run"].click], events.ask_to_compare, events.compare, rows, compare["rows"]),
    ]
    past = (events.history, visit, [history["gallery"], history["files"], history["facts"]])
    for run in running:
        run.then(*past, **AT_ONCE)
    for part in (sheet, refine, compare):
        part["stop"].click(events.stop, visit, part["status"], cancels=running, **AT_ONCE).then(*past, **AT_ONCE)
    sheet["picks"].change(events.refine_cost, [visit, sheet["picks"]], refine["cost"], **AT_ONCE)
    refine["gallery"].select(events.look, visit, refine["slider"], **AT_ONCE)
    history["gallery"].select(events.facts, visit, history["facts"], **AT_ONCE)


def _run(parts: Parts, part: dict, asks: list, ask: Callable, run: Callable, inputs: list, outputs: list):
    """A button asks, which is answered at once; what it asks for, if nothing is wrong, waits for the device."""
    visit, news = parts.visit, [part["status"], *parts.slots.values(), parts.more]
    gr.on(asks, ask, {visit, *inputs}, [part["asked"], *news], **AT_ONCE)
    return part["asked"].change(
        run, {visit, *inputs}, [*outputs, *news], show_progress_on=part["status"], trigger_mode="once", **ON_DEVICE
    )


def told(progress: gr.Progress, pictures: int) -> Callable[[float], None]:
    """Tells gradio's progress bar the share that is done."""
    return lambda share: progress(share, desc=f"Picture {min(int(share * pictures) + 1, pictures)} of {pictures}")


def shown(made: list[Kept], several: bool = False) -> list[tuple[str, str]]:
    """A gallery's pictures and captions."""
    return [(str(kept.path), wording.caption(n, kept.recipe, several)) for n, kept in enumerate(made, start=1)]


def choices(made: list[Kept]) -> list[tuple[str, str]]:
    """The pictures that can be picked: what the visitor reads, and their names."""
    return [(f"{n} · seed {kept.recipe.seed}", kept.name) for n, kept in enumerate(made, start=1)]


def names(made: list[Kept]) -> list[str]:
    return [kept.name for kept in made]
