"""What the scheduler sees: the instances, their last snapshots, and the ledger of what no snapshot shows yet."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from arriero.core.config import LoadConfig
from arriero.core.ledger import Ledger
from arriero.core.load import freeness
from arriero.core.prefixes import PrefixMap
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, RequestId


class ClusterView:
    """Read by the policies, written by the scheduler alone.

    Policies may keep what they have computed: see :meth:`follow`.
    """

    def __init__(self, config: LoadConfig, rng: random.Random) -> None:
        self.config = config
        self.rng = rng  #: the only randomness that a policy may use
        self.states: dict[InstanceId, InstanceState] = {}
        self.snapshots: dict[InstanceId, InstanceSnapshot] = {}
        self.ledger = Ledger()
        self.prefixes = PrefixMap()  #: of prompts whose hashes are known: which instances hold them
        self.earmarks: dict[InstanceId, int] = {}  #: instances kept for a request, and the blocks that it needs
        self._candidates: list[InstanceId] | None = None
        self._freeness: dict[InstanceId, float] = {}
        self._changed: list[set[InstanceId]] = []

    # ------------------------------------------------------------------ for policies

    @property
    def candidates(self) -> Sequence[InstanceId]:
        """Instances that may be given a request: ready and not draining; by number."""
        if self._candidates is None:
            self._candidates = sorted(i for i, s in self.states.items() if s is InstanceState.READY)
        return self._candidates

    def is_candidate(self, instance: InstanceId) -> bool:
        """Whether the instance may be given a request."""
        return self.states.get(instance) is InstanceState.READY

    def freeness(self, instance: InstanceId, *, with_headroom: bool = True) -> float:
        """Freeness with the ledger's pending requests counted; 0 before the first snapshot.

        A draining instance holds a fake request of infinite usage: everything moves away from it. Without headroom it
        is what an urgent request may use.
        """
        if not with_headroom:
            return self._compute_freeness(instance, replace(self.config, load_targets=()))
        known = self._freeness.get(instance)
        if known is None:
            known = self._freeness[instance] = self._compute_freeness(instance, self.config)
        return known

    def is_urgent(self, priority: int) -> bool:
        """Whether headroom is kept for requests of this priority."""
        targets = self.config.load_targets
        return bool(targets) and priority <= targets[-1][0]

    def _compute_freeness(self, instance: InstanceId, config: LoadConfig) -> float:
        if self.states.get(instance) is InstanceState.DRAINING:
            return -math.inf
        snapshot = self.snapshots.get(instance)
        if snapshot is None:
            return 0.0
        return freeness(
            snapshot,
            config,
            pending_blocks=self.ledger.pending_blocks(instance, snapshot.block_size),
            num_pending=self.ledger.num_pending(instance),
        )

    def follow(self) -> set[InstanceId]:
        """A set into which each instance is put when its load changes, or it comes or goes; the caller empties it."""
        changed = set(self.states)
        self._changed.append(changed)
        return changed

    # ------------------------------------------------------------------ for the scheduler

    def touch(self, instance: InstanceId) -> None:
        """The load of ``instance`` is not what it was."""
        self._freeness.pop(instance, None)
        for changed in self._changed:
            changed.add(instance)

    def set_state(self, instance: InstanceId, state: InstanceState) -> None:
        """``instance`` is there, and ready or draining."""
        self.states[instance] = state
        self._candidates = None
        self.touch(instance)

    def remove(self, instance: InstanceId) -> None:
        """``instance`` is gone."""
        self.states.pop(instance, None)
        self.snapshots.pop(instance, None)
        self.earmarks.pop(instance, None)
        self.ledger.forget(instance)
        self.prefixes.forget(instance)
        self._candidates = None
        self.touch(instance)

    def earmark(self, instance: InstanceId, num_blocks: int | None) -> None:
        """``instance`` is kept for a request that needs ``num_blocks``; None: no more."""
        if num_blocks is None:
            self.earmarks.pop(instance, None)
        else:
            self.earmarks[instance] = num_blocks
        self.touch(instance)

    def see(self, snapshot: InstanceSnapshot) -> None:
        """The load report of an instance that is there."""
        self.snapshots[snapshot.instance] = snapshot
        self.ledger.reconcile(snapshot)
        self.touch(snapshot.instance)

    def sent(self, request: Dispatchable, instance: InstanceId) -> None:
        """``request`` was sent to ``instance``."""
        self.ended(request.request_id)
        self.ledger.sent(request, instance)
        self._note_prefix(request, instance)
        self.touch(instance)

    def moved(self, request_id: RequestId, destination: InstanceId) -> None:
        """``request_id`` runs on ``destination`` now."""
        source, request = self.ledger.instance_of(request_id), self.ledger.facts_of(request_id)
        if source is None or request is None:
            return
        self.ledger.moved(request_id, destination)
        self._note_prefix(request, destination)
        self.touch(source)
        self.touch(destination)

    def ended(self, request_id: RequestId) -> None:
        """``request_id`` is nowhere."""
        instance = self.ledger.instance_of(request_id)
        if instance is not None:
            self.ledger.ended(request_id)
            self.touch(instance)

    def _note_prefix(self, request: Dispatchable, instance: InstanceId) -> None:
        snapshot = self.snapshots.get(instance)
        max_tokens = None if snapshot is None else snapshot.num_blocks * snapshot.block_size
        self.prefixes.sent(request, instance, max_tokens)
