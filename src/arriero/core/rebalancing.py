"""Rebalancing: which running request moves where, from the fuller to the emptier instance."""

from __future__ import annotations

from collections.abc import Mapping, Set

from arriero.core.commands import Move
from arriero.core.config import RebalancingConfig
from arriero.core.types import InstanceId, InstanceSnapshot, InstanceState, Phase, RequestId, RequestSnapshot
from arriero.core.view import ClusterView


class Rebalancer:
    """One round after the other; remembers who is moving and who has moved."""

    def __init__(self, config: RebalancingConfig) -> None:
        self._config = config
        self._rested_at: dict[RequestId, float] = {}

    def rest(self, request_id: RequestId, now: float) -> None:
        """The request has moved, or could not: it stays for a while."""
        self._rested_at[request_id] = now

    def ended(self, request_id: RequestId) -> None:
        """The request is no more."""
        self._rested_at.pop(request_id, None)

    def round(
        self, view: ClusterView, moving: Mapping[RequestId, tuple[InstanceId, InstanceId]], now: float
    ) -> list[Move]:
        """The migrations to start now."""
        config = self._config
        busy: dict[InstanceId, int] = {}
        for ends in moving.values():
            for instance in ends:
                busy[instance] = busy.get(instance, 0) + 1
        free = {i: view.freeness(i) for i in view.snapshots if busy.get(i, 0) < config.max_migrations_per_instance}
        resting = {r for r, t in self._rested_at.items() if now - t < config.cooldown_s} | moving.keys()
        moves = []
        for source, destination in pair(free, config):
            request = choose_request(
                view.snapshots[source],
                view.snapshots[destination],
                config,
                resting,
                draining=view.states[source] is InstanceState.DRAINING,
                pending_blocks=(_pending(view, source), _pending(view, destination)),
            )
            if request is not None:
                moves.append(
                    Move(
                        request_id=request.request_id,
                        source=source,
                        destination=destination,
                        reason=f"freeness {free[source]:.1f} at {source}, {free[destination]:.1f} at {destination}",
                    )
                )
        return moves


def _pending(view: ClusterView, instance: InstanceId) -> int:
    return view.ledger.pending_blocks(instance, view.snapshots[instance].block_size)


def pair(freeness: Mapping[InstanceId, float], config: RebalancingConfig) -> list[tuple[InstanceId, InstanceId]]:
    """(source, destination) pairs: lowest freeness below the low threshold with highest above the
    high one, repeatedly (Llumnix, OSDI'24, section 4.4.3). No instance is on both sides.
    """
    order = sorted(freeness, key=lambda i: (freeness[i], i))
    sources = [i for i in order if freeness[i] < config.low_freeness]
    destinations = [i for i in reversed(order) if freeness[i] > config.high_freeness]
    return list(zip(sources, destinations, strict=False))


def choose_request(
    source: InstanceSnapshot,
    destination: InstanceSnapshot,
    config: RebalancingConfig,
    resting: Set[RequestId],
    *,
    draining: bool = False,
    pending_blocks: tuple[int, int] = (0, 0),
) -> RequestSnapshot | None:
    """The request that moves: waiting ones first (they move without a copy), then lower priority,
    then the shorter sequence; it must fit, and the move must narrow the gap between the two
    (but everything leaves a ``draining`` source, however empty it is).

    ``pending_blocks``: of requests sent to the source and to the destination that their snapshots do not show.
    """
    pending_there = pending_blocks[1]
    gap = _free_for_good(destination) - pending_there - (_free_for_good(source) - pending_blocks[0])
    room = destination.num_free_blocks - pending_there
    for request in sorted(source.requests, key=_eagerness):
        if request.request_id in resting or request.phase in (Phase.FROZEN, Phase.INCOMING):
            continue
        need = request.demand_blocks if request.phase is Phase.WAITING else request.num_blocks + 1
        if need <= room and (draining or _narrows(gap, need, config)):
            return request
    return None


def _eagerness(request: RequestSnapshot) -> tuple[bool, int, int, RequestId]:
    return (request.phase is not Phase.WAITING, -request.priority, request.num_tokens, request.request_id)


def _narrows(gap: int, num_blocks: int, config: RebalancingConfig) -> bool:
    """Whether the gap in free blocks shrinks by ``min_gain`` of itself, and at all: where it turns over, it must come
    out smaller, so that a request is never wanted back and a steady load comes to rest.
    """
    after = abs(gap - 2 * num_blocks)
    return after < gap and after <= gap * (1 - config.min_gain)


def _free_for_good(snapshot: InstanceSnapshot) -> int:
    return snapshot.num_free_blocks - snapshot.waiting_demand_blocks
