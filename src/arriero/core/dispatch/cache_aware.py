"""Dispatch by prefix affinity, with a load escape."""

from __future__ import annotations

from arriero.core.dispatch.ranking import Ranking
from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class CacheAware:
    """The rule of sglang's and vLLM's routers (``cache_aware``, with their defaults).

    The instance that was sent the longest prefix of the prompt takes it, if that is at least half of it, unless
    it has ``MARGIN`` requests more than the least loaded one and ``RATIO`` times as many; otherwise the latter.
    """

    MATCH = 0.5
    MARGIN = 32
    RATIO = 1.1

    def __init__(self) -> None:
        self._ranking = Ranking(lambda view, i: (view.ledger.num_outstanding(i),))

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """The affine instance, or the one with fewest outstanding requests."""
        least_loaded = self._ranking.best(view)
        holders, num_tokens = view.prefixes.find(request)
        if not holders or num_tokens < self.MATCH * request.num_prompt_tokens:
            return least_loaded
        last = next(reversed(holders))
        if not view.is_candidate(last):
            return least_loaded
        own, least = (view.ledger.num_outstanding(i) for i in (last, least_loaded))
        return last if own - least <= self.MARGIN or own <= self.RATIO * least else least_loaded
