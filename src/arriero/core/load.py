"""Virtual usage and freeness: the one definition of load (Llumnix, OSDI'24, section 4.4.2).

    freeness(i) = (M - sum of virtual usages on i) / B

with M the instance's KV blocks and B its running requests: about the decode steps until memory runs
out, in blocks. It may be negative: the instance has more demand than memory.
"""

from __future__ import annotations

import math

from arriero.core.config import LoadConfig, QueueTerm
from arriero.core.types import InstanceSnapshot, Phase, RequestSnapshot


def virtual_usage(
    request: RequestSnapshot,
    config: LoadConfig,
    *,
    is_head_of_line: bool = False,
    num_blocks: int = 0,
    num_peers: int = 1,
) -> float:
    """KV blocks that ``request`` counts for on an instance of ``num_blocks``.

    A waiting request counts its demand only at the head of the line (the rule that defragments: an
    instance whose queue head cannot fit looks overloaded, so running requests move away from it), or always,
    by ``config.queue_term``. A running one counts what it holds, or what its whole prompt takes while that is computed
    in parts, and its share of its priority's headroom: that of ``num_peers`` running requests of the same priority.
    """
    if request.phase is Phase.WAITING:
        return request.demand_blocks if is_head_of_line or config.queue_term is QueueTerm.ALL else 0
    if request.phase is Phase.RUNNING:
        held = max(request.num_blocks, request.demand_blocks)
        return held + headroom(request.priority, config, num_blocks) / num_peers
    return request.num_blocks


def headroom(priority: int, config: LoadConfig, num_blocks: int) -> int:
    """Blocks of an instance of ``num_blocks`` that stay free for the running requests of ``priority`` together: what is
    beyond the load at which they decode near their best speed (Llumnix, OSDI'24, section 4.4.2).
    """
    for at_most, share in config.load_targets:
        if priority <= at_most:
            return math.floor(num_blocks * (1 - share))
    return 0


def freeness(snapshot: InstanceSnapshot, config: LoadConfig, *, pending_blocks: int = 0, num_pending: int = 0) -> float:
    """Freeness of an instance, in blocks a running request, from the snapshot's aggregates alone.

    ``pending_blocks``: demand of the ``num_pending`` requests that were dispatched but are not in the snapshot yet.
    """
    free = snapshot.num_unclaimed_blocks - pending_blocks
    num = snapshot.num_running + num_pending
    if config.queue_term is QueueTerm.ALL:
        free -= snapshot.waiting_demand_blocks
    else:
        free -= snapshot.head_demand_blocks
    if config.load_targets:
        free -= sum(headroom(p, config, snapshot.num_blocks) for p, _ in snapshot.running_by_priority)
    return free / max(1, num)
