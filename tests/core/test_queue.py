"""The global queue: who is next, and nothing is lost."""

from __future__ import annotations

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
