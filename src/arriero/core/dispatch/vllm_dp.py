"""Dispatch as vLLM's own data-parallel balancer does it."""

from __future__ import annotations

from arriero.core.dispatch.ranking import Ranking
from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class VllmDataParallel:
    """The score of vLLM 0.32's ``DPLBAsyncMPClient``: the least of

    max(own in-flight, waiting + running) + waiting * 6 * max(0, kv_usage - 0.5)
    """

    def __init__(self) -> None:
        self._ranking = Ranking(lambda view, i: (_score(view, i),))

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """Argmin of the score; ties go to the lower number."""
        return self._ranking.best(view)


def _score(view: ClusterView, instance: InstanceId) -> float:
    in_flight, snapshot = view.ledger.num_outstanding(instance), view.snapshots.get(instance)
    if snapshot is None:
        return in_flight
    kv_usage = 1 - snapshot.num_free_blocks / snapshot.num_blocks
    waiting = snapshot.num_waiting
    return max(in_flight, waiting + snapshot.num_running) + waiting * 6 * max(0.0, kv_usage - 0.5)
