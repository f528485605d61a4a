"""Dispatch by prefix affinity, with a load escape."""

from __future__ import annotations

from arriero.core.dispatch.prefixes import PrefixMap
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
        self._prefixes = PrefixMap()

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """The affine instance, or the one with fewest outstanding requests."""
        chosen = self._ranking.best(view)
        found = self._prefixes.find(request)
        if found is not None and found[1] >= self.MATCH and view.is_candidate(found[0]):
            own, least = (view.ledger.num_outstanding(i) for i in (found[0], chosen))
            if own - least <= self.MARGIN or own <= self.RATIO * least:
                chosen = found[0]
        self._prefixes.sent(request, chosen)
        return chosen
