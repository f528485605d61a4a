"""Rebalancing as the paper has it."""

from __future__ import annotations

from arriero.core.commands import Move
from arriero.core.rebalancing.context import Round
from arriero.core.rebalancing.pairing import pair
from arriero.core.types import InstanceId, Phase, RequestId, RequestSnapshot


def paper_moves(this: Round) -> list[Move]:
    """Llumnix, OSDI'24, section 4.4.3: between pairs beyond the thresholds, one request a round, which goes on as
    long as the source qualifies.
    """
    freeness = {i: this.view.freeness(i) for i in this.instances}
    moves = []
    for source, destination in pair(freeness, this.config):
        if not this.gives(source):
            continue
        request = _choose(this, source, destination)
        if request is not None:
            moves.append(
                Move(
                    request_id=request.request_id,
                    source=source,
                    destination=destination,
                    reason=f"freeness {freeness[source]:.1f} at {source}, {freeness[destination]:.1f} at {destination}",
                )
            )
    return moves


def _choose(this: Round, source: InstanceId, destination: InstanceId) -> RequestSnapshot | None:
    """A running request that fits: of lower priority first, then the shorter sequence."""
    room = this.snapshot(destination).num_unclaimed_blocks - this.pending_blocks(destination)
    fitting = [r for r in this.movable(source) if r.phase is Phase.RUNNING and r.num_blocks + 1 <= room]
    return min(fitting, key=_eagerness, default=None)


def _eagerness(request: RequestSnapshot) -> tuple[int, int, RequestId]:
    return -request.priority, request.num_tokens, request.request_id
