"""Dispatch by the number of requests."""

from __future__ import annotations

from arriero.core.dispatch.ranking import Ranking
from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class LeastOutstanding:
    """Fewest requests in the instance's care."""

    def __init__(self) -> None:
        self._ranking = Ranking(lambda view, i: (view.ledger.num_outstanding(i),))

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """Argmin of outstanding requests; ties go to the lower number."""
        return self._ranking.best(view)
