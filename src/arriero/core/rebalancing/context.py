"""What a rule of rebalancing sees in one round."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from arriero.core.config import RebalancingConfig
from arriero.core.rebalancing.copy_time import CopyTime
from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestId, RequestSnapshot
from arriero.core.view import ClusterView


@dataclass(frozen=True, slots=True)
class Round:
    """One round: instances that may take part, and requests that may not."""

    view: ClusterView
    config: RebalancingConfig
    instances: tuple[InstanceId, ...]  #: with a snapshot, and in fewer moves than the limit
    moving: Set[RequestId]  #: they move already
    resting: Set[RequestId]  #: moved a moment ago: their KV cache is not copied again yet
    now: float
    copy_time: CopyTime  #: learned from past moves
    source: InstanceId | None = None  #: only this one gives; None: all may

    def gives(self, instance: InstanceId) -> bool:
        """Whether the instance may be a source."""
        return self.source is None or instance == self.source

    def snapshot(self, instance: InstanceId) -> InstanceSnapshot:
        """The last one of an instance that takes part."""
        return self.view.snapshots[instance]

    def pending_blocks(self, instance: InstanceId) -> int:
        """Demand of requests on their way to the instance."""
        return self.view.ledger.pending_blocks(instance, self.snapshot(instance).block_size)

    def movable(self, instance: InstanceId) -> Iterator[RequestSnapshot]:
        """Requests there that may move now."""
        resting, unmovable = self.resting, self.view.ledger.unmovable
        for request in self.snapshot(instance).requests:
            phase, name = request.phase, request.request_id
            is_free = phase is Phase.WAITING or (phase is Phase.RUNNING and name not in resting)
            if is_free and name not in self.moving and name not in unmovable:
                yield request
