"""Dispatch: which instance takes a new request. One rule a class; all are pure."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from arriero.core.errors import ConfigError
from arriero.core.ledger import Ledger
from arriero.core.load import freeness
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot


@dataclass(frozen=True, slots=True)
class DispatchView:
    """What a policy sees: the candidates (ready, not draining; never empty), and their load."""

    candidates: Sequence[InstanceId]
    snapshots: Mapping[InstanceId, InstanceSnapshot]
    ledger: Ledger

    def freeness(self, instance: InstanceId) -> float:
        """Freeness with the ledger's pending requests counted; 0 before the first snapshot."""
        snapshot = self.snapshots.get(instance)
        if snapshot is None:
            return 0.0
        return freeness(snapshot, pending_blocks=self.ledger.pending_blocks(instance, snapshot.block_size))


class DispatchPolicy(Protocol):
    """Chooses one of the candidates. May keep state, but no clock and no global randomness."""

    def choose(self, request: Dispatchable, view: DispatchView) -> InstanceId:
        """The instance that takes ``request``; must be one of ``view.candidates``."""


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: Dispatchable, view: DispatchView) -> InstanceId:
        """The candidate after the last one chosen, in the order of their numbers."""
        later = [i for i in view.candidates if i > self._last]
        self._last = min(later or view.candidates)
        return self._last


class LeastOutstanding:
    """Fewest requests in the instance's care."""

    def choose(self, request: Dispatchable, view: DispatchView) -> InstanceId:
        """Argmin of outstanding requests; ties go to the lower number."""
        return min(view.candidates, key=lambda i: (view.ledger.num_outstanding(i), i))


class MaxFreeness:
    """Maximum freeness (Llumnix, OSDI'24, section 4.4.3)."""

    def choose(self, request: Dispatchable, view: DispatchView) -> InstanceId:
        """Argmax of freeness; ties go to fewer outstanding requests, then to the lower number."""
        return min(view.candidates, key=lambda i: (-view.freeness(i), view.ledger.num_outstanding(i), i))


def make_dispatch_policy(name: str) -> DispatchPolicy:
    """The policy called ``name``, or the class at a dotted path. Raises ConfigError."""
    if name in DISPATCH_POLICIES:
        return DISPATCH_POLICIES[name]()
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"dispatch policy {name!r} is unknown: use one of {', '.join(DISPATCH_POLICIES)} "
            "or the dotted path of your own class"
        )
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"dispatch policy {name!r} cannot be loaded: {error}") from error
    if not callable(getattr(policy, "choose", None)):
        raise ConfigError(f"dispatch policy {name!r} has no method choose(request, view)")
    return cast(DispatchPolicy, policy)


DISPATCH_POLICIES: dict[str, type[DispatchPolicy]] = {
    "freeness": MaxFreeness,
    "least_outstanding": LeastOutstanding,
    "round_robin": RoundRobin,
}
