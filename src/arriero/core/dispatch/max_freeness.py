"""Dispatch by freeness."""

from __future__ import annotations

from arriero.core.dispatch.ranking import Ranking
from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class MaxFreeness:
    """Maximum freeness (Llumnix, OSDI'24, section 4.4.3). For urgent requests the headroom of their like is free."""

    def __init__(self) -> None:
        self._ranking = Ranking(lambda view, i: (-view.freeness(i), view.ledger.num_outstanding(i)))
        self._for_urgent = Ranking(
            lambda view, i: (-view.freeness(i, with_headroom=False), view.ledger.num_outstanding(i))
        )

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """Argmax of freeness; ties go to fewer outstanding requests, then to the lower number."""
        ranking = self._for_urgent if view.is_urgent(request.priority) else self._ranking
        return ranking.best(view)
