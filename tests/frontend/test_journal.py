"""The journal of a stream: every event has its number, and what the client has not taken is kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core.errors import GoneError
from arriero.frontend.journal import Journal

repeatable = settings(deadline=None, derandomize=True, database=None)


def journal_of(*events: bytes) -> Journal:
    journal = Journal()
    for event in events:
        journal.append(event)
    return journal


def test_events_are_numbered_from_one() -> None:
    journal = journal_of(b"data: a\n\n", b"data: b\n\n")
    assert journal.after(0) == [b"id: 1\ndata: a\n\n", b"id: 2\ndata: b\n\n"]
    assert journal.after(1) == [b"id: 2\ndata: b\n\n"]
    assert journal.after(2) == []
    assert journal.last == 2


def test_only_what_the_client_has_taken_is_dropped_the_oldest_first() -> None:
    journal = journal_of(b"a", b"b", b"c")
    assert journal.drop_oldest() == 0
    journal.taken(2)
    assert [journal.drop_oldest() > 0 for _ in range(3)] == [True, True, False]
    assert journal.after(2) == [b"id: 3\nc"]


def test_a_client_that_goes_back_takes_its_place_there() -> None:
    """What it has not got is kept from then on, though an earlier connection had it."""
    journal = journal_of(b"a", b"b", b"c")
    journal.taken(3)
    journal.taken(1)
    assert journal.drop_oldest() > 0
    assert journal.drop_oldest() == 0


def test_a_client_that_is_too_far_behind_is_told_what_is_missing() -> None:
    journal = journal_of(b"a", b"b", b"c")
    journal.taken(2)
    journal.drop_oldest()
    journal.drop_oldest()
    with pytest.raises(GoneError, match="events 1 to 2 are not kept any more, only those from 3 on"):
        journal.after(0)


@repeatable
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=9), st.just("take"), st.just("drop"))))
def test_the_bytes_add_up_and_no_number_is_lost(actions: list[bytes | str]) -> None:
    journal, dropped = Journal(), 0
    for action in actions:
        if isinstance(action, bytes):
            journal.append(action)
        elif action == "take":
            journal.taken(journal.last)
        else:
            dropped += journal.drop_oldest() > 0
    kept = journal.after(dropped)
    assert journal.num_bytes == sum(map(len, kept))
    assert [e.partition(b"\n")[0] for e in kept] == [b"id: %d" % n for n in range(dropped + 1, journal.last + 1)]
