"""Rebalancing by need: the cheapest move that gives a full instance what it lacks, if it is worth it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from arriero.core.commands import Move
from arriero.core.load import headroom
from arriero.core.rebalancing.context import Round
from arriero.core.types import InstanceId, Phase, RequestId, RequestSnapshot


@dataclass(frozen=True, slots=True)
class Need:
    """What an instance lacks."""

    instance: InstanceId
    blocks: float  #: that should become free there
    urgency: float  #: the less, the sooner: blocks a request until preemption; below 0: somebody waits for them
    why: str


Chooser = Callable[[Round, Need, float], RequestSnapshot | None]


def relief_moves(this: Round) -> list[Move]:
    """In the order of urgency, each needy instance gives one request to another: one that waits to where it can start,
    else one that runs to the instance with most room.

    An instance is needy if the head of its queue lacks blocks; if it is kept for a request that lacks some; or if its
    running requests will run out of memory within ``low_freeness`` blocks each: then a request moves instead of being
    preempted. None takes part in two moves of one round.
    """
    needs = sorted(
        (n for i in this.instances if (n := _need(this, i)) is not None), key=lambda n: (n.urgency, n.instance)
    )
    needy = {n.instance for n in needs}
    any_waits = any(this.snapshot(n.instance).num_waiting for n in needs)
    starters = sorted((-_room_to_start(this, i), i) for i in (this.instances if any_waits else ()))
    roomy = sorted((-_room(this, i), i) for i in this.instances if i not in needy)
    taken: set[InstanceId] = set()
    moves: list[Move] = []
    for need in needs:
        if len(moves) == this.config.max_moves_per_round:
            break
        if not this.gives(need.instance) or need.instance in taken:
            continue
        found = None
        if this.snapshot(need.instance).num_waiting:
            found = _choose_from(this, need, starters, taken, _waiting)
        found = found or _choose_from(this, need, roomy, taken, _running)
        if found is not None:
            request, destination = found
            taken |= {need.instance, destination}
            moves.append(
                Move(
                    request_id=request.request_id,
                    source=need.instance,
                    destination=destination,
                    reason=f"{need.why}; {request.num_blocks} blocks move",
                )
            )
    return moves


def _need(this: Round, instance: InstanceId) -> Need | None:
    snapshot, low = this.snapshot(instance), this.config.low_freeness
    free = snapshot.num_unclaimed_blocks
    lacking = snapshot.head_demand_blocks - free
    if snapshot.num_waiting and lacking > 0:
        return Need(instance, lacking, -lacking, f"the queue of {instance} lacks {lacking} blocks")
    kept = this.view.earmarks.get(instance)
    if kept is not None:
        lacking = kept + math.ceil(low * snapshot.num_running) - free
        if lacking > 0 or _num_seated(this, instance) >= snapshot.max_num_seqs:
            lacking = max(1, lacking)
            return Need(instance, lacking, -lacking, f"a request of {kept} blocks is to start at {instance}")
    crowd = _crowd(this, instance)
    if crowd > 0:
        return Need(instance, crowd, math.inf, f"{crowd} blocks crowd the urgent requests at {instance}")
    num_left = snapshot.num_running - 1
    if num_left > 0 and free < low * snapshot.num_running:
        reach = free / snapshot.num_running
        return Need(instance, low * num_left - free, reach, f"{instance} has {reach:.1f} blocks a request left")
    return None


def _crowd(this: Round, instance: InstanceId) -> int:
    """Blocks that others than the urgent requests hold beyond the load at which those decode near their best speed."""
    snapshot, view = this.snapshot(instance), this.view
    kept = max((headroom(p, view.config, snapshot.num_blocks) for p, _ in snapshot.running_by_priority), default=0)
    if not kept:
        return 0
    others = sum(r.num_blocks for r in snapshot.requests if r.phase is Phase.RUNNING and not view.is_urgent(r.priority))
    return min(others, kept - snapshot.num_unclaimed_blocks)


def _room(this: Round, instance: InstanceId) -> float:
    """Free blocks that nobody waits for, beyond what keeps the instance from being needy; none if it is kept."""
    return _free(this, instance) - this.config.high_freeness * (_num_seated(this, instance) + 1)


def _room_to_start(this: Round, instance: InstanceId) -> float:
    """As :func:`_room`, for a request that waits: it goes for free, and back for free. So it need not find more than
    what a request from the global queue does; else those overtake it, and it is the one whose stream stands still.
    """
    kept = this.config.start_share * this.snapshot(instance).num_blocks
    return _free(this, instance) - min(kept, this.config.high_freeness * (_num_seated(this, instance) + 1))


def _free(this: Round, instance: InstanceId) -> float:
    snapshot, config = this.snapshot(instance), this.view.config
    if config.load_targets and any(this.view.is_urgent(p) for p, _ in snapshot.running_by_priority):
        return -math.inf
    if _num_seated(this, instance) >= snapshot.max_num_seqs or instance in this.view.earmarks:
        return -math.inf
    return snapshot.num_unclaimed_blocks - snapshot.waiting_demand_blocks - this.pending_blocks(instance)


def _num_seated(this: Round, instance: InstanceId) -> int:
    """Requests that have a place in the instance's batch, or will take one."""
    snapshot = this.snapshot(instance)
    return snapshot.num_running + snapshot.num_waiting + this.view.ledger.num_pending(instance)


def _choose_from(
    this: Round, need: Need, line: Iterable[tuple[float, InstanceId]], taken: Set[InstanceId], choose: Chooser
) -> tuple[RequestSnapshot, InstanceId] | None:
    """A request for the first in ``line`` (minus its room, instance) that takes no part in a move yet."""
    for room, instance in line:
        if instance != need.instance and instance not in taken:
            request = choose(this, need, -room)
            return None if request is None else (request, instance)
    return None


def _waiting(this: Round, need: Need, room: float) -> RequestSnapshot | None:
    """The first of the most urgent that wait and can start in ``room``."""
    fits = (
        r
        for r in this.movable(need.instance)
        if r.phase is Phase.WAITING and r.demand_blocks <= room and not _is_spared(this, need, r)
    )
    return min(fits, key=lambda r: r.priority, default=None)


def _running(this: Round, need: Need, room: float) -> RequestSnapshot | None:
    """A less urgent one first, then the smallest that gives what is lacking, or else the largest; it must pay."""
    most = min(room - 1, _most_that_pays(this, need))
    best: RequestSnapshot | None = None
    best_key: tuple[int, bool, float, RequestId] | None = None
    for request in this.movable(need.instance):
        num_blocks = request.num_blocks
        if request.phase is not Phase.RUNNING or num_blocks > most or _is_spared(this, need, request):
            continue
        suffices = num_blocks >= need.blocks
        key = (-request.priority, not suffices, num_blocks if suffices else -num_blocks, request.request_id)
        if best_key is None or key < best_key:
            best, best_key = request, key
    return best


def _is_spared(this: Round, need: Need, request: RequestSnapshot) -> bool:
    """Whether the others are to make room for it."""
    return math.isinf(need.urgency) and this.view.is_urgent(request.priority)


def _most_that_pays(this: Round, need: Need) -> float:
    """Blocks whose copy ends before the need does: a long context whose copy takes longer than the time until memory
    runs out prevents nothing, and its copy slows two instances.
    """
    if need.urgency < 0 or math.isinf(need.urgency):
        return math.inf
    snapshot = this.snapshot(need.instance)
    left_s = need.urgency * snapshot.block_size * snapshot.step_s
    return this.copy_time.most_blocks(max(left_s, this.config.interval_s))
