"""The source's part in a migration: export while the request runs, detach, and keep it until told.

States: COPYING <-> EXPORTING, then DETACHING -> DETACHED, then ENDED (a tombstone).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from arriero.core.config import MigrationConfig
from arriero.core.engine_port import EnginePort, Export, RequestStatus, with_export
from arriero.core.errors import ArrieroError, ProtocolError
from arriero.core.messages import OPERATIONS, Answer, Copy, Detach, Locate, Op, Release, Reply, Resume, refusal
from arriero.core.types import MigrationId, Phase, RequestId


class _Out(StrEnum):
    """States of the source role."""

    COPYING = "copying"
    EXPORTING = "exporting"  # an export runs; its answer is owed
    DETACHING = "detaching"  # frozen, waits for steps in flight
    DETACHED = "detached"
    ENDED = "ended"


@dataclass(slots=True)
class _Outgoing:
    request_id: RequestId
    state: _Out = _Out.COPYING
    answer: Answer | None = None  # of the copy in flight, of the last copy, or of the finished detach
    detach: Detach | None = None
    owed: list[Reply] = field(default_factory=list)
    seen_s: float = 0.0
    released: bool = False
    exporting: bool = False  # the engine still writes into the staging memory


class SourceRole:
    """Migrations that leave this instance."""

    def __init__(self, engine: EnginePort, config: MigrationConfig) -> None:
        self._engine = engine
        self._config = config
        self._outgoing: dict[MigrationId, _Outgoing] = {}
        self._frozen: dict[RequestId, MigrationId] = {}

    # ------------------------------------------------------------------ what the engine reports

    def copied(self, migration_id: MigrationId, export: Export | None, error: str | None, now: float) -> bool:
        """An export ended. False: it is none of this role's."""
        outgoing = self._outgoing.get(migration_id)
        if outgoing is None or not outgoing.exporting:
            return False
        outgoing.exporting = False
        if outgoing.state is _Out.EXPORTING:
            self._end_export(outgoing, export, error, now)
        else:
            self._engine.close_export(migration_id)
        return True

    def after_step(self, now: float) -> None:
        """Settle detaches whose last step has been processed; expire leases; forget tombstones."""
        for migration_id in [m for m, o in self._outgoing.items() if o.state is _Out.DETACHING]:
            self._settle_detach(migration_id, now)
        for migration_id, outgoing in list(self._outgoing.items()):
            age = now - outgoing.seen_s
            if outgoing.state is _Out.COPYING and age > self._config.lease_s:
                self._end_outgoing(migration_id, outgoing, now)
            elif outgoing.state is _Out.ENDED and not outgoing.exporting and age > self._config.tombstone_s:
                del self._outgoing[migration_id]

    def request_gone(self, request_id: RequestId, now: float) -> None:
        """The engine finished or aborted this request by itself."""
        for migration_id, outgoing in list(self._outgoing.items()):
            if outgoing.request_id == request_id and outgoing.state is _Out.DETACHING:
                self._settle_detach(migration_id, now)

    def open_migrations(self) -> list[str]:
        """What holds something here."""
        held = [(m, o) for m, o in self._outgoing.items() if o.state is not _Out.ENDED or o.exporting]
        return [f"out {m} {o.request_id} {o.state}" for m, o in held]

    def check_integrity(self) -> None:
        """Raise ProtocolError if a request is frozen by a migration that is not detached."""
        for request_id, migration_id in self._frozen.items():
            outgoing = self._outgoing.get(migration_id)
            if outgoing is None or outgoing.state not in (_Out.DETACHING, _Out.DETACHED):
                raise ProtocolError(
                    f"request {request_id} is frozen by migration {migration_id}, which is not detached"
                )

    # ------------------------------------------------------------------ operations

    def locate(self, message: Locate) -> Answer:
        status = self._engine.find(message.request_id)
        if status is None:
            return refusal(message, "gone")
        if status.unmovable is not None:
            return refusal(message, f"unmovable: {status.unmovable}")
        if message.request_id in self._frozen:
            return refusal(message, "already moving")
        return Answer(
            migration_id=message.migration_id,
            op=Op.LOCATE,
            phase=status.phase,
            num_tokens=status.num_tokens,
            block_size=self._engine.block_size,
            epoch=status.epoch,
        )

    def _movable(self, request_id: RequestId, epoch: int) -> RequestStatus | str:
        """The request's status, or why the migration must stop."""
        status = self._engine.find(request_id)
        if status is None:
            return "gone"
        if epoch >= 0 and status.epoch != epoch:
            return "preempted"
        return status

    def copy(self, message: Copy, reply: Reply, now: float) -> None:
        outgoing = self._outgoing.setdefault(message.migration_id, _Outgoing(message.request_id))
        outgoing.seen_s = now
        same = outgoing.answer is not None and outgoing.answer.first == message.first
        if outgoing.state is _Out.EXPORTING and same:
            outgoing.owed.append(reply)
            return
        if outgoing.state is not _Out.COPYING:
            reply(refusal(message, _why_not(outgoing)))
            return
        status = self._movable(message.request_id, message.epoch)
        if isinstance(status, str) or status.phase is not Phase.RUNNING:
            reply(refusal(message, status if isinstance(status, str) else "preempted"))
            return
        if outgoing.answer is not None and message.first != outgoing.answer.end:
            # Asked again, or late: a new export would overwrite what the destination imports now.
            reply(outgoing.answer if same else refusal(message, "out of order"))
            return
        settled = status.num_computed_tokens // self._engine.block_size
        end = message.first
        if settled > message.first:
            end = self._engine.start_export(message.migration_id, message.request_id, message.first, settled)
            outgoing.state, outgoing.exporting = _Out.EXPORTING, True
        answer = Answer(
            migration_id=message.migration_id,
            op=Op.COPY,
            num_tokens=status.num_tokens,
            epoch=status.epoch,
            first=message.first,
            end=end,
            settled_blocks=settled,
        )
        if outgoing.state is _Out.EXPORTING:
            outgoing.answer = answer
            outgoing.owed.append(reply)
        else:
            reply(answer)

    def _end_export(self, outgoing: _Outgoing, export: Export | None, error: str | None, now: float) -> None:
        answer, owed = outgoing.answer, outgoing.owed
        assert answer is not None
        outgoing.state, outgoing.answer, outgoing.owed, outgoing.seen_s = _Out.COPYING, None, [], now
        if export is None:
            answer = Answer(migration_id=answer.migration_id, op=Op.COPY, ok=False, reason=f"export failed: {error}")
        else:
            answer = outgoing.answer = with_export(answer, export)
        for reply in owed:
            reply(answer)

    def detach(self, message: Detach, reply: Reply, now: float) -> None:
        outgoing = self._outgoing.setdefault(message.migration_id, _Outgoing(message.request_id))
        outgoing.seen_s = now
        if outgoing.state is _Out.DETACHED and outgoing.answer is not None:
            reply(outgoing.answer)
            return
        if outgoing.state is _Out.DETACHING:
            outgoing.owed.append(reply)
            return
        if outgoing.state is not _Out.COPYING:
            reply(refusal(message, _why_not(outgoing)))
            return
        status = self._movable(message.request_id, message.epoch)
        if isinstance(status, str):
            reply(refusal(message, status))
            return
        if message.request_id in self._frozen:
            reply(refusal(message, "already moving"))
            return
        self._engine.freeze(message.request_id)
        self._frozen[message.request_id] = message.migration_id
        outgoing.state, outgoing.detach = _Out.DETACHING, message
        outgoing.owed.append(reply)
        self._settle_detach(message.migration_id, now)

    def _settle_detach(self, migration_id: MigrationId, now: float) -> None:
        outgoing = self._outgoing[migration_id]
        detach = outgoing.detach
        assert detach is not None
        status = self._engine.find(outgoing.request_id)
        if status is not None and status.in_flight:
            return
        owed, outgoing.owed = outgoing.owed, []
        if status is None:
            answer = refusal(detach, "gone")
            self._end_outgoing(migration_id, outgoing, now)
        else:
            answer = self._hand_over(detach, status)
            if answer.ok:
                outgoing.state, outgoing.answer = _Out.DETACHED, answer
            else:
                self._end_outgoing(migration_id, outgoing, now)
        for reply in owed:
            reply(answer)

    def _hand_over(self, detach: Detach, status: RequestStatus) -> Answer:
        num_computed = status.num_computed_tokens if detach.with_blocks else 0
        end = -(-num_computed // self._engine.block_size)
        try:
            export = self._engine.export_rest(
                detach.migration_id, detach.request_id, detach.first, end, detach.with_blocks
            )
        except ArrieroError as error:
            return refusal(detach, f"export failed: {error}")
        answer = Answer(
            migration_id=detach.migration_id,
            op=Op.DETACH,
            first=min(detach.first, end),
            end=end,
            num_output_tokens=status.num_output_tokens,
            num_computed_tokens=num_computed,
        )
        return with_export(answer, export)

    def end(self, message: Release | Resume, now: float, *, released: bool) -> Answer:
        """RELEASE frees the request here, RESUME keeps it; both end the migration at the source."""
        migration_id = message.migration_id
        outgoing = self._outgoing.setdefault(migration_id, _Outgoing(message.request_id))
        op = OPERATIONS[type(message)]
        if outgoing.state is _Out.ENDED:
            outgoing.seen_s = now
            if outgoing.released is not released:
                return refusal(message, "released before" if outgoing.released else "resumed before")
            return Answer(migration_id=migration_id, op=op)
        if released and self._frozen.get(message.request_id) == migration_id:
            del self._frozen[message.request_id]
            self._engine.release(message.request_id)
        owed, outgoing.owed, outgoing.released = outgoing.owed, [], released
        pending = Op.DETACH if outgoing.state is _Out.DETACHING else Op.COPY
        self._end_outgoing(migration_id, outgoing, now)
        for reply in owed:
            reply(Answer(migration_id=migration_id, op=pending, ok=False, reason=f"{op} came first"))
        return Answer(migration_id=migration_id, op=op)

    def _end_outgoing(self, migration_id: MigrationId, outgoing: _Outgoing, now: float) -> None:
        """Back to normal life: unfreeze if this migration froze it, free the staging memory."""
        if self._frozen.get(outgoing.request_id) == migration_id:
            del self._frozen[outgoing.request_id]
            if self._engine.find(outgoing.request_id) is not None:
                self._engine.unfreeze(outgoing.request_id)
        outgoing.state, outgoing.answer, outgoing.detach, outgoing.seen_s = _Out.ENDED, None, None, now
        if not outgoing.exporting:
            self._engine.close_export(migration_id)


def _why_not(outgoing: _Outgoing) -> str:
    """Why a migration in this state takes no COPY or DETACH."""
    return {_Out.EXPORTING: "export running", _Out.ENDED: "migration ended here"}.get(outgoing.state, "detached")
