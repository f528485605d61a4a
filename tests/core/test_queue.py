"""The global queue: who is next, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from arriero.core.queue import RequestQueue
from arriero.core.types import Dispatchable

entries = st.lists(st.tuples(st.booleans(), st.integers(-2, 2), st.integers(1, 50)), max_size=12)


def facts(name: int, is_replay: bool, priority: int, tokens: int) -> Dispatchable:
    return Dispatchable(
        request_id=f"r{name}", num_prompt_tokens=tokens, max_tokens=1, priority=priority, is_replay=is_replay
    )


@given(entries, st.data())
def test_replays_come_first_then_by_priority_then_by_arrival(
    arrivals: list[tuple[bool, int, int]], data: st.DataObject
) -> None:
    queue = RequestQueue()
    waiting = [facts(n, *a) for n, a in enumerate(arrivals)]
    for n, request in enumerate(waiting):
        queue.push(request, float(n))
    for request in data.draw(st.lists(st.sampled_from(waiting), unique=True)) if waiting else []:
        assert queue.remove(request.request_id)
        assert not queue.remove(request.request_id)
        waiting.remove(request)
    order = sorted(waiting, key=lambda r: (not r.is_replay, r.priority, int(r.request_id[1:])))
    assert list(queue.first(100)) == order
    assert list(queue.first(2)) == order[:2]
    assert queue.demand() == (len(waiting), sum(r.num_prompt_tokens + 1 for r in waiting))
    assert len(queue) == len(waiting)
    assert queue.older_than(3.0) == [r for r in order if int(r.request_id[1:]) < 3]


@given(st.lists(st.tuples(st.integers(0, 1), st.one_of(st.none(), st.floats(0.1, 20))), max_size=12))
def test_among_equals_the_earliest_deadline_is_first_and_no_target_is_the_usual_one(
    arrivals: list[tuple[int, float | None]],
) -> None:
    queue = RequestQueue(5.0)
    waiting = []
    for n, (priority, target_s) in enumerate(arrivals):
        request = replace(facts(n, False, priority, 1), ttft_target_s=target_s)
        queue.push(request, float(n))
        waiting.append((priority, n + (5.0 if target_s is None else target_s), n, request))
    assert list(queue.first(100)) == [request for *_, request in sorted(waiting, key=lambda w: w[:3])]


def test_the_hurried_overtake_those_without_a_target_but_not_for_ever() -> None:
    queue = RequestQueue(5.0)
    queue.push(facts(0, False, 0, 1), 0.0)
    for n in (3, 5):
        queue.push(replace(facts(n, False, 0, 1), ttft_target_s=1.0), float(n))
    assert [r.request_id for r in queue.first(3)] == ["r3", "r0", "r5"]
    queue.push(replace(facts(6, False, -1, 1), ttft_target_s=60.0), 6.0)
    assert next(queue.first(1)).request_id == "r6", "priority goes before any target"


def test_a_short_prompt_overtakes_a_long_one_unless_that_has_waited_for_what_it_is_longer() -> None:
    """10 ms a token: a prompt of 1,000 tokens that comes at 0 is due with one of 100 that comes at 9."""
    queue = RequestQueue(5.0, 0.01)
    queue.push(facts(0, False, 0, 1000), 0.0)
    for n in (8, 10):
        queue.push(facts(n, False, 0, 100), float(n))
    assert [r.request_id for r in queue.first(3)] == ["r8", "r0", "r10"]
    queue.push(replace(facts(11, False, 0, 4000), ttft_target_s=1.0), 11.0)
    assert next(queue.first(1)).request_id == "r11", "a target of its own is taken as it is"
