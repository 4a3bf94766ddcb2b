"""The page: which function each of its components calls.

`build(table, output)` makes it, `serve(table, output)` starts a server. What the functions here answer is text,
numbers, or files that a visit wrote under `output`; what a visitor typed reaches HTML through `wording` alone.
"""

import logging
import os
import threading
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
from lighttable.visit import SILENT_SECONDS, Kept, Visit, Visits

log = logging.getLogger(__name__)
PROGRESS = gr.Progress()  # as a default argument, it asks gradio for the event's own
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ON_DEVICE = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"}
STOPPED = "Stopped. What was finished is in the history."
MORE = ("negative_prompt", "guidance_scale", "full_steps", "height", "width")  # fields that may be folded away


def build(table: LightTable, output: Path) -> gr.Blocks:
    """The page of a light table whose visits write under `output`."""
    with gr.Blocks(title="Light table", analytics_enabled=False, delete_cache=(3600, SILENT_SECONDS)) as page:
        parts = lay_out(table)
        _wire(page, parts, Events(table, Visits(output), parts, page))
    return page


def serve(table: LightTable, output: Path, waiting: int = 16, **launch) -> gr.Blocks:
    """Starts the server; what it serves is under `output`.

    Args:
        table: the light table.
        output: folder of all pictures.
        waiting: runs that may wait for the device; who asks for the next one is told to come back.
        launch: of `gradio.Blocks.launch`: `server_name`, `server_port`, ...
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(output)  # the one folder that gradio serves files from
    page = build(table, output)
    page.queue(max_size=waiting, api_open=False)
    looks = {"css": CSS, "js": SCRIPT, "theme": theme(), "footer_links": ["settings"]}
    page.launch(show_error=False, max_file_size="1kb", ssr_mode=False, **looks, **launch)
    return page


class Events:
    """What happens on the page.

    Args:
        table: the light table, one for all visitors.
        visits: of all pages.
        parts: the components, which are the keys of what is answered.
        page: whose queue they wait in.
    """

    def __init__(self, table: LightTable, visits: Visits, parts: Parts, page: gr.Blocks):
        self.table, self.visits, self.parts, self.page = table, visits, parts, page

    # Coming and going

    def arrive(self, request: gr.Request) -> None:
        self.visits.arrive(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        self.visits.leave(request.session_hash)

    # Before a run

    def cost(self, given: dict) -> dict:
        """What sheet and comparison will cost, or what is wrong with the form.

        An empty prompt is not wrong yet. What was said when a run was asked for, and is still so, stays: this answer
        may come after that one.
        """
        form, methods = self._form(given), given[self.parts.compare["methods"]]
        said = {"picks"}
        if not (isinstance(form.prompts, str) and form.prompts.strip()):
            form, said = replace(form, prompts="?"), {"picks", "prompts"}
        sheet, error = self._cost(lambda: recipes(form, self.table))
        rows, compare_error = self._cost(lambda: [one for row in compared(form, methods, self.table) for one in row])
        if error is None and compare_error is not None:
            rows = wording.said(str(compare_error))
            said.add(compare_error.field)
        messages = self._messages(error)
        for name in said:
            del messages[self.parts.slots[name]]
        return {self.parts.sheet["cost"]: sheet, self.parts.compare["cost"]: rows, **messages}

    def _cost(self, ask: Callable) -> tuple[str, FormError | None]:
        try:
            return wording.said(wording.costs(self.table.estimate(ask()))), None
        except FormError as error:
            return "", error

    def refine_cost(self, picked: list | None, request: gr.Request) -> str:
        """What refining the picks will cost; nothing is wrong yet if there are none."""
        try:
            sheet = self.visits.of(request.session_hash).sheet
            recipes = [sheet[number].recipe for number in picks(picked, names(sheet))]
        except ValueError:
            return ""
        return wording.said(wording.costs(self.table.estimate_refinements(recipes)))

    # What is wrong is said at once; what is right gets a ticket, and waits for the device

    def ask_for_sheet(self, given: dict, request: gr.Request) -> dict:
        return self._ask("sheet", request, lambda visit: recipes(self._form(given), self.table))

    def ask_to_refine(self, given: dict, request: gr.Request) -> dict:
        return self._ask("refine", request, lambda visit: self._picked(visit, given))

    def ask_to_compare(self, given: dict, request: gr.Request) -> dict:
        methods = given[self.parts.compare["methods"]]
        return self._ask("compare", request, lambda visit: compared(self._form(given), methods, self.table))

    def _ask(self, run: str, request: gr.Request, check: Callable) -> dict:
        part = self._part(run)
        try:
            visit = self.visits.of(request.session_hash)
            check(visit)
            self._check_queue()
        except FormError as error:
            return self._messages(error)
        except ValueError as error:
            return self._messages() | {part["status"]: wording.wrong(str(error))}
        return self._messages() | {part["status"]: "", part["ticket"]: visit.ask(run)}

    def _check_queue(self) -> None:
        """Raises ValueError if it is full: gradio would say so in a corner of the page, for a few seconds."""
        queue = self.page._queue  # gradio has no public name for it
        if queue.max_size is not None and len(queue) >= queue.max_size:
            waiting = wording.count(queue.max_size, "run")
            raise ValueError(f"The queue for the device is full ({waiting}); please try again in a while.")

    # Runs

    def make_sheet(self, given: dict, request: gr.Request, progress=PROGRESS) -> Iterator[dict]:
        yield from self._guarded("sheet", given, request, progress, self._sheet)

    def _sheet(self, given: dict, visit: Visit, stop: threading.Event, progress: gr.Progress) -> Iterator[dict]:
        sheet, refine = self.parts.sheet, self.parts.refine
        wanted = recipes(self._form(given), self.table)
        several = len({recipe.prompt for recipe in wanted}) > 1
        yield {
            sheet["gallery"]: [],
            sheet["picks"]: gr.update(choices=[], value=[]),
            sheet["picking"]: gr.update(visible=False),
            refine["results"]: gr.update(visible=False),
            refine["status"]: "",
        }
        for made in runs.sheet(self.table, visit, wanted, stop, told(progress, len(wanted))):
            yield {
                sheet["gallery"]: shown(made, several),
                sheet["picks"]: gr.update(choices=choices(made, several)),
                sheet["picking"]: gr.update(visible=True),
                sheet["status"]: wording.said(f"{len(made)} of {wording.count(len(wanted), 'picture')}."),
            }

    def refine(self, given: dict, request: gr.Request, progress=PROGRESS) -> Iterator[dict]:
        yield from self._guarded("refine", given, request, progress, self._refine)

    def _refine(self, given: dict, visit: Visit, stop: threading.Event, progress: gr.Progress) -> Iterator[dict]:
        refine, numbers = self.parts.refine, self._picked(visit, given)
        estimate = self.table.estimate([kept.recipe for kept in visit.sheet])
        several = len({kept.recipe.prompt for kept in visit.sheet}) > 1
        for pairs in runs.refinements(self.table, visit, numbers, stop, told(progress, len(numbers))):
            refined = [pair.full.evaluations for pair in pairs]
            scores = wording.scores_table((wording.title(pair.preview.recipe, several), pair.scores) for pair in pairs)
            yield {
                refine["results"]: gr.update(visible=True),
                refine["slider"]: pairs[-1].side_by_side(),
                refine["gallery"]: [(str(pair.full.path), wording.title(pair.full.recipe, several)) for pair in pairs],
                refine["scores"]: scores,
                refine["status"]: wording.said(wording.saved(estimate, refined, pairs[-1].full.recipe.steps)),
            }

    def compare(self, given: dict, request: gr.Request, progress=PROGRESS) -> Iterator[dict]:
        yield from self._guarded("compare", given, request, progress, self._compare)

    def _compare(self, given: dict, visit: Visit, stop: threading.Event, progress: gr.Progress) -> Iterator[dict]:
        galleries = self.parts.compare["rows"]
        wanted = compared(self._form(given), given[self.parts.compare["methods"]], self.table)
        total, columns = sum(map(len, wanted)), min(max(len(wanted[0]), 4), 8)
        yield {gallery: gr.update(value=[], visible=False, columns=columns) for gallery in galleries}
        for made in runs.comparison(self.table, visit, wanted, stop, told(progress, total)):
            done = sum(map(len, made))
            rows = {
                gallery: gr.update(value=shown(row), label=METHODS[row[0].recipe.method], visible=True)
                for gallery, row in zip(galleries, made, strict=False)
                if row
            }
            yield rows | {self.parts.compare["status"]: wording.said(f"{done} of {wording.count(total, 'picture')}.")}

    def stop(self, run: str, request: gr.Request) -> dict:
        """Ends what the visitor's page has running or waiting; the answer stands where that was asked for."""
        try:
            visit = self.visits.of(request.session_hash)
        except ValueError as error:
            return {self._part(run)["status"]: wording.wrong(str(error))}
        stopped = wording.said(STOPPED if visit.history else "Stopped.")
        news = {self._part(one)["status"]: stopped for one in visit.halt()}
        return news or {self._part(run)["status"]: wording.said("Nothing is running.")}

    # Looking

    def look(self, request: gr.Request, event: gr.SelectData) -> dict:
        """A refined picture beside its preview."""
        refine = self.parts.refine
        try:
            pair = _at(self.visits.of(request.session_hash).refined, event.index)
        except ValueError as error:
            return {refine["status"]: wording.wrong(str(error))}
        return {refine["slider"]: pair.side_by_side()} if pair else {}

    def history(self, request: gr.Request) -> tuple:
        try:
            made = self.visits.of(request.session_hash).look_back()
        except ValueError as error:
            return [], [], wording.wrong(str(error))
        pictures = [(str(kept.path), wording.title(kept.recipe, several=True)) for kept in made]
        return pictures, [str(kept.path) for kept in made], ""

    def facts(self, request: gr.Request, event: gr.SelectData) -> str:
        try:
            made = self.visits.of(request.session_hash).seen  # what is shown: a run that goes on has made more
        except ValueError as error:
            return wording.wrong(str(error))
        kept = _at(made, event.index)
        return wording.facts_table(kept.facts) if kept else ""

    # Shared

    def _guarded(
        self, run: str, given: dict, request: gr.Request, progress: gr.Progress, make: Callable
    ) -> Iterator[dict]:
        """What a run yields, after the messages of the last one; an error is a sentence, next to its field if any.

        Nothing, where the run was stopped or asked for again before its turn came.
        """
        status = self._part(run)["status"]
        try:
            visit = self.visits.of(request.session_hash)
        except ValueError as error:
            yield {status: wording.wrong(str(error))}
            return
        stop = visit.begin(run, given[self._part(run)["ticket"]])
        if stop is None:
            return
        try:
            yield self._messages() | {status: ""}
            yield from make(given, visit, stop, progress)
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
        finally:
            visit.finish(stop)

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

    def _picked(self, visit: Visit, given: dict) -> list[int]:
        return picks(given[self.parts.sheet["picks"]], names(visit.sheet))

    def _part(self, run: str) -> dict:
        return getattr(self.parts, run)


def _wire(page: gr.Blocks, parts: Parts, events: Events) -> None:
    """Which component calls what."""
    sheet, refine, compare, history = parts.sheet, parts.refine, parts.compare, parts.history
    form = [*parts.fields.values()]
    rows = [*form, compare["methods"]]
    costs = {
        "fn": events.cost,
        "inputs": {*rows},
        "outputs": [sheet["cost"], compare["cost"], *parts.slots.values(), parts.more],
    }
    page.load(events.arrive, None, None, **AT_ONCE).then(**costs, **AT_ONCE)
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
    past = (events.history, None, [history["gallery"], history["files"], history["facts"]])
    for run in running:
        run.then(*past, **AT_ONCE)
    news = [part["status"] for part in (sheet, refine, compare)]
    for name in ("sheet", "refine", "compare"):

        def stop(request: gr.Request, name: str = name) -> dict:
            return events.stop(name, request)

        getattr(parts, name)["stop"].click(stop, None, news, cancels=running, **AT_ONCE).then(*past, **AT_ONCE)
    sheet["picks"].change(events.refine_cost, sheet["picks"], refine["cost"], **AT_ONCE)
    refine["gallery"].select(events.look, None, [refine["slider"], refine["status"]], **AT_ONCE)
    history["gallery"].select(events.facts, None, history["facts"], **AT_ONCE)


def _run(parts: Parts, part: dict, asks: list, ask: Callable, run: Callable, inputs: list, outputs: list):
    """A button asks, which is answered at once; what it asks for, if nothing is wrong, waits for the device.

    Asked for again, it joins the queue again: the ticket of the earlier run is void by then.
    """
    ticket, news = part["ticket"], [part["status"], *parts.slots.values(), parts.more]
    gr.on(asks, ask, {*inputs}, [ticket, *news], **AT_ONCE)
    return ticket.change(
        *(run, {ticket, *inputs}, [*outputs, *news]),
        show_progress_on=part["status"],
        trigger_mode="multiple",
        **ON_DEVICE,
    )


def told(progress: gr.Progress, pictures: int) -> Callable[[float], None]:
    """Tells gradio's progress bar the share that is done."""
    return lambda share: progress(share, desc=f"Picture {min(int(share * pictures) + 1, pictures)} of {pictures}")


def shown(made: list[Kept], several: bool = False) -> list[tuple[str, str]]:
    """A gallery's pictures and captions."""
    return [(str(kept.path), wording.caption(n, kept.recipe, several)) for n, kept in enumerate(made, start=1)]


def choices(made: list[Kept], several: bool = False) -> list[tuple[str, str]]:
    """The pictures that can be picked: what the visitor reads, and their names."""
    return [(wording.caption(n, kept.recipe, several), kept.name) for n, kept in enumerate(made, start=1)]


def _at(made: list, index: object):
    """The one that a visitor selected, if it is there."""
    return made[index] if isinstance(index, int) and 0 <= index < len(made) else None


def names(made: list[Kept]) -> list[str]:
    return [kept.name for kept in made]
