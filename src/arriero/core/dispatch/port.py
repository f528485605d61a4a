"""What a dispatch policy is."""

from __future__ import annotations

from typing import Protocol

from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class DispatchPolicy(Protocol):
    """Chooses one of the candidates. May keep state, but no clock and no randomness but ``view.rng``."""

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """The instance that takes ``request``; must be one of ``view.candidates``, which is never empty."""
