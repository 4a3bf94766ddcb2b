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

ASKS = {"make_sheet": "ask_for_sheet", "refine": "ask_to_refine", "compare": "ask_to_compare"}
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

    def answers(self, function, **values):
        """What an event that does not wait says, and to which components."""
        answer = self.http.post("/run/predict", json=self.body(function, values)).raise_for_status()
        return dict(zip(event(self.page, function).outputs, answer.json()["data"], strict=True)), answer.text

    def ask(self, function, **values):
        """The ticket for a run, None where something is wrong, and all that is said."""
        answers, text = self.answers(ASKS[function], **values)
        ticket = next(answer for part, answer in answers.items() if getattr(part, "label", None) == "Ticket")
        return (ticket if isinstance(ticket, str) else None), text

    def join(self, function, **values):
        """Joins the queue for a run that was asked for."""
        ticket, _ = self.ask(function, **values)
        self.http.post("/queue/join", json=self.body(function, values | {"Ticket": ticket})).raise_for_status()

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
        """All that an event says, as one text; of a run, what is wrong with it or all that it yields."""
        if function not in ASKS:
            return self.answers(function, **values)[1]
        ticket, text = self.ask(function, **values)
        return text if ticket is None else self.run(function, Ticket=ticket, **values)

    def run(self, function, **values):
        """All that a run yields, with or without a ticket."""
        self.http.post("/queue/join", json=self.body(function, values)).raise_for_status()
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
    return events(page).visits.of(visitor.name)


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
    assert "took 117% of the work of 2 full renders." in said  # 2 of 4 steps and 1 of 6, for 2 of 6
    (refined,) = visit_of(page, visitor).refined
    assert refined.preview == sheet[1] and refined.full.recipe == sheet[1].recipe.full
    assert "Seed 8: Learned solver, 4 steps" in visitor.call("history")


def test_pictures_of_several_prompts_are_told_apart(page):
    """By the beginning of their prompt: under the picture, where it is picked, and refined."""
    visitor, long = Visitor(page, "several"), "a blue cube " * 20
    form = {"Prompt": f"a red ring\n{long}", "Candidates": 1, "Steps": 2, "Steps of a full render": 2}
    said = visitor.call("make_sheet", **form)
    for title in ("1 · seed 7 · a red ring", "2 · seed 7 · a blue cube"):
        assert said.count(json.dumps(title)[1:-1]) >= 2
    said = visitor.call("refine", Picked=[kept.name for kept in visit_of(page, visitor).sheet])
    for title in ("Full render, 2 steps · a red ring", "Full render, 2 steps · a blue cube"):
        assert json.dumps(title)[1:-1] in said
    assert "Learned solver, 2 steps · a red ring" in visitor.call("history")
    assert long.strip() not in said


def test_a_page_that_the_server_has_forgotten_is_told_to_reload(page):
    visitor = Visitor(page, "forgotten")
    visitor.call("make_sheet", Prompt=PROMPT, Candidates=1, Steps=2)
    events(page).visits._forget("forgotten")
    for function in ("stop", "history", "make_sheet"):
        assert "please reload it" in visitor.call(function, Prompt=PROMPT, Candidates=1, Steps=2)
    assert "please reload it" in visitor.run("make_sheet", Prompt=PROMPT, Ticket="1")


def test_a_pick_is_of_the_sheet_that_it_was_made_on(page):
    """Another sheet may have been asked for before the refinement's turn came."""
    visitor = Visitor(page, "stale")
    form = {"Prompt": PROMPT, "Candidates": 1, "Steps": 2, "Steps of a full render": 2}
    visitor.call("make_sheet", **form)
    (first,) = visit_of(page, visitor).sheet
    visitor.call("make_sheet", **form)
    assert "not on the sheet any more" in visitor.call("refine", Picked=[first.name])
    ticket, _ = visitor.ask("refine", Picked=[visit_of(page, visitor).sheet[0].name])
    assert "not on the sheet any more" in visitor.run("refine", Picked=[first.name], Ticket=ticket)
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
    assert not any(event(page, function).queue for function in ASKS.values())
    assert "Write a prompt" in visitor.ask("make_sheet", Prompt="")[1]
    assert "Make a sheet first" in visitor.ask("refine", Picked=[])[1]
    assert "Choose 2 to 4 methods" in visitor.ask("compare", Prompt="x", Methods=["few"])[1]
    stranger = Visitor(page, "stranger")
    stranger.name = "unknown"
    ticket, said = stranger.ask("make_sheet", Prompt="x")
    assert ticket is None and "please reload it" in said


def test_a_new_ticket_begins_its_run(page):
    parts = events(page).parts
    for part, function in ((parts.sheet, "make_sheet"), (parts.refine, "refine"), (parts.compare, "compare")):
        assert event(page, function).targets == [(part["ticket"]._id, "change")]
        assert part["ticket"] in event(page, ASKS[function]).outputs
    visitor = Visitor(page, "right")
    tickets = [visitor.ask("make_sheet", Prompt="x")[0] for _ in range(2)]
    assert len({*tickets}) == 2 and None not in tickets


def test_a_ticket_is_for_one_run(page):
    """Neither a run that was asked for again, nor one that was stopped before its turn, nor a second one is made."""
    visitor = Visitor(page, "collector")
    form = {"Prompt": "x", "Candidates": 1, "Steps": 2}
    first, second = (visitor.ask("make_sheet", **form)[0] for _ in range(2))
    for ticket in (first, None, "", "forged"):
        assert "picture." not in visitor.run("make_sheet", **form, Ticket=ticket)
    assert "1 of 1 picture." in visitor.run("make_sheet", **form, Ticket=second)
    assert "picture." not in visitor.run("make_sheet", **form, Ticket=second)
    third, _ = visitor.ask("make_sheet", **form)
    assert "Stopped." in visitor.call("stop") and "Nothing is running." in visitor.call("stop")
    assert "picture." not in visitor.run("make_sheet", **form, Ticket=third)
    assert len(visit_of(page, visitor).history) == 1


def test_who_asks_again_gets_the_new_run(page):
    visitor, ticket = Visitor(page, "impatient"), None
    visitor.join("make_sheet", Prompt="x", Candidates=64, Steps=8)
    for message in visitor.listen():
        if ticket is None and message["msg"] == "process_generating" and visit_of(page, visitor).sheet:
            ticket, _ = visitor.ask("make_sheet", Prompt="y", Candidates=1)
    assert "Stopped." in json.dumps(message) and 1 <= len(visit_of(page, visitor).sheet) < 64
    assert "1 of 1 picture." in visitor.run("make_sheet", Prompt="y", Candidates=1, Ticket=ticket)
    assert [kept.recipe.prompt for kept in visit_of(page, visitor).sheet] == ["y"]


def test_costs_of_several_prompts_leave_what_a_comparison_said(page):
    made = events(page)
    given = {component: component.value for component in made.parts.fields.values()}
    given[made.parts.fields["prompts"]] = "a red circle\na blue one"
    given[made.parts.compare["methods"]] = ["few", "full"]
    told = made.cost(given)
    assert made.parts.slots["prompts"] not in told and made.parts.slots["picks"] not in told
    assert "leave one line" in told[made.parts.compare["cost"]] and "picture" in told[made.parts.sheet["cost"]]


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
            visit_of(page, visitor).halt()
    kept = len(visit_of(page, visitor).sheet)
    assert "Stopped" in json.dumps(message) and 1 <= kept < 64
    assert "1 of 1 picture." in other.call("make_sheet", Prompt="x", Candidates=1)  # the device is free


def test_a_closed_page_frees_the_device(page):
    visitor = Visitor(page, "closed")
    visit, messages = visit_of(page, visitor), []
    visitor.join("make_sheet", Prompt="x", Candidates=64, Steps=8)
    for message in visitor.listen():
        messages.append(message)
        if visit.sheet:
            events(page).leave(gr.Request(session_hash=visitor.name))
    assert "Stopped." in json.dumps(messages[-1]) and len(visit.sheet) < 64 and visit.running is None


def test_visitors_see_only_their_own(page):
    one, other = Visitor(page, "one"), Visitor(page, "other")
    one.call("make_sheet", Prompt="a private picture", Candidates=1)
    assert "private" not in other.call("history") and not visit_of(page, other).history
    assert "Make a sheet first" in other.call("refine", Picked=[])


def test_nothing_outside_of_the_output_folder_is_served(page, models, tmp_path):
    visitor = Visitor(page, "thief")
    (tmp_path / "file.txt").write_text("classified")
    inside, around = models / "sd" / "model_index.json", f"{events(page).visits.folder}/../../../file.txt"
    for path in (tmp_path / "file.txt", inside, "app.py", "README.md", "/etc/passwd", around):
        answer = visitor.get(path)
        assert answer.status_code in (403, 404) and len(answer.text) < 200 and "classified" not in answer.text


@pytest.mark.parametrize("name", ["evil.html", "evil.svg", "../../evil.py"])
def test_what_is_uploaded_is_neither_shown_nor_run(name, page, tmp_path):
    visitor = Visitor(page, "smuggler")
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (path,) = visitor.http.post("/upload", files={"files": (name, script)}).raise_for_status().json()
    assert events(page).visits.folder.parent in Path(path).resolve().parents
    answer = visitor.get(path)
    assert answer.headers["content-disposition"].startswith("attachment")  # a browser saves it
    large = visitor.http.post("/upload", files={"files": (name, b"x" * 2000)})
    assert large.status_code == 413


def test_the_queue_has_a_limit(sd_table, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "unset")
        page = serve(sd_table, tmp_path, waiting=1, prevent_thread_lock=True, quiet=True)
    visitors = [Visitor(page, f"visitor {n}") for n in range(3)]
    form, answers = {"Prompt": "x", "Candidates": 1}, []
    tickets = [visitor.ask("make_sheet", **form)[0] for visitor in visitors]
    with sd_table._turn(threading.Event()):  # the device is taken
        for visitor, ticket in zip(visitors, tickets, strict=True):
            body = visitor.body("make_sheet", form | {"Ticket": ticket})
            answers.append(visitor.http.post("/queue/join", json=body))
            deadline = time.monotonic() + 60
            while len(answers) == 1 and len(page._queue):  # the first of them leaves the queue, for the device
                assert time.monotonic() < deadline
                time.sleep(0.05)
        ticket, told = visitors[2].ask("make_sheet", **form)
        for visitor in visitors:
            visit_of(page, visitor).halt()
    page.close()
    assert ticket is None and "queue for the device is full (1 run)" in told
    assert [answer.status_code for answer in answers] == [200, 200, 503]
    assert "Queue is full" in answers[2].text


def test_memory_is_named(page, sd_table, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sd_table, "_timed", full)
    assert "too little memory" in Visitor(page, "memory").call("make_sheet", Prompt="x")
