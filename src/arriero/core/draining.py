"""Draining: everything leaves an instance, in bounded time whatever the lengths of its requests.

Waiting requests go first (they move without a copy), then the shorter ones. A request that failed to move with its KV
cache ``max_tries`` times, or that finds no room anywhere within ``patience_s``, moves without it: it is prefilled again
at its destination, which may queue it. What can never move runs to its end.
"""

from __future__ import annotations

from collections.abc import Mapping

from arriero.core.commands import Move
from arriero.core.config import DrainConfig
from arriero.core.types import Dispatchable, InstanceId, InstanceState, MigrationMode, Phase, RequestId, RequestSnapshot
from arriero.core.view import ClusterView

Moving = Mapping[RequestId, tuple[InstanceId, InstanceId]]


class Evacuation:
    """Chooses the moves away from all instances that drain."""

    def __init__(self, config: DrainConfig) -> None:
        self._config = config
        self._since: dict[InstanceId, float] = {}
        self._failures: dict[RequestId, list[float]] = {}

    @property
    def is_on(self) -> bool:
        """Whether any instance drains."""
        return bool(self._since)

    def begin(self, instance: InstanceId, now: float) -> None:
        """The instance drains from now on."""
        self._since.setdefault(instance, now)

    def end(self, instance: InstanceId) -> None:
        """The instance is gone. Idempotent."""
        self._since.pop(instance, None)
        if not self._since:
            self._failures.clear()

    def failed(self, request_id: RequestId, source: InstanceId, now: float) -> None:
        """A move did not come about."""
        if source in self._since:
            self._failures.setdefault(request_id, []).append(now)

    def round(self, view: ClusterView, moving: Moving, now: float) -> list[Move]:
        """The moves to start now: at most ``max_moves`` at a time for an instance, each to where most room is left."""
        moves: list[Move] = []
        room = {i: _room(view, i) for i in view.candidates if i in view.snapshots}
        for _, destination in moving.values():
            if destination in room:
                room[destination] = (room[destination][0], room[destination][1] - 1)
        for source in sorted(self._since):
            num_free = self._config.max_moves - sum(source == s for s, _ in moving.values())
            for request, seen in self._eager(view, source, moving, now):
                if num_free <= 0 or not view.candidates:
                    break
                move = self._move(view, source, request, seen, room, now)
                if move is not None:
                    moves.append(move)
                    num_free -= 1
        return moves

    def _eager(
        self, view: ClusterView, source: InstanceId, moving: Moving, now: float
    ) -> list[tuple[Dispatchable, RequestSnapshot | None]]:
        snapshot = view.snapshots.get(source)
        seen = {r.request_id: r for r in snapshot.requests} if snapshot is not None else {}
        ready = [
            (request, seen.get(request.request_id))
            for request in view.ledger.requests_of(source)
            if request.unmovable is None and request.request_id not in moving and self._may_try(request.request_id, now)
        ]
        return sorted(ready, key=lambda r: (_runs(r[1]), r[1].num_tokens if r[1] else 0, r[0].request_id))

    def _may_try(self, request_id: RequestId, now: float) -> bool:
        failures = self._failures.get(request_id)
        return not failures or now - failures[-1] >= self._config.retry_s

    def _move(
        self,
        view: ClusterView,
        source: InstanceId,
        request: Dispatchable,
        seen: RequestSnapshot | None,
        room: dict[InstanceId, tuple[int, int]],
        now: float,
    ) -> Move | None:
        """Where one request goes, and how; None: it waits for room."""
        need = seen.num_blocks + 1 if seen is not None and _runs(seen) else 0
        fits = [i for i, (blocks, seats) in room.items() if blocks >= need and seats > 0]
        mode = MigrationMode.LIVE
        has_failed = len(self._failures.get(request.request_id, ())) >= self._config.max_tries
        if need and (has_failed or not fits):
            if not has_failed and now - self._since[source] < self._config.patience_s:
                return None
            mode, need = MigrationMode.RECOMPUTE, 0
        destination = max(fits or view.candidates, key=lambda i: (room.get(i, (0, 0)), -i))
        blocks, seats = room.get(destination, (0, 0))
        room[destination] = (blocks - need, seats - 1)
        return Move(
            request_id=request.request_id, source=source, destination=destination, reason=f"{source} drains", mode=mode
        )


def _runs(seen: RequestSnapshot | None) -> bool:
    return seen is not None and seen.phase is not Phase.WAITING


def _room(view: ClusterView, instance: InstanceId) -> tuple[int, int]:
    """Free blocks and free places in the batch; none if requests wait there, for then it takes none with KV in."""
    snapshot = view.snapshots[instance]
    blocks = snapshot.num_unclaimed_blocks - view.ledger.pending_blocks(instance, snapshot.block_size)
    pending = view.ledger.num_pending(instance)
    seats = snapshot.max_num_seqs - snapshot.num_running - pending if not snapshot.num_waiting else 0
    return blocks, seats


def why_not(view: ClusterView, instance: InstanceId) -> str | None:
    """Why the instance should not be drained; None if it may be."""
    others = [i for i in view.candidates if i != instance]
    if view.states.get(instance) is InstanceState.READY and not others:
        return f"instance {instance} is the last one that takes requests: nothing could move away from it"
    return None
