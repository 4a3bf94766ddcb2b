"""How long the visits of pages last."""

import pytest

from lighttable import visit
from lighttable.visit import CLOSED_SECONDS, SILENT_SECONDS, Visits


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(visit.time, "monotonic", lambda: now[0])
    return now


def test_a_closed_page_has_an_hour_to_come_back(clock, tmp_path):
    visits = Visits(tmp_path)
    first = visits.arrive("first")
    first.folder.mkdir()
    clock[0] = 10 * CLOSED_SECONDS  # open all the time
    visits.leave("first")
    clock[0] += CLOSED_SECONDS - 1
    visits.arrive("second")
    assert visits.of("first") is first and first.folder.exists()  # it is back
    clock[0] += 2 * CLOSED_SECONDS
    visits.arrive("third")
    assert visits.of("first") is first
    visits.leave("first")
    clock[0] += CLOSED_SECONDS + 1
    visits.arrive("fourth")
    assert not first.folder.exists()
    with pytest.raises(ValueError, match="please reload it"):
        visits.of("first")


def test_a_silent_page_has_a_day(clock, tmp_path):
    visits = Visits(tmp_path)
    visits.arrive("first")
    clock[0] = SILENT_SECONDS - 1
    visits.arrive("second")
    visits.of("first")
    clock[0] += 2
    visits.arrive("third")
    visits.of("first")
    clock[0] += SILENT_SECONDS + 1
    visits.arrive("fourth")
    for name in ("first", "second", "third"):
        with pytest.raises(ValueError, match="please reload it"):
            visits.of(name)


def test_leaving_ends_what_goes_on_and_what_waits(tmp_path):
    visits = Visits(tmp_path)
    one = visits.arrive("one")
    stop = one.begin("sheet", one.ask("sheet"))
    waiting = one.ask("compare")
    visits.leave("one")
    assert stop.is_set() and one.begin("compare", waiting) is None
    visits.leave("nobody")


def test_who_arrives_again_ends_the_earlier_visit(tmp_path):
    visits = Visits(tmp_path)
    first = visits.arrive("one")
    first.folder.mkdir()
    stop = first.begin("sheet", first.ask("sheet"))
    assert visits.arrive("one") is not first
    assert stop.is_set() and not first.folder.exists()


def test_visits_are_so_many_and_have_names(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "MOST_VISITS", 2)
    visits = Visits(tmp_path)
    for name in ("first", "second"):
        visits.arrive(name)
        clock[0] += 1
    visits.of("first")
    visits.arrive("third")
    visits.of("first")
    with pytest.raises(ValueError, match="please reload it"):
        visits.of("second")
    with pytest.raises(ValueError, match="without a session"):
        visits.arrive(None)


def test_asking_again_ends_a_run_of_the_same_name_alone(tmp_path):
    one = Visits(tmp_path).arrive("one")
    stop = one.begin("sheet", one.ask("sheet"))
    refine = one.ask("refine")
    assert not stop.is_set()
    one.ask("sheet")
    assert stop.is_set()
    one.finish(stop)
    assert one.running is None and one.begin("refine", refine) is not None
