"""GlobalScheduler: what happens goes in, what should be done comes out. The simulator and
production run this same object; neither holds an `if` about load or pairing.
"""

from __future__ import annotations

from arriero.core.config import SchedulerConfig
from arriero.core.dispatch import DispatchView, make_dispatch_policy
from arriero.core.errors import ConfigError, UnavailableError
from arriero.core.ledger import Ledger
from arriero.core.load import freeness
from arriero.core.rebalancing import Move, choose_request, pair
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, RequestId


class GlobalScheduler:
    """Dispatch and rebalancing over the instances that have joined."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.ledger = Ledger()
        self._policy = make_dispatch_policy(config.dispatch_policy)
        self._states: dict[InstanceId, InstanceState] = {}
        self._snapshots: dict[InstanceId, InstanceSnapshot] = {}
        self._moving: dict[RequestId, tuple[InstanceId, InstanceId]] = {}
        self._rested_at: dict[RequestId, float] = {}

    # ------------------------------------------------------------------ what happened

    def instance_joined(self, instance: InstanceId) -> None:
        """``instance`` is ready to serve."""
        self._states[instance] = InstanceState.READY

    def instance_draining(self, instance: InstanceId) -> None:
        """``instance`` takes no new requests."""
        self._states[instance] = InstanceState.DRAINING

    def instance_lost(self, instance: InstanceId) -> None:
        """``instance`` is dead or was removed."""
        self._states.pop(instance, None)
        self._snapshots.pop(instance, None)
        for request_id, (source, destination) in self._moving.items():
            if source == instance and destination in self._states:
                self.ledger.moved(request_id, destination)  # where it goes on, unless a replay is dispatched
        self.ledger.forget(instance)

    def snapshot(self, snapshot: InstanceSnapshot) -> None:
        """An instance reports its load. Late reports of instances that left are ignored."""
        if snapshot.instance in self._states:
            self._snapshots[snapshot.instance] = snapshot
            self.ledger.reconcile(snapshot)

    def request_ended(self, request_id: RequestId) -> None:
        """The request finished, was aborted or could not be placed."""
        self.ledger.ended(request_id)
        self._rested_at.pop(request_id, None)

    def migration_started(self, request_id: RequestId, source: InstanceId, destination: InstanceId) -> None:
        """A migration is under way, on demand or by :meth:`rebalance`."""
        self._moving[request_id] = (source, destination)

    def migration_ended(self, request_id: RequestId, *, ok: bool, now: float) -> None:
        """It ended; a request that moved (or could not) rests before it is moved again."""
        _, destination = self._moving.pop(request_id)
        if ok:
            self.ledger.moved(request_id, destination)
        if self.ledger.knows(request_id):
            self._rested_at[request_id] = now

    # ------------------------------------------------------------------ what to do

    def dispatch(self, request: Dispatchable) -> InstanceId:
        """The instance for a new (or replayed) request. Raises UnavailableError if none is ready, and ConfigError if
        the policy chooses an instance that is no candidate.
        """
        candidates = [i for i, s in sorted(self._states.items()) if s is InstanceState.READY]
        if not candidates:
            raise UnavailableError("no instance is ready: all are starting, draining or dead; try again")
        instance = self._policy.choose(request, DispatchView(candidates, self._snapshots, self.ledger))
        if self._states.get(instance) is not InstanceState.READY:
            raise ConfigError(
                f"dispatch policy {self.config.dispatch_policy!r} chose instance {instance!r}, "
                f"which is none of the candidates {candidates}: correct its choose()"
            )
        self.ledger.sent(request, instance)
        return instance

    def rebalance(self, now: float) -> list[Move]:
        """The migrations to start now; empty if rebalancing is off."""
        config = self.config.rebalancing
        if config is None:
            return []
        free = {i: self.freeness(i) for i in self._snapshots}
        resting = {r for r, t in self._rested_at.items() if now - t < config.cooldown_s} | self._moving.keys()
        moves = []
        for source, destination in pair(free, config):
            if self._busy(source) or self._busy(destination):
                continue
            request = choose_request(
                self._snapshots[source],
                self._snapshots[destination],
                config,
                resting,
                draining=self._states[source] is InstanceState.DRAINING,
            )
            if request is not None:
                moves.append(
                    Move(
                        request_id=request.request_id,
                        source=source,
                        destination=destination,
                        source_freeness=free[source],
                        destination_freeness=free[destination],
                    )
                )
        return moves

    def freeness(self, instance: InstanceId) -> float:
        """Freeness of an instance as the scheduler sees it now; 0 before its first snapshot."""
        snapshot = self._snapshots.get(instance)
        if snapshot is None:
            return 0.0
        return freeness(
            snapshot,
            pending_blocks=self.ledger.pending_blocks(instance, snapshot.block_size),
            draining=self._states[instance] is InstanceState.DRAINING,
        )

    def snapshot_of(self, instance: InstanceId) -> InstanceSnapshot | None:
        """The last snapshot, if any."""
        return self._snapshots.get(instance)

    def _busy(self, instance: InstanceId) -> bool:
        config = self.config.rebalancing
        assert config is not None
        return sum(instance in ends for ends in self._moving.values()) >= config.max_migrations_per_instance
