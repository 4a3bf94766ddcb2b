"""The page without a browser: its server, asked as a browser asks it."""

import json
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.recipe import Recipe

gr = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
serve = pytest.importorskip("lighttable.page").serve

PROMPT = '<img src=x onerror="alert(1)"> ring'


@pytest.fixture(scope="module")
def page(sd_table, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "unset")  # put back afterwards
        page = serve(sd_table, tmp_path_factory.mktemp("app") / "out", waiting=8, prevent_thread_lock=True, quiet=True)
        yield page
        page.close()


class Visitor:
    """A page that is open in some browser."""

    def __init__(self, page, name):
        self.page, self.name = page, name
        self.http = httpx.Client(base_url=f"{page.local_url}gradio_api", timeout=60)
        self.call("arrive")

    def body(self, function, values):
        """What a browser sends: values by the label of their component; the others are as they are on the page."""
        index = next(i for i, fn in self.page.fns.items() if fn.name == function)
        inputs = [(getattr(part, "label", None), getattr(part, "value", None)) for part in self.page.fns[index].inputs]
        data = [values.get(label, value) for label, value in inputs]
        return {"data": data, "fn_index": index, "session_hash": self.name}

    def join(self, function, **values):
        """Joins the queue for an event."""
        self.http.post("/queue/join", json=self.body(function, values)).raise_for_status()

    def listen(self):
        """The messages until the event is over."""
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line.removeprefix("data:"))
                    yield message
                    if message["msg"] in ("process_completed", "close_stream"):
                        return

    def call(self, function, **values):
        """All that an event says, as one text."""
        if not event(self.page, function).queue:
            return self.http.post("/run/predict", json=self.body(function, values)).raise_for_status().text
        self.join(function, **values)
        messages = list(self.listen())
        assert messages[-1]["success"], messages[-1]
        return json.dumps(messages)

    def get(self, path):
        return self.http.get(f"/file={path}")


def event(page, function):
    return next(fn for fn in page.fns.values() if fn.name == function)


def events(page):
    return event(page, "arrive").fn.__self__


def visit_of(page, visitor):
    """What the server keeps of a visitor."""
    return events(page).visits[visitor.name]


def test_from_the_first_visit_to_the_refined_picture(page, sd_table):
    visitor = Visitor(page, "first")
    assert "2 pictures, 8 network evaluations" in visitor.call("cost", Candidates=2, Steps=4)
    said = visitor.call("make_sheet", Prompt=PROMPT, Candidates=2, Steps=4, **{"Steps of a full render": 6})
    assert "2 of 2 pictures." in said and "seed 8" in said
    sheet = visit_of(page, visitor).sheet
    (alone,) = sd_table.make([Recipe(PROMPT, 8, "solver", 4, 6, solver=sd_table.solver)], threading.Event())
    served = [part["image"]["path"] for part in _gallery(said)]
    with Image.open(BytesIO(visitor.get(served[1]).content)) as image:
        assert image.convert("RGB").tobytes() == alone.image.tobytes()
        assert image.text["proofsheet:prompt"] == PROMPT and image.text["proofsheet:seed"] == "8"

    said = visitor.call("refine", Picked=[sheet[1].name])
    assert "took 117% of 2 full renders." in said  # 2 of 4 steps and 1 of 6, for 2 of 6
    (refined,) = visit_of(page, visitor).refined
    assert refined.preview == sheet[1] and refined.full.recipe == sheet[1].recipe.full
    assert "Seed 8: Learned solver, 4 steps" in visitor.call("history")


def test_a_pick_is_of_the_sheet_that_it_was_made_on(page):
    """Another sheet may have been asked for before the refinement's turn came."""
    visitor = Visitor(page, "stale")
    form = {"Prompt": PROMPT, "Candidates": 1, "Steps": 2, "Steps of a full render": 2}
    visitor.call("make_sheet", **form)
    (first,) = visit_of(page, visitor).sheet
    visitor.call("make_sheet", **form)
    assert "not on the sheet any more" in visitor.call("refine", Picked=[first.name])
    assert not visit_of(page, visitor).refined


def _gallery(said):
    """Pictures of the last full answer that has some."""
    found = []
    for message in json.loads(said):
        for value in (message.get("output") or {}).get("data") or ():
            value = value.get("value", value) if isinstance(value, dict) else value
            if isinstance(value, list) and value and isinstance(value[0], dict) and "image" in value[0]:
                found = value
    return found


def test_errors_are_sentences_next_to_their_field(page):
    visitor = Visitor(page, "errors")
    for values, message in (
        ({"Prompt": ""}, "Write a prompt"),
        ({"Prompt": "x" * 10_000}, "10,000 characters"),
        ({"Prompt": "x", "Candidates": 500}, "Candidates 500: expected a whole number"),
        ({"Prompt": "x", "First seed": -1}, "The first seed -1"),
        ({"Prompt": "x", "Width in pixels": 17}, "needs multiples of 2"),
    ):
        said = visitor.call("make_sheet", **values)
        assert message in said and 'role=\\"alert\\"' in said and "Traceback" not in said
    assert "Make a sheet first" in visitor.call("refine", Picked=[])
    assert "Choose 2 to 4 methods" in visitor.call("compare", Prompt="x", Methods=["few"])


def test_what_is_wrong_is_said_before_the_queue(page):
    visitor = Visitor(page, "asker")
    functions = ("ask_for_sheet", "ask_to_refine", "ask_to_compare")
    assert not any(event(page, function).queue for function in functions)
    assert "Write a prompt" in visitor.call("ask_for_sheet", Prompt="")
    assert "Make a sheet first" in visitor.call("ask_to_refine", Picked=[])
    assert "Choose 2 to 4 methods" in visitor.call("ask_to_compare", Prompt="x", Methods=["few"])
    stranger = Visitor(page, "stranger")
    stranger.name = "unknown"
    assert "please reload it" in stranger.call("ask_for_sheet", Prompt="x")


def test_a_run_begins_where_nothing_is_wrong(page):
    visitor, made = Visitor(page, "right"), events(page)

    def asked(prompt):
        body = visitor.body("ask_for_sheet", {"Prompt": prompt})
        answers = visitor.http.post("/run/predict", json=body).raise_for_status().json()["data"]
        outputs = event(page, "ask_for_sheet").outputs
        return answers[outputs.index(made.parts.sheet["asked"])]

    names = [asked("x"), asked("x")]
    assert len(set(names)) == 2 and all(isinstance(name, str) and name for name in names)
    assert asked("") == {"__type__": "update"}  # as it was


def test_costs_of_an_empty_prompt_leave_the_message_about_it(page):
    made = events(page)
    given = {component: component.value for component in made.parts.fields.values()}
    given[made.parts.compare["methods"]] = ["few", "full"]
    assert made.parts.slots["prompts"] not in made.cost(given)
    given[made.parts.fields["prompts"]] = "a red circle"
    assert made.cost(given)[made.parts.slots["prompts"]]["visible"] is False


def test_what_was_not_expected_is_a_sentence_too(page, sd_table, monkeypatch):
    def broken(*args):
        raise KeyError("<secret>")

    visitor = Visitor(page, "broken")
    monkeypatch.setattr(sd_table, "_timed", broken)
    said = visitor.call("make_sheet", Prompt="x")
    assert "Something went wrong" in said and "secret" not in said
    monkeypatch.undo()
    assert "1 of 1 picture." in visitor.call("make_sheet", Prompt="x", Candidates=1)


def test_a_comparison_and_the_history(page):
    visitor = Visitor(page, "compare")
    said = visitor.call("compare", Prompt="x", Candidates=2, Methods=["few", "solver"])
    assert "4 of 4 pictures." in said and "Plain few steps" in said
    assert [kept.recipe.method for kept in visit_of(page, visitor).history] == ["solver"] * 2 + ["few"] * 2


def test_a_stop_in_the_middle_keeps_what_is_finished(page):
    visitor, other = Visitor(page, "stopper"), Visitor(page, "patient")
    visitor.join("make_sheet", Prompt="x", Candidates=64, Steps=8)
    for message in visitor.listen():
        if message["msg"] == "process_generating" and visit_of(page, visitor).sheet:
            visit_of(page, visitor).stop.set()
    kept = len(visit_of(page, visitor).sheet)
    assert "Stopped" in json.dumps(message) and 1 <= kept < 64
    assert "1 of 1 picture." in other.call("make_sheet", Prompt="x", Candidates=1)  # the device is free


def test_a_closed_page_frees_the_device(page):
    visitor = Visitor(page, "closed")
    visit = visit_of(page, visitor)
    visitor.join("make_sheet", Prompt="x", Candidates=64, Steps=8)
    for _ in visitor.listen():
        if visit.sheet and visitor.name in events(page).visits:
            events(page).leave(gr.Request(session_hash=visitor.name))
    assert visit.stop.is_set() and len(visit.sheet) < 64 and visitor.name not in events(page).visits


def test_visitors_see_only_their_own(page):
    one, other = Visitor(page, "one"), Visitor(page, "other")
    one.call("make_sheet", Prompt="a private picture", Candidates=1)
    assert "private" not in other.call("history") and not visit_of(page, other).history
    assert "Make a sheet first" in other.call("refine", Picked=[])


def test_nothing_outside_of_the_output_folder_is_served(page, models, tmp_path):
    visitor = Visitor(page, "thief")
    (tmp_path / "file.txt").write_text("classified")
    inside, around = models / "sd" / "model_index.json", f"{events(page).output}/../../../file.txt"
    for path in (tmp_path / "file.txt", inside, "app.py", "README.md", "/etc/passwd", around):
        answer = visitor.get(path)
        assert answer.status_code in (403, 404) and len(answer.text) < 200 and "classified" not in answer.text


@pytest.mark.parametrize("name", ["evil.html", "evil.svg", "../../evil.py"])
def test_what_is_uploaded_is_neither_shown_nor_run(name, page, tmp_path):
    visitor = Visitor(page, "smuggler")
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (path,) = visitor.http.post("/upload", files={"files": (name, script)}).raise_for_status().json()
    assert events(page).output.parent in Path(path).resolve().parents
    answer = visitor.get(path)
    assert answer.headers["content-disposition"].startswith("attachment")  # a browser saves it
    large = visitor.http.post("/upload", files={"files": (name, b"x" * 2000)})
    assert large.status_code == 413


def test_the_queue_has_a_limit(sd_table, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "unset")
        page = serve(sd_table, tmp_path, waiting=1, prevent_thread_lock=True, quiet=True)
    visitors = [Visitor(page, f"visitor {n}") for n in range(3)]
    asked, answers = {"Prompt": "x", "Candidates": 1}, []
    with sd_table._turn(threading.Event()):  # the device is taken
        for visitor in visitors:
            answers.append(visitor.http.post("/queue/join", json=visitor.body("make_sheet", asked)))
            while len(answers) == 1 and len(page._queue):  # the first of them leaves the queue, for the device
                time.sleep(0.05)
        told = visitors[2].call("ask_for_sheet", **asked)
        for visitor in visitors:
            visit_of(page, visitor).stop.set()
    page.close()
    assert "queue for the device is full (1 run)" in told
    assert [answer.status_code for answer in answers] == [200, 200, 503]
    assert "Queue is full" in answers[2].text


def test_memory_is_named(page, sd_table, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sd_table, "_timed", full)
    assert "too little memory" in Visitor(page, "memory").call("make_sheet", Prompt="x")
