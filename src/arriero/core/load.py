"""Virtual usage and freeness: the one definition of load (Llumnix, OSDI'24, section 4.4.2).

    freeness(i) = (M - sum of virtual usages on i) / B

with M the instance's KV blocks and B its running requests: about the decode steps until memory runs
out, in blocks. It may be negative: the instance has more demand than memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot


def virtual_usage(request: RequestSnapshot, *, is_head_of_line: bool) -> int:
    """KV blocks that ``request`` counts for.

    A waiting request counts its demand only at the head of the line (the rule that defragments: an
    instance whose queue head cannot fit looks overloaded, so running requests move away from it).
    """
    if request.phase is Phase.WAITING:
        return request.demand_blocks if is_head_of_line else 0
    return request.num_blocks


def freeness(snapshot: InstanceSnapshot, *, pending_blocks: int = 0, draining: bool = False) -> float:
    """Freeness of an instance, in blocks a running request.

    ``pending_blocks``: demand of requests that were dispatched but are not in the snapshot yet.
    A draining instance holds a fake request of infinite usage: everything moves away from it.
    """
    if draining:
        return -math.inf
    free = snapshot.num_blocks - pending_blocks - _total_usage(snapshot.requests)
    return free / max(1, snapshot.num_running)


def _total_usage(requests: Iterable[RequestSnapshot]) -> int:
    total, head_seen = 0, False
    for request in requests:
        is_waiting = request.phase is Phase.WAITING
        total += virtual_usage(request, is_head_of_line=not head_seen)
        head_seen = head_seen or is_waiting
    return total
