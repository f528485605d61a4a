"""What counts as whole, truncated, failed or wrong; and how long a fault was felt."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.bench.client import Reply
from arriero.chaos.record import kill_rows
from arriero.chaos.scoreboard import Outcome, Struck, Verdict, failed_after, judge, recovery_s, row, upright


def reply(*tokens: int, finish: str | None = "length", complete: bool = True, error: str | None = None) -> Reply:
    """A streamed answer as the client has taken it in."""
    found = Reply()
    for number, token in enumerate(tokens):
        last = number == len(tokens) - 1
        choice: dict[str, Any] = {"index": 0, "text": f" {token}", "token_ids": [token]}
        found.take({"id": "r", "choices": [{**choice, "finish_reason": finish if last else None}]}, float(number))
    found.is_complete, found.error = complete, error
    return found


BROKEN = "ClientPayloadError: Response payload is not completed"


@pytest.mark.parametrize(
    ("came", "verdict"),
    [
        (reply(1, 2, 3), Verdict.WHOLE),
        (reply(1, 2, finish=None, complete=False), Verdict.TRUNCATED),
        (reply(1, 2, finish=None, complete=False, error=BROKEN), Verdict.TRUNCATED),
        (reply(1, 2, finish=None, error="{'message': 'engine died'}"), Verdict.ERROR),
        (reply(1, 2, finish="error"), Verdict.ERROR),
        (reply(error="status 503: no worker", complete=False), Verdict.REFUSED),
        (reply(error="ClientConnectorError: refused", complete=False), Verdict.REFUSED),
        (reply(1, 1, 2, 3), Verdict.WRONG),  # doubled
        (reply(1, 3), Verdict.WRONG),  # missing
        (reply(1, 2), Verdict.WRONG),  # it says that it is whole, and is not
        (reply(1, 9, finish=None, complete=False, error=BROKEN), Verdict.WRONG),  # the worst counts
    ],
)
def test_a_stream_is_judged_by_its_end_and_by_its_reference(came: Reply, verdict: Verdict) -> None:
    assert judge(came, reply(1, 2, 3))[0] is verdict


def test_a_stream_that_shows_nothing_any_more_has_hung() -> None:
    assert judge(reply(1, 2, finish=None, complete=False), reply(1, 2, 3), hung=True)[0] is Verdict.HUNG


def outcome(
    start: float, end: float, *, verdict: Verdict = Verdict.WHOLE, arrivals: tuple[float, ...] | None = None
) -> Outcome:
    times = tuple(start + 0.1 * i for i in range(1, int((end - start) * 10) + 1)) if arrivals is None else arrivals
    return Outcome(
        case=0,
        kind="completion",
        started_s=start,
        ended_s=end,
        verdict=verdict,
        detail=None,
        num_tokens=len(times),
        arrivals_s=times,
    )


def test_a_fault_is_felt_as_long_as_the_silence_of_a_stream_that_lives_through_it() -> None:
    """One more token was on its way to the client when its backend died."""
    disturbed = outcome(0.0, 9.0, arrivals=(1.0, 2.0, 5.05, 7.0, 7.1, 8.9))
    assert recovery_s(5.0, 8.0, [disturbed, outcome(0.0, 9.0)]) == pytest.approx(1.95)


def test_a_fault_is_felt_until_the_last_stream_that_it_ended_and_the_last_request_that_failed_after() -> None:
    cut = outcome(0.0, 5.5, verdict=Verdict.TRUNCATED)
    refused = outcome(6.0, 6.2, verdict=Verdict.REFUSED, arrivals=())
    assert recovery_s(5.0, 9.0, [cut]) == pytest.approx(0.5)
    assert recovery_s(5.0, 9.0, [cut, refused]) == pytest.approx(1.2)
    assert recovery_s(5.0, 5.8, [cut, refused]) == pytest.approx(0.5)  # the next fault's


def test_requests_that_came_after_the_fault_and_failed_are_counted_apart() -> None:
    faults = [
        Struck(action="kill", target="0", at_s=5.0),
        Struck(action="drain", target="1", at_s=6.1, skipped="nobody there"),
    ]
    during = outcome(4.0, 6.0, verdict=Verdict.TRUNCATED)
    after = outcome(6.0, 6.2, verdict=Verdict.REFUSED, arrivals=())
    assert failed_after(faults, [during, after, outcome(7.0, 8.0)]) == 1


def test_the_scoreboard_has_a_column_for_each_system() -> None:
    faults = [Struck(action="kill", target="0", at_s=0.5)]
    rows = [row(name, faults, [outcome(0.0, 1.0)]) for name in ("one", "other")]
    shown = {line[""]: (line["one"], line["other"]) for line in upright(rows)}
    assert shown["faults"] == ("kill 1", "kill 1")
    assert shown["whole"] == (1, 1)
    assert upright([]) == []


def test_kills_are_told_apart_by_what_was_left() -> None:
    """A silence until an engine has started anew is no fault of the replay."""

    def kill(num_up: int, felt_s: float, detection_s: float | None) -> dict[str, object]:
        return Struck(
            action="kill", target="0", at_s=1.0, num_up=num_up, felt_s=felt_s, detection_s=detection_s
        ).as_dict()

    faults = [kill(2, 0.2, 0.01), kill(1, 20.0, 0.03), kill(2, 0.4, None)]
    rows = kill_rows([{"faults": faults}])
    assert [(r["instances left"], r["kills"], r["known after, max s"], r["felt max s"]) for r in rows] == [
        (1, 2, 0.01, 0.4),
        (0, 1, 0.03, 20.0),
    ]
