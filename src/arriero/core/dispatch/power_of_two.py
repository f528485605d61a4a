"""Dispatch by two random choices."""

from __future__ import annotations

from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001); load is the number of outstanding requests."""

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """Of two distinct candidates the one with fewer requests in its care."""
        candidates = view.candidates
        drawn = view.rng.sample(candidates, min(2, len(candidates)))
        return min(drawn, key=lambda i: (view.ledger.num_outstanding(i), i))
