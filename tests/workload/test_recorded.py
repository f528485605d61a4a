"""A recorded log as a workload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arriero.core.errors import ConfigError
from arriero.observe.events import FORMAT, EventLog
from arriero.workload.recorded import is_log, read_log
from arriero.workload.workload import Arrival

DISPATCH = {"event": "dispatch", "request": "a", "instance": 0, "arrival_s": 7.5, "prompt_tokens": 20}
DISPATCH |= {"max_tokens": 100, "priority": 0}
FINISH = {"event": "finish", "request": "a", "instance": 0, "how": "stop", "num_output_tokens": 3}


def write(tmp_path: Path, *events: dict[str, Any], header: bool = True) -> Path:
    path = tmp_path / "events.jsonl"
    lines = [{"format": FORMAT}] * header + list(events)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_requests_arrive_as_they_did_and_want_what_they_got(tmp_path: Path) -> None:
    """Late binding and replays disturb neither: the arrival counts, and the first dispatch."""
    path = write(
        tmp_path,
        {"event": "instance_ready", "instance": 0},
        {**DISPATCH, "request": "b", "arrival_s": 9.0, "priority": -1},
        DISPATCH,
        {**DISPATCH, "request": "c", "arrival_s": 9.5},
        {**DISPATCH, "request": "d", "arrival_s": 9.75},
        {**DISPATCH, "request": "b", "arrival_s": 9.0, "prompt_tokens": 25, "instance": 1},
        FINISH,
        {**FINISH, "request": "b", "num_output_tokens": 100},
        {**FINISH, "request": "d", "how": "aborted", "num_output_tokens": 0},
        {**FINISH, "request": "from before"},
    )
    assert is_log(path)
    workload = read_log(path)
    assert workload.name == "events"
    assert workload.arrivals == [
        Arrival(0.0, 20, 3, max_tokens=100),
        Arrival(1.5, 20, 100, -1, max_tokens=100),
        Arrival(2.25, 20, 1, max_tokens=100),
    ]
    assert read_log(path, 1).arrivals == workload.arrivals[:1]


def test_the_last_run_counts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for number in (1, 2):
        events = EventLog(lambda: 0.0, path)
        for event in (DISPATCH, {**FINISH, "num_output_tokens": number}):
            events.emit(**{k: v for k, v in event.items()})  # type: ignore[arg-type]
        events.close()
    assert [a.output_tokens for a in read_log(path).arrivals] == [2]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({**DISPATCH, "prompt_tokens": "20"}, "line 2: prompt_tokens='20' is invalid: it must be a whole number, 1 or"),
        ({**DISPATCH, "prompt_tokens": 0}, "line 2: prompt_tokens=0"),
        ({**DISPATCH, "max_tokens": -1}, "line 2: max_tokens=-1"),
        ({**DISPATCH, "priority": None}, "line 2: priority=None is invalid: it must be a whole number"),
        ({**DISPATCH, "arrival_s": "now"}, "line 2: arrival_s='now' is invalid: it must be seconds"),
        ({**DISPATCH, "request": 7}, "line 2: request=7 is invalid: it must be a request's id"),
        ({"format": "arriero-events/9"}, "line 2: format='arriero-events/9' is invalid: it must be 'arriero-events/1'"),
    ],
)
def test_a_malformed_line_is_named_with_field_and_value(tmp_path: Path, event: dict[str, Any], message: str) -> None:
    path = write(tmp_path, event, FINISH)
    with pytest.raises(ConfigError) as caught:
        read_log(path)
    assert str(caught.value).startswith(f"log {path}, ")
    assert message in str(caught.value)


def test_a_wrong_number_of_output_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3: num_output_tokens=1\.5"):
        read_log(write(tmp_path, DISPATCH, {**FINISH, "num_output_tokens": 1.5}))


def test_no_header_no_json_no_requests_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: format=None is invalid: it must be 'arriero-events/1'"):
        read_log(write(tmp_path, DISPATCH, header=False))
    with pytest.raises(ConfigError, match="no request was dispatched and ended"):
        read_log(write(tmp_path, DISPATCH))
    path = write(tmp_path, DISPATCH)
    path.write_bytes(path.read_bytes() + b'{"event": "fin')
    with pytest.raises(ConfigError, match=r"line 3: b'\{\"event\": \"fin' is no event"):
        read_log(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_log(tmp_path / "none")
    assert not is_log(tmp_path / "none")
