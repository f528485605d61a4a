"""The event log: numbered, timed by the given clock, bounded in memory, whole in the file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero import __version__
from arriero.observe.events import FORMAT, EventLog


def log(path: Path | None = None, keep: int = 1000) -> EventLog:
    """A log whose clock shows 0, 1, 2, ..."""
    ticks = itertools.count()
    return EventLog(lambda: float(next(ticks)), path, keep)


def test_an_event_is_a_flat_record_with_number_time_and_name_first() -> None:
    events = log()
    events.emit("dispatch", request="r", instance=3)
    events.emit("finish", request="r")
    assert [list(e.items()) for e in events.recent(10)] == [
        [("seq", 1), ("time_s", 0.0), ("event", "dispatch"), ("request", "r"), ("instance", 3)],
        [("seq", 2), ("time_s", 1.0), ("event", "finish"), ("request", "r")],
    ]


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 40), st.integers(0, 40))
def test_recent_events_are_the_last_ones_after_a_number_oldest_first(
    num_events: int, keep: int, limit: int, after: int
) -> None:
    events = log(keep=keep)
    for _ in range(num_events):
        events.emit("tick")
    kept = range(max(0, num_events - keep) + 1, num_events + 1)
    wanted = [n for n in kept if n > after]
    assert [e["seq"] for e in events.recent(limit, after)] == wanted[max(0, len(wanted) - limit) :]


def test_the_file_has_every_event_as_a_line_at_once_though_memory_forgets(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = log(path, keep=2)
    for number in range(5):
        events.emit("tick", number=number)
        assert len(path.read_text().splitlines()) == number + 2
    assert len(events.recent(10)) == 2
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"format": FORMAT, "arriero": __version__}
    assert [(e["seq"], e["number"]) for e in lines] == [(n + 1, n) for n in range(5)]
    events.close()


def test_an_earlier_log_is_continued_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        events = log(path)
        events.emit("start")
        events.close()
    kinds = [next(iter(json.loads(line))) for line in path.read_text().splitlines()]
    assert kinds == ["format", "seq"] * 2


def test_after_close_events_go_to_memory_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = log(path)
    events.close()
    events.close()
    events.emit("late")
    assert len(path.read_text().splitlines()) == 1
    assert [e["event"] for e in events.recent(10)] == ["late"]


def test_a_log_without_a_file_can_be_closed() -> None:
    log().close()


def test_a_log_in_a_folder_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        log(tmp_path / "missing" / "events.jsonl")


def test_who_listens_hears_every_event_from_then_on() -> None:
    events = log()
    events.emit("before")
    heard: list[str] = []
    events.listen(lambda event: heard.append(event["event"]))
    events.emit("after")
    assert heard == ["after"]
