"""GlobalScheduler: events in, commands out. The simulator and production run this same object; neither holds an `if`
about load or pairing.

Every event is plain data with the time at which it happened, and all randomness comes from the configured seed: equal
events in equal order bring equal commands.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from arriero.core.admission import Admission, Occupancy
from arriero.core.binding import LateBinding
from arriero.core.commands import Command, Dispatch, Launch, PolicyFailed, Reject, RejectKind, Stop
from arriero.core.config import SchedulerConfig
from arriero.core.dispatch import MaxFreeness, make_dispatch_policy
from arriero.core.draining import Evacuation, why_not
from arriero.core.errors import PolicyError
from arriero.core.foresight import Foresight
from arriero.core.ledger import Ledger
from arriero.core.preempted import Preempted, newly_preempted
from arriero.core.queue import RequestQueue
from arriero.core.rebalancing import Rebalancer
from arriero.core.scaling import Scaler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, RequestId
from arriero.core.view import ClusterView

MAX_ALTERNATIVES = 16
"""Candidates up to which a dispatch says how each of them stood."""


class GlobalScheduler:
    """Dispatch, queueing and rebalancing over the instances that have joined."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.view = ClusterView(config.load, random.Random(config.seed))
        self._policy = make_dispatch_policy(config.dispatch_policy)
        self._fallback = MaxFreeness()
        queueing = config.queueing
        self._foresight = Foresight(queueing) if queueing is not None and queueing.trusts_max_tokens else None
        self._binding = self._foresight or (LateBinding(queueing) if queueing is not None else None)
        self._queue = RequestQueue()
        if queueing is not None:
            self._queue = RequestQueue(queueing.ttft_target_s, queueing.ttft_target_s_per_token)
        self._admission = Admission(config.admission) if config.admission is not None else None
        self._rebalancer = Rebalancer(config.rebalancing) if config.rebalancing is not None else None
        self._evacuation = Evacuation(config.drain)
        self._scaler = Scaler(config.scaling) if config.scaling is not None else None
        self._num_starting = 0
        self._moving: dict[RequestId, tuple[InstanceId, InstanceId]] = {}

    # ------------------------------------------------------------------ events

    def arrived(self, request: Dispatchable, now: float) -> list[Command]:
        """A new request, or one that must be replayed, wants an instance."""
        self._forget(request.request_id)
        refused = self._impossible(request) or self._overloaded(request)
        if refused is not None:
            self._forget(request.request_id)  # what was kept for it before it came
            return [refused]
        self._queue.push(request, now)
        commands = self._bind(now, may_earmark=True)
        if not self.view.candidates and not self.config.no_instance_timeout_s:
            self._queue.remove(request.request_id)
            commands.append(_unavailable(request))
        return commands

    def foretold(self, request: Dispatchable, arrives_s: float, now: float) -> list[Command]:
        """``request`` will arrive at ``arrives_s``. Only a simulator can say so; heard only if ends are known, too."""
        if self._foresight is not None:
            self._foresight.foretell(request, arrives_s)
            self._foresight.reserve(self.view, now)
        return []

    def snapshot(self, snapshot: InstanceSnapshot, now: float) -> list[Command]:
        """An instance reports its load. Late reports of instances that left are ignored."""
        instance = snapshot.instance
        if instance not in self.view.states:
            return []
        self.view.see(snapshot)
        return self._bind(now) + self._evacuate(now) + self._stop_if_empty(instance)

    def ended(self, request_id: RequestId, now: float) -> list[Command]:
        """The request finished, was aborted or could not be placed."""
        instance = self.view.ledger.instance_of(request_id)
        if self._admission is not None and instance is not None:
            self._admission.ended(now)
        self._forget(request_id)
        return self._bind(now) + (self._stop_if_empty(instance) if instance is not None else [])

    def instance_joined(self, instance: InstanceId, now: float) -> list[Command]:
        """``instance`` is ready to serve."""
        self._num_starting = max(0, self._num_starting - 1)
        self.view.set_state(instance, InstanceState.READY)
        self._evacuation.end(instance)
        return self._bind(now) + self._evacuate(now)

    def launch_failed(self, now: float) -> list[Command]:
        """An instance that was to be started did not come up."""
        self._num_starting = max(0, self._num_starting - 1)
        return []

    def instance_draining(self, instance: InstanceId, now: float) -> list[Command]:
        """``instance`` takes no new requests; what it holds moves away. Once it is empty, it is to be stopped."""
        self.view.set_state(instance, InstanceState.DRAINING)
        self._evacuation.begin(instance, now)
        return self._evacuate(now) + self._stop_if_empty(instance)

    def instance_lost(self, instance: InstanceId, now: float) -> list[Command]:
        """``instance`` is dead or was removed. What ran there is to be replayed: each such request arrives anew."""
        for request_id, (source, destination) in self._moving.items():
            if source == instance and destination in self.view.states:
                self.view.moved(request_id, destination)  # where it goes on, unless it arrives anew
        self.view.remove(instance)
        self._evacuation.end(instance)
        return []

    def migration_started(
        self, request_id: RequestId, source: InstanceId, destination: InstanceId, now: float
    ) -> list[Command]:
        """A migration is under way, on demand or by a command of ours."""
        self._moving[request_id] = (source, destination)
        if self._rebalancer is not None:
            self._rebalancer.started(request_id, self.view.snapshots.get(source), now)
        return []

    def migration_ended(self, request_id: RequestId, now: float, *, ok: bool) -> list[Command]:
        """It ended; a request that moved (or could not) rests before it is moved again."""
        source, destination = self._moving.pop(request_id)
        if ok:
            self.view.moved(request_id, destination)
        else:
            self._evacuation.failed(request_id, source, now)
        commands = self._bind(now)
        if self._rebalancer is not None:
            self._rebalancer.moved(request_id, now, ok=ok)
            if not self.view.ledger.knows(request_id):
                self._rebalancer.ended(request_id)
            if ok:
                commands += self._rebalancer.round(self.view, self._moving, now, source)
        return commands + self._evacuate(now) + self._stop_if_empty(source)

    def tick(self, now: float) -> list[Command]:
        """Time has passed: every ``config.interval_s``."""
        commands = self._bind(now, may_earmark=True) + self._expire(now)
        if self._foresight is not None:
            self._foresight.reserve(self.view, now)
        if self._rebalancer is not None:
            commands += self._rebalancer.round(self.view, self._moving, now)
        if self._scaler is not None:
            commands += self._scale(self._scaler, now)
        return commands

    # ------------------------------------------------------------------ what can be seen

    def why_not_drain(self, instance: InstanceId) -> str | None:
        """Why an operator should not drain the instance; None if nothing speaks against it."""
        return why_not(self.view, instance)

    @property
    def ledger(self) -> Ledger:
        """Where each request was sent."""
        return self.view.ledger

    @property
    def moving(self) -> Mapping[RequestId, tuple[InstanceId, InstanceId]]:
        """Open migrations: request -> (source, destination)."""
        return self._moving

    @property
    def num_queued(self) -> int:
        """Requests that no instance has been given yet."""
        return len(self._queue)

    def freeness(self, instance: InstanceId) -> float:
        """Freeness of an instance as the scheduler sees it now; 0 before its first snapshot."""
        return self.view.freeness(instance)

    def preempted_in(self, snapshot: InstanceSnapshot) -> list[Preempted]:
        """Whom an instance has preempted, by a load report that the scheduler has not been told yet."""
        before, snapshots = self.view.snapshots.get(snapshot.instance), self.view.snapshots
        if before is None:
            return []
        return newly_preempted(before, snapshot, (snapshots[i] for i in self.view.candidates if i in snapshots))

    def snapshot_of(self, instance: InstanceId) -> InstanceSnapshot | None:
        """The last snapshot, if any."""
        return self.view.snapshots.get(instance)

    # ------------------------------------------------------------------ rules

    def _bind(self, now: float, *, may_earmark: bool = False) -> list[Command]:
        """Give instances to those that wait for one. Instances are kept for requests only when all of them have been
        looked at alike: on arrivals and ticks, not as the snapshot of one comes in.
        """
        commands: list[Command] = []
        binding, depth = self._binding, len(self._queue)
        if not depth or not self.view.candidates:
            return commands
        if binding is None:
            for request in self._queue.first(depth):
                self._dispatch(request, self._choose(request, now, commands), commands)
            return commands
        queueing = self.config.queueing
        assert queueing is not None
        line = self._queue.first(queueing.scan_depth)
        if queueing.patience_s:
            line = self._queue.shortest(queueing.scan_depth, now - queueing.patience_s)
        for request, roomiest in binding.candidates(line, self.view, may_earmark=may_earmark):
            chosen = self._choose(request, now, commands)
            has_room = chosen == roomiest or binding.has_room(request, self.view, chosen)
            self._dispatch(request, chosen if has_room else roomiest, commands)
        return commands

    def _evacuate(self, now: float) -> list[Command]:
        """The next moves away from instances that drain."""
        return [*self._evacuation.round(self.view, self._moving, now)] if self._evacuation.is_on else []

    def _dispatch(self, request: Dispatchable, instance: InstanceId, commands: list[Command]) -> None:
        self._queue.remove(request.request_id)
        reason = f"by {self.config.dispatch_policy}; freeness {self.view.freeness(instance):.1f}"
        holders, num_tokens = self.view.prefixes.find(request)
        if instance in holders:
            reason += f"; holds {num_tokens} tokens of its prompt"
        shown = self._standings()
        commands.append(Dispatch(request_id=request.request_id, instance=instance, reason=reason, alternatives=shown))
        self.view.sent(request, instance)

    def _standings(self) -> tuple[tuple[InstanceId, float, int], ...]:
        """See :attr:`Dispatch.alternatives`: a dispatch must not become slower with each instance more."""
        view, ledger = self.view, self.view.ledger
        if len(view.candidates) > MAX_ALTERNATIVES:
            return ()
        return tuple((i, view.freeness(i), ledger.num_outstanding(i)) for i in view.candidates)

    def _choose(self, request: Dispatchable, now: float, commands: list[Command]) -> InstanceId:
        view = self.view
        try:
            instance = self._policy.choose(request, view)
            if view.is_candidate(instance):
                return instance
            error = f"chose instance {instance!r}, which is none of the candidates {list(view.candidates)}"
            cause: Exception | None = None
        except Exception as raised:  # noqa: BLE001 - the edge to a user's code, which may raise anything
            error, cause = f"raised {raised!r}", raised
        policy = self.config.dispatch_policy
        if self.config.policy_errors_stop:
            raise PolicyError(
                f"dispatch policy {policy!r} {error} at {now} s for {request}, with the snapshots {view.snapshots}"
            ) from cause
        commands.append(PolicyFailed(policy=policy, error=error))
        return self._fallback.choose(request, view)

    def _scale(self, scaler: Scaler, now: float) -> list[Command]:
        num_queued, num_tokens = self._queue.demand()
        sizes = [s.block_size for s in self.view.snapshots.values()]
        queued = (num_queued, -(-num_tokens // sizes[0]) if sizes else 0)
        commands: list[Command] = []
        for command in scaler.round(self.view, queued, self._num_starting, now):
            commands.append(command)
            if isinstance(command, Launch):
                self._num_starting += command.num_instances
            else:
                commands += self.instance_draining(command.instance, now)
        return commands

    def _expire(self, now: float) -> list[Command]:
        """Requests that have waited too long for any instance at all."""
        if self.view.candidates:
            return []
        late = self._queue.older_than(now - self.config.no_instance_timeout_s)
        for request in late:
            self._forget(request.request_id)
        return [_unavailable(request) for request in late]

    def _impossible(self, request: Dispatchable) -> Reject | None:
        """Why the request can run nowhere; None if it can, or if no instance has shown its size yet."""
        snapshots = self.view.snapshots.values()
        num_tokens = request.num_prompt_tokens + 1
        if not snapshots or any(num_tokens <= s.num_blocks * s.block_size for s in snapshots):
            return None
        longest = max(s.num_blocks * s.block_size for s in snapshots)
        reason = (
            f"{num_tokens} tokens of KV cache are needed, and no instance has more than {longest}: shorten the prompt"
        )
        return Reject(request_id=request.request_id, kind=RejectKind.IMPOSSIBLE, reason=reason)

    def _overloaded(self, request: Dispatchable) -> Reject | None:
        """Why the request may not wait; None if it may. A replay was promised its place when it first came."""
        if self._admission is None or request.is_replay:
            return None
        view, num_unplaced = self.view, len(self._queue)
        overload = self._admission.refuse(
            (_occupancy(view, i) for i in view.candidates),
            num_ready=len(view.candidates),
            num_live=len(view.ledger) + num_unplaced,
            num_unplaced=num_unplaced,
        )
        if overload is None:
            return None
        return Reject(
            request_id=request.request_id,
            kind=RejectKind.OVERLOADED,
            reason=overload.reason,
            retry_after_s=overload.retry_after_s,
        )

    def _stop_if_empty(self, instance: InstanceId) -> list[Command]:
        snapshot = self.view.snapshots.get(instance)
        if (
            self.view.states.get(instance) is not InstanceState.DRAINING
            or self.view.ledger.num_outstanding(instance)
            or (snapshot is not None and snapshot.requests)
            or any(instance in ends for ends in self._moving.values())
        ):
            return []
        return [Stop(instance=instance)]

    def _forget(self, request_id: RequestId) -> None:
        self._queue.remove(request_id)
        if self._binding is not None:
            self._binding.forget(request_id, self.view)
        self.view.ended(request_id)
        if self._rebalancer is not None:
            self._rebalancer.ended(request_id)


def _occupancy(view: ClusterView, instance: InstanceId) -> Occupancy:
    num_pending, snapshot = view.ledger.num_pending(instance), view.snapshots.get(instance)
    if snapshot is None:
        return Occupancy(num_running=0, num_waiting=0, num_pending=num_pending, max_num_seqs=num_pending)
    return Occupancy(
        num_running=snapshot.num_running,
        num_waiting=snapshot.num_waiting,
        num_pending=num_pending,
        max_num_seqs=snapshot.max_num_seqs,
    )


def _unavailable(request: Dispatchable) -> Reject:
    return Reject(
        request_id=request.request_id,
        kind=RejectKind.UNAVAILABLE,
        reason="no instance is ready: all are starting, draining or dead; try again",
    )
