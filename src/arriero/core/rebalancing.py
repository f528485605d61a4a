"""Rebalancing: which running request moves where, from the fuller to the emptier instance."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from arriero.core.config import RebalancingConfig
from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestId, RequestSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A migration that the policy wants, with the figures that led to it."""

    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    source_freeness: float
    destination_freeness: float

    @property
    def reason(self) -> str:
        """For logs and `explain`."""
        return (
            f"freeness {self.source_freeness:.1f} at {self.source}, "
            f"{self.destination_freeness:.1f} at {self.destination}"
        )


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
) -> RequestSnapshot | None:
    """The request that moves: waiting ones first (they move without a copy), then lower priority,
    then the shorter sequence; it must fit, and the move must narrow the gap between the two
    (but everything leaves a ``draining`` source, however empty it is).
    """
    for request in sorted(source.requests, key=_eagerness):
        if request.request_id in resting or request.phase in (Phase.FROZEN, Phase.INCOMING):
            continue
        need = request.demand_blocks if request.phase is Phase.WAITING else request.num_blocks + 1
        if need <= destination.num_free_blocks and (draining or _narrows(source, destination, need, config)):
            return request
    return None


def _eagerness(request: RequestSnapshot) -> tuple[bool, int, int, RequestId]:
    return (request.phase is not Phase.WAITING, -request.priority, request.num_tokens, request.request_id)


def _narrows(
    source: InstanceSnapshot, destination: InstanceSnapshot, num_blocks: int, config: RebalancingConfig
) -> bool:
    """Whether the gap in free blocks shrinks by ``min_gain`` of itself, and at all: where it turns over, it must come
    out smaller, so that a request is never wanted back and a steady load comes to rest.
    """
    gap = _free_for_good(destination) - _free_for_good(source)
    after = abs(gap - 2 * num_blocks)
    return after < gap and after <= gap * (1 - config.min_gain)


def _free_for_good(snapshot: InstanceSnapshot) -> int:
    waiting = sum(r.demand_blocks for r in snapshot.requests if r.phase is Phase.WAITING)
    return snapshot.num_free_blocks - waiting
