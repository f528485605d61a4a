"""Histories: each request's events, bounded in every way; and events in words."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.core.config import HistoryConfig
from arriero.observe.events import EventLog
from arriero.observe.histories import Histories
from arriero.observe.telling import tell


def followed(**config: int) -> tuple[EventLog, Histories]:
    events, histories = EventLog(lambda: 0.0), Histories(HistoryConfig(**config))
    events.listen(histories.add)
    return events, histories


def names(histories: Histories, request: str) -> list[str]:
    return [e["event"] for e in histories.get(request).events]


def test_a_request_has_its_own_events_in_order_also_after_its_end() -> None:
    events, histories = followed()
    events.emit("instance_ready", instance=0)
    events.emit("queue", request="a", client_id="cmpl-a")
    events.emit("dispatch", request="b", client_id="cmpl-b")
    events.emit("dispatch", request="a", client_id="cmpl-a")
    events.emit("finish", request="a")
    events.emit("migration", request_id="a")  # the one that was under way ends after it
    assert names(histories, "a") == ["queue", "dispatch", "finish", "migration"]
    assert names(histories, "b") == ["dispatch"]
    assert histories.client_ids() == {"a": "cmpl-a", "b": "cmpl-b"}
    assert [histories.get(r).has_ended for r in "ab"] == [True, False]


def test_only_the_last_ended_requests_are_remembered_and_all_live_ones() -> None:
    events, histories = followed(ended_requests=2)
    events.emit("dispatch", request="live")
    for number in range(5):
        events.emit("dispatch", request=f"r{number}")
        events.emit("finish", request=f"r{number}")
    assert set(histories.client_ids()) == {"live", "r3", "r4"}
    with pytest.raises(KeyError):
        histories.get("r2")
    events.emit("migration", request_id="r2")
    assert "r2" not in histories.client_ids(), "a late event does not bring it back, for ever"


def test_a_request_with_very_many_events_keeps_the_first_and_the_last() -> None:
    events, histories = followed(events_per_request=10)
    events.emit("dispatch", request="a")
    for number in range(100):
        events.emit("migration", request_id="a", number=number)
    history = histories.get("a")
    assert [e.get("number") for e in history.events] == [None, 0, 1, 2, 94, 95, 96, 97, 98, 99]
    assert history.num_left_out == 91


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
def test_however_few_events_are_kept_the_last_one_is(keep: int) -> None:
    events, histories = followed(events_per_request=keep)
    for number in range(20):
        events.emit("dispatch", request="a", number=number)
    assert len(histories.get("a").events) == keep
    assert histories.get("a").events[-1]["number"] == 19


MOVE = {
    "event": "migration",
    "source": 0,
    "destination": 1,
    "mode": "live",
    "cause": "freeness 2.0 at 0, 40.0 at 1",
    "ok": True,
    "reason": "",
    "num_bytes": 3 << 20,
    "num_stages": 3,
    "total_s": 0.25,
}


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "reject", "reason": "too many wait"}, "refused: too many wait"),
        (
            {"event": "queue", "num_queued": 3},
            "waits for an instance, in a line of 3: none can start it now",
        ),
        (
            {"event": "dispatch", "instance": 1, "reason": "freeness: freeness 9.0"},
            "goes to instance 1 (freeness: freeness 9.0)",
        ),
        (
            {
                "event": "dispatch",
                "instance": 1,
                "reason": "freeness: freeness 9.0",
                "alternatives": [
                    {"instance": 0, "freeness": None, "num_outstanding": 4},
                    {"instance": 1, "freeness": 9.0, "num_outstanding": 2},
                    {"instance": 2, "freeness": 3.25, "num_outstanding": 1},
                ],
            },
            "goes to instance 1 (freeness: freeness 9.0), not to 0 (freeness -, 4 requests), "
            "2 (freeness 3.2, 1 requests)",
        ),
        (
            {"event": "first_token", "instance": 1, "ttft_s": 0.5},
            "first token from instance 1, 0.500 s after it arrived",
        ),
        (
            {"event": "preempt", "instance": 1},
            "preempted: instance 1 has taken its KV blocks, and will prefill it again",
        ),
        (
            {
                "event": "preempt",
                "instance": 1,
                "avoidable": True,
                "smallest_blocks": 3,
                "roomiest": 0,
                "free_blocks": 9,
            },
            "preempted: instance 1 has taken its KV blocks, and will prefill it again; a request of 3 blocks could "
            "have moved from there to instance 0, where 9 were free",
        ),
        (
            MOVE,
            "moved from instance 0 to 1, live (freeness 2.0 at 0, 40.0 at 1): 3.0 MiB in 3 stages, 250 ms",
        ),
        (
            {**MOVE, "num_bytes": 0, "num_stages": 0, "cause": "on demand"},
            "moved from instance 0 to 1, live (on demand): no copy, 250 ms",
        ),
        (
            {**MOVE, "ok": False, "reason": "destination refused: full"},
            "was not moved from instance 0 to 1, live (freeness 2.0 at 0, 40.0 at 1): destination refused: full",
        ),
        (
            {**MOVE, "source": None, "num_bytes": 0, "cause": "instance lost"},
            "moved to instance 1, from its tokens (instance lost): no copy, 250 ms",
        ),
        (
            {"event": "resume", "instance": 1, "pause_s": 0.031},
            "goes on at instance 1: its stream was silent for 31 ms",
        ),
        ({"event": "finish", "how": "length", "num_output_tokens": 7}, "ended (length) with 7 tokens"),
        ({"event": "sang_a_song"}, "sang a song"),
    ],
)
def test_an_event_is_told_in_a_line(event: dict[str, Any], words: str) -> None:
    assert tell(event) == words
