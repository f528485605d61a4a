"""The llumlet: an instance's part in migrations, as source and as destination.

Pure bookkeeping over an :class:`EnginePort`; the production engine and the simulator's engine run
the same one. It guarantees, whatever the owner or the network does:

- operations are idempotent and answered even for migrations that ended (tombstones);
- a reservation that hears nothing for its lease frees itself, but never while an import into its
  blocks is in flight (the import would overwrite blocks that belong to somebody else by then);
- a frozen request keeps its blocks until RELEASE or RESUME: the source never resumes on a guess;
- RELEASE frees nothing but what its own migration detached, however late it comes;
- after DROP, an expired lease or a refused COMMIT, a COMMIT of the same migration is refused for good;
- a COMMIT that was carried out is remembered for as long as the request is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from arriero.core.config import MigrationConfig
from arriero.core.door import Door
from arriero.core.errors import ArrieroError, ProtocolError
from arriero.core.messages import (
    OPERATIONS,
    Answer,
    Commit,
    Copy,
    Detach,
    Drop,
    Expect,
    Load,
    Locate,
    Message,
    Op,
    Release,
    Reserve,
    Resume,
)
from arriero.core.types import MigrationId, Phase, RequestId

Reply = Callable[[Answer], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """What the engine knows of a request right now."""

    phase: Phase
    num_tokens: int  #: prompt + output
    num_output_tokens: int
    num_computed_tokens: int  #: KV entries that are settled (steps in flight not counted)
    in_flight: bool  #: a step whose output has not been processed holds the request
    epoch: int  #: preemption count
    unmovable: str | None = None  #: why it cannot move


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Blocks that were exported: what the destination's transport needs, and what it cost."""

    ticket: Any
    num_bytes: int = 0
    copy_s: float = 0.0
    sampler_state: bytes | None = None  #: with the last export only


class EnginePort(Protocol):
    """What a llumlet needs of its engine; complete, since a migration is only these moves.

    Every method is called on the engine's own thread, between two steps. ``start_*`` return at
    once; the engine reports with :meth:`Llumlet.copied` later, on the same thread. Methods raise
    :class:`ArrieroError` with the reason if they can't.
    """

    block_size: int

    def find(self, request_id: RequestId) -> RequestStatus | None:
        """The request as this engine runs it; None if it is not here (or only parked)."""

    def start_export(self, migration_id: MigrationId, request_id: RequestId, first: int, max_end: int) -> int:
        """Begin to export blocks ``[first, end)`` with ``end <= max_end``; returns ``end``."""

    def export_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, with_blocks: bool
    ) -> Export:
        """Export ``[first, end)`` and the sampler's state now, of a frozen request."""

    def close_export(self, migration_id: MigrationId) -> None:
        """Free what the exports of this migration hold (staging memory). Idempotent."""

    def freeze(self, request_id: RequestId) -> None:
        """Take the request out of scheduling; it keeps its blocks."""

    def unfreeze(self, request_id: RequestId) -> None:
        """Put a frozen request back where it was."""

    def release(self, request_id: RequestId) -> None:
        """Free the request without telling its client. Idempotent."""

    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        """Take the parked request and allocate blocks for ``num_tokens``."""

    def is_ready(self, request_id: RequestId) -> bool:
        """Whether the reserved request could be scheduled at once (grammar compiled)."""

    def grow(self, request_id: RequestId, num_tokens: int) -> None:
        """Extend the reservation to ``num_tokens``."""

    def extend(self, request_id: RequestId, output_token_ids: tuple[int, ...]) -> None:
        """Tell the reserved request output tokens that its client has received."""

    def start_import(self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any) -> None:
        """Begin to import blocks ``[first, end)`` of the reservation."""

    def import_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any
    ) -> Export:
        """Import ``[first, end)`` by the time :meth:`admit`, which follows at once, returns.

        The result says what it cost; its ``ticket`` is unused.
        """

    def admit(self, request_id: RequestId, num_computed_tokens: int, sampler_state: bytes | None) -> None:
        """Schedule the reserved request: it continues at the next token."""

    def discard(self, request_id: RequestId) -> None:
        """Free a reservation or a parked request. Idempotent."""


class _Out(StrEnum):
    """States of the source role."""

    COPYING = "copying"
    EXPORTING = "exporting"  # an export runs; its answer is owed
    DETACHING = "detaching"  # frozen, waits for steps in flight
    DETACHED = "detached"
    ENDED = "ended"


class _In(StrEnum):
    """States of the destination role."""

    RESERVED = "reserved"
    IMPORTING = "importing"
    DROPPING = "dropping"  # dropped while an import runs: blocks are freed when it ends
    COMMITTED = "committed"
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


@dataclass(slots=True)
class _Incoming:
    request_id: RequestId
    state: _In = _In.RESERVED
    seen_s: float = 0.0
    known: int = 0  # output tokens told so far
    loaded: int = 0  # blocks [0, loaded) are imported
    load: Load | None = None
    owed: list[Reply] = field(default_factory=list)
    end_reason: str = ""


class Llumlet:
    """Both roles of one instance. Not thread-safe: engine thread only."""

    def __init__(self, engine: EnginePort, config: MigrationConfig) -> None:
        self._engine = engine
        self._config = config
        self._outgoing: dict[MigrationId, _Outgoing] = {}
        self._incoming: dict[MigrationId, _Incoming] = {}
        self._frozen: dict[RequestId, MigrationId] = {}
        self._arriving: dict[RequestId, MigrationId] = {}
        self._parked: dict[RequestId, float] = {}
        self.door = Door(config.hold_share)

    # ------------------------------------------------------------------ entry points

    def handle(self, message: Message, reply: Reply, now: float) -> None:
        """Carry out one operation; ``reply`` is called once, now or after a copy or a step."""
        if type(message) not in OPERATIONS:
            raise ProtocolError(f"{type(message).__name__} is no operation; see arriero.core.messages")
        try:
            self._dispatch(message, reply, now)
        except ArrieroError as error:
            reply(self._refusal(message, str(error)))

    def copied(self, migration_id: MigrationId, export: Export | None, error: str | None, now: float) -> None:
        """The engine's report that a started export or import ended."""
        outgoing = self._outgoing.get(migration_id)
        incoming = self._incoming.get(migration_id)
        if outgoing is not None and outgoing.exporting:
            outgoing.exporting = False
            if outgoing.state is _Out.EXPORTING:
                self._end_export(outgoing, export, error, now)
            else:
                self._engine.close_export(migration_id)
        elif incoming is not None and incoming.state in (_In.IMPORTING, _In.DROPPING):
            self._end_import(migration_id, incoming, export, error, now)

    def after_step(self, now: float) -> None:
        """Settle detaches whose last step has been processed; expire leases; forget tombstones."""
        for migration_id in [m for m, o in self._outgoing.items() if o.state is _Out.DETACHING]:
            self._settle_detach(migration_id, now)
        for migration_id, incoming in list(self._incoming.items()):
            age = now - incoming.seen_s
            if incoming.state is _In.RESERVED and age > self._config.lease_s:
                self._end_incoming(incoming, "lease expired", now)
            elif incoming.state in (_In.ENDED, _In.COMMITTED) and age > self._config.tombstone_s:
                if incoming.state is _In.COMMITTED and self._engine.find(incoming.request_id) is not None:
                    incoming.seen_s = now  # an owner who still asks must not hear "no": the source would resume
                else:
                    del self._incoming[migration_id]
        for migration_id, outgoing in list(self._outgoing.items()):
            age = now - outgoing.seen_s
            if outgoing.state is _Out.COPYING and age > self._config.lease_s:
                self._end_outgoing(migration_id, outgoing, now)
            elif outgoing.state is _Out.ENDED and not outgoing.exporting and age > self._config.tombstone_s:
                del self._outgoing[migration_id]

        for request_id in [r for r, since in self._parked.items() if now - since > self._config.lease_s]:
            self._discard_parked(request_id)

    def parked(self, request_id: RequestId, now: float) -> None:
        """A request arrived that waits for its RESERVE."""
        self._parked[request_id] = now

    def request_gone(self, request_id: RequestId, now: float) -> None:
        """The engine finished or aborted this request by itself."""
        for migration_id, outgoing in list(self._outgoing.items()):
            if outgoing.request_id == request_id and outgoing.state is _Out.DETACHING:
                self._settle_detach(migration_id, now)

    @property
    def is_idle(self) -> bool:
        """Whether nothing here can expire or settle: no timer is needed."""
        return not self.open_migrations()

    @property
    def num_incoming(self) -> int:
        """Reservations that are neither committed nor ended."""
        return sum(i.state in (_In.RESERVED, _In.IMPORTING, _In.DROPPING) for i in self._incoming.values())

    def open_migrations(self) -> list[str]:
        """Every migration that still holds something here, for leak checks."""
        outgoing = [(m, o) for m, o in self._outgoing.items() if o.state is not _Out.ENDED or o.exporting]
        incoming = [(m, i) for m, i in self._incoming.items() if i.state not in (_In.COMMITTED, _In.ENDED)]
        return [
            *(f"out {m} {o.request_id} {o.state}" for m, o in outgoing),
            *(f"in {m} {i.request_id} {i.state}" for m, i in incoming),
            *(f"parked {r}" for r in self._parked),
        ]

    def check_integrity(self) -> None:
        """Raise :class:`ProtocolError` if the books contradict themselves."""
        for request_id, migration_id in self._frozen.items():
            outgoing = self._outgoing.get(migration_id)
            if outgoing is None or outgoing.state not in (_Out.DETACHING, _Out.DETACHED):
                raise ProtocolError(
                    f"request {request_id} is frozen by migration {migration_id}, which is not detached"
                )
        for request_id, migration_id in self._arriving.items():
            incoming = self._incoming.get(migration_id)
            if incoming is None or incoming.state in (_In.COMMITTED, _In.ENDED):
                raise ProtocolError(f"request {request_id} is reserved by migration {migration_id}, which has ended")

    # ------------------------------------------------------------------ dispatch

    def _dispatch(self, message: Message, reply: Reply, now: float) -> None:
        match message:
            case Locate():
                reply(self._locate(message))
            case Reserve():
                reply(self._reserve(message, now))
            case Copy():
                self._copy(message, reply, now)
            case Load():
                self._load(message, reply, now)
            case Expect():
                self.door.expect(message.migration_id, now + message.in_s)
                reply(Answer(migration_id=message.migration_id, op=Op.EXPECT))
            case Detach():
                self._detach(message, reply, now)
            case Commit():
                self.door.forget(message.migration_id)
                reply(self._commit(message, now))
            case Release():
                reply(self._end_source(message, now, released=True))
            case Resume():
                reply(self._end_source(message, now, released=False))
            case _:
                assert isinstance(message, Drop)
                self.door.forget(message.migration_id)
                reply(self._drop(message, now))

    @staticmethod
    def _refusal(message: Message, reason: str) -> Answer:
        return Answer(migration_id=message.migration_id, op=OPERATIONS[type(message)], ok=False, reason=reason)

    # ------------------------------------------------------------------ source

    def _locate(self, message: Locate) -> Answer:
        status = self._engine.find(message.request_id)
        if status is None:
            return self._refusal(message, "gone")
        if status.unmovable is not None:
            return self._refusal(message, f"unmovable: {status.unmovable}")
        if message.request_id in self._frozen:
            return self._refusal(message, "already moving")
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

    def _copy(self, message: Copy, reply: Reply, now: float) -> None:
        outgoing = self._outgoing.setdefault(message.migration_id, _Outgoing(message.request_id))
        outgoing.seen_s = now
        same = outgoing.answer is not None and outgoing.answer.first == message.first
        if outgoing.state is _Out.EXPORTING and same:
            outgoing.owed.append(reply)
            return
        if outgoing.state is not _Out.COPYING:
            reply(self._refusal(message, _why_not(outgoing)))
            return
        status = self._movable(message.request_id, message.epoch)
        if isinstance(status, str) or status.phase is not Phase.RUNNING:
            reply(self._refusal(message, status if isinstance(status, str) else "preempted"))
            return
        if outgoing.answer is not None and message.first != outgoing.answer.end:
            # Asked again, or late: a new export would overwrite what the destination imports now.
            reply(outgoing.answer if same else self._refusal(message, "out of order"))
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
            answer = outgoing.answer = _with_export(answer, export)
        for reply in owed:
            reply(answer)

    def _detach(self, message: Detach, reply: Reply, now: float) -> None:
        outgoing = self._outgoing.setdefault(message.migration_id, _Outgoing(message.request_id))
        outgoing.seen_s = now
        if outgoing.state is _Out.DETACHED and outgoing.answer is not None:
            reply(outgoing.answer)
            return
        if outgoing.state is _Out.DETACHING:
            outgoing.owed.append(reply)
            return
        if outgoing.state is not _Out.COPYING:
            reply(self._refusal(message, _why_not(outgoing)))
            return
        status = self._movable(message.request_id, message.epoch)
        if isinstance(status, str):
            reply(self._refusal(message, status))
            return
        if message.request_id in self._frozen:
            reply(self._refusal(message, "already moving"))
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
            answer = self._refusal(detach, "gone")
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
            return self._refusal(detach, f"export failed: {error}")
        answer = Answer(
            migration_id=detach.migration_id,
            op=Op.DETACH,
            first=min(detach.first, end),
            end=end,
            num_output_tokens=status.num_output_tokens,
            num_computed_tokens=num_computed,
        )
        return _with_export(answer, export)

    def _end_source(self, message: Release | Resume, now: float, *, released: bool) -> Answer:
        """RELEASE frees the request here, RESUME keeps it; both end the migration at the source."""
        migration_id = message.migration_id
        outgoing = self._outgoing.setdefault(migration_id, _Outgoing(message.request_id))
        op = OPERATIONS[type(message)]
        if outgoing.state is _Out.ENDED:
            outgoing.seen_s = now
            if outgoing.released is not released:
                return self._refusal(message, "released before" if outgoing.released else "resumed before")
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

    # ------------------------------------------------------------------ destination

    def _reserve(self, message: Reserve, now: float) -> Answer:
        incoming = self._incoming.get(message.migration_id)
        if incoming is None:
            if message.request_id in self._arriving:
                return self._refusal(message, "already coming in")
            if self.num_incoming >= self._config.max_incoming:
                self._discard_parked(message.request_id)
                return self._refusal(message, f"{self.num_incoming} migrations are coming in already")
            try:
                self._engine.reserve(message.request_id, message.num_tokens)
            except ArrieroError:
                self._discard_parked(message.request_id)
                raise
            self._parked.pop(message.request_id, None)
            incoming = self._incoming[message.migration_id] = _Incoming(message.request_id)
            self._arriving[message.request_id] = message.migration_id
        elif incoming.state in (_In.ENDED, _In.DROPPING):
            self._discard_parked(message.request_id)
            return self._refusal(message, incoming.end_reason)
        incoming.seen_s = now
        ready = incoming.state is _In.COMMITTED or self._engine.is_ready(message.request_id)
        return Answer(migration_id=message.migration_id, op=Op.RESERVE, ready=ready)

    def _discard_parked(self, request_id: RequestId) -> None:
        """Not while a reservation has the same request: the engine could not tell which is meant."""
        if request_id in self._parked and request_id not in self._arriving:
            del self._parked[request_id]
            self._engine.discard(request_id)

    def _live_incoming(self, message: Load | Commit, now: float) -> _Incoming:
        incoming = self._incoming.setdefault(
            message.migration_id, _Incoming(message.request_id, _In.ENDED, now, end_reason="no such reservation")
        )
        if incoming.state in (_In.ENDED, _In.DROPPING):
            raise ProtocolError(incoming.end_reason)
        incoming.seen_s = now
        return incoming

    def _learn(self, incoming: _Incoming, known: int, output_token_ids: tuple[int, ...]) -> None:
        if known > incoming.known:
            raise ProtocolError(f"output tokens {incoming.known}..{known} were never told")
        news = output_token_ids[incoming.known - known :]
        if news:
            self._engine.extend(incoming.request_id, news)
            incoming.known += len(news)

    def _load(self, message: Load, reply: Reply, now: float) -> None:
        incoming = self._live_incoming(message, now)
        if incoming.load == message:
            incoming.owed.append(reply)
            return
        if incoming.state is _In.IMPORTING:
            raise ProtocolError("an import is running")
        if incoming.state is _In.COMMITTED or message.end <= incoming.loaded:
            reply(Answer(migration_id=message.migration_id, op=Op.LOAD, first=message.first, end=message.end))
            return
        if message.first != incoming.loaded:
            raise ProtocolError(f"blocks {incoming.loaded}..{message.first} were never loaded")
        try:
            self._learn(incoming, message.known, message.output_token_ids)
            num_tokens = (message.end + self._config.reserve_ahead_blocks) * self._engine.block_size
            self._engine.grow(message.request_id, num_tokens)
            self._engine.start_import(
                message.migration_id, message.request_id, message.first, message.end, message.ticket
            )
        except ArrieroError as error:
            self._end_incoming(incoming, str(error), now)
            raise
        incoming.state, incoming.load = _In.IMPORTING, message
        incoming.owed.append(reply)

    def _end_import(
        self, migration_id: MigrationId, incoming: _Incoming, export: Export | None, error: str | None, now: float
    ) -> None:
        load, owed, incoming.owed = incoming.load, incoming.owed, []
        assert load is not None
        incoming.load = None
        if incoming.state is _In.DROPPING:
            self._end_incoming(incoming, incoming.end_reason, now)
            answer = self._refusal(load, incoming.end_reason)
        elif export is None:
            self._end_incoming(incoming, f"import failed: {error}", now)
            answer = self._refusal(load, incoming.end_reason)
        else:
            incoming.state, incoming.loaded, incoming.seen_s = _In.RESERVED, load.end, now
            answer = _with_export(Answer(migration_id=migration_id, op=Op.LOAD, first=load.first, end=load.end), export)
        for reply in owed:
            reply(answer)

    def _commit(self, message: Commit, now: float) -> Answer:
        incoming = self._live_incoming(message, now)
        if incoming.state is _In.COMMITTED:
            return Answer(migration_id=message.migration_id, op=Op.COMMIT)
        if incoming.state is _In.IMPORTING:  # the owner resumes the source now: asked again, it is still no
            incoming.state, incoming.end_reason = _In.DROPPING, "an import is running"
            raise ProtocolError(incoming.end_reason)
        export = Export(ticket=None)
        try:
            self._learn(incoming, message.known, message.output_token_ids)
            if incoming.known != message.num_output_tokens:
                raise ProtocolError(f"{message.num_output_tokens} output tokens handed over, {incoming.known} told")
            if message.num_computed_tokens and message.first != incoming.loaded:
                raise ProtocolError(f"blocks {incoming.loaded}..{message.first} were never loaded")
            self._engine.grow(message.request_id, message.num_computed_tokens)
            if message.end > message.first:
                export = self._engine.import_rest(
                    message.migration_id, message.request_id, message.first, message.end, message.ticket
                )
            self._engine.admit(message.request_id, message.num_computed_tokens, message.sampler_state)
        except ArrieroError as error:
            self._end_incoming(incoming, str(error), now)
            raise
        incoming.state = _In.COMMITTED
        self._arriving.pop(message.request_id, None)
        return _with_export(Answer(migration_id=message.migration_id, op=Op.COMMIT), export)

    def _drop(self, message: Drop, now: float) -> Answer:
        incoming = self._incoming.setdefault(
            message.migration_id, _Incoming(message.request_id, _In.ENDED, end_reason="dropped")
        )
        if incoming.state is _In.COMMITTED:
            return self._refusal(message, "committed before")
        if incoming.state is _In.IMPORTING:
            incoming.state, incoming.end_reason = _In.DROPPING, "dropped"
        elif incoming.state is _In.RESERVED:
            self._end_incoming(incoming, "dropped", now)
        elif incoming.state is _In.ENDED:
            self._discard_parked(message.request_id)
        incoming.seen_s = now
        return Answer(migration_id=message.migration_id, op=Op.DROP)

    def _end_incoming(self, incoming: _Incoming, reason: str, now: float) -> None:
        incoming.state, incoming.end_reason, incoming.seen_s = _In.ENDED, reason, now
        del self._arriving[incoming.request_id]
        self._engine.discard(incoming.request_id)


def _why_not(outgoing: _Outgoing) -> str:
    """Why a migration in this state takes no COPY or DETACH."""
    return {_Out.EXPORTING: "export running", _Out.ENDED: "migration ended here"}.get(outgoing.state, "detached")


def _with_export(answer: Answer, export: Export) -> Answer:
    return replace(
        answer,
        ticket=export.ticket,
        num_bytes=export.num_bytes,
        copy_s=export.copy_s,
        sampler_state=export.sampler_state,
    )
