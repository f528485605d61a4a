"""The destination's part in a migration: reserve, import, admit; a reservation without news frees itself.

States: RESERVED <-> IMPORTING, then COMMITTED or ENDED (both tombstones); DROPPING waits for an import in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from arriero.core.config import MigrationConfig
from arriero.core.engine_port import EnginePort, Export, with_export
from arriero.core.errors import ArrieroError, ProtocolError
from arriero.core.messages import Answer, Commit, Drop, Load, Op, Reply, Reserve, refusal
from arriero.core.types import MigrationId, RequestId


class _In(StrEnum):
    """States of the destination role."""

    RESERVED = "reserved"
    IMPORTING = "importing"
    DROPPING = "dropping"  # dropped while an import runs: blocks are freed when it ends
    COMMITTED = "committed"
    ENDED = "ended"


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


class DestinationRole:
    """Migrations that come to this instance."""

    def __init__(self, engine: EnginePort, config: MigrationConfig) -> None:
        self._engine = engine
        self._config = config
        self._incoming: dict[MigrationId, _Incoming] = {}
        self._arriving: dict[RequestId, MigrationId] = {}
        self._parked: dict[RequestId, float] = {}

    # ------------------------------------------------------------------ what the engine reports

    def parked(self, request_id: RequestId, now: float) -> None:
        """A request arrived that waits for its RESERVE."""
        self._parked[request_id] = now

    def copied(self, migration_id: MigrationId, export: Export | None, error: str | None, now: float) -> None:
        """An import ended."""
        incoming = self._incoming.get(migration_id)
        if incoming is not None and incoming.state in (_In.IMPORTING, _In.DROPPING):
            self._end_import(migration_id, incoming, export, error, now)

    def after_step(self, now: float) -> None:
        """Expire leases; forget tombstones."""
        for migration_id, incoming in list(self._incoming.items()):
            age = now - incoming.seen_s
            if incoming.state is _In.RESERVED and age > self._config.lease_s:
                self._end_incoming(incoming, "lease expired", now)
            elif incoming.state in (_In.ENDED, _In.COMMITTED) and age > self._config.tombstone_s:
                if incoming.state is _In.COMMITTED and self._engine.find(incoming.request_id) is not None:
                    incoming.seen_s = now  # an owner who still asks must not hear "no": the source would resume
                else:
                    del self._incoming[migration_id]
        for request_id in [r for r, since in self._parked.items() if now - since > self._config.lease_s]:
            self._discard_parked(request_id)

    @property
    def num_incoming(self) -> int:
        """Reservations that are neither committed nor ended."""
        return sum(i.state in (_In.RESERVED, _In.IMPORTING, _In.DROPPING) for i in self._incoming.values())

    def open_migrations(self) -> list[str]:
        """What holds something here."""
        held = [(m, i) for m, i in self._incoming.items() if i.state not in (_In.COMMITTED, _In.ENDED)]
        return [*(f"in {m} {i.request_id} {i.state}" for m, i in held), *(f"parked {r}" for r in self._parked)]

    def check_integrity(self) -> None:
        """Raise ProtocolError if a request is reserved by a migration that has ended."""
        for request_id, migration_id in self._arriving.items():
            incoming = self._incoming.get(migration_id)
            if incoming is None or incoming.state in (_In.COMMITTED, _In.ENDED):
                raise ProtocolError(f"request {request_id} is reserved by migration {migration_id}, which has ended")

    # ------------------------------------------------------------------ operations

    def reserve(self, message: Reserve, now: float) -> Answer:
        incoming = self._incoming.get(message.migration_id)
        if incoming is None:
            if message.request_id in self._arriving:
                return refusal(message, "already coming in")
            if self.num_incoming >= self._config.max_incoming:
                self._discard_parked(message.request_id)
                return refusal(message, f"{self.num_incoming} migrations are coming in already")
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
            return refusal(message, incoming.end_reason)
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

    def load(self, message: Load, reply: Reply, now: float) -> None:
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
            answer = refusal(load, incoming.end_reason)
        elif export is None:
            self._end_incoming(incoming, f"import failed: {error}", now)
            answer = refusal(load, incoming.end_reason)
        else:
            incoming.state, incoming.loaded, incoming.seen_s = _In.RESERVED, load.end, now
            answer = with_export(Answer(migration_id=migration_id, op=Op.LOAD, first=load.first, end=load.end), export)
        for reply in owed:
            reply(answer)

    def commit(self, message: Commit, now: float) -> Answer:
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
            self._engine.admit(message.request_id, message.num_computed_tokens, message.sampler_state, message.untold)
        except ArrieroError as error:
            self._end_incoming(incoming, str(error), now)
            raise
        incoming.state = _In.COMMITTED
        self._arriving.pop(message.request_id, None)
        return with_export(Answer(migration_id=message.migration_id, op=Op.COMMIT), export)

    def drop(self, message: Drop, now: float) -> Answer:
        incoming = self._incoming.setdefault(
            message.migration_id, _Incoming(message.request_id, _In.ENDED, end_reason="dropped")
        )
        if incoming.state is _In.COMMITTED:
            return refusal(message, "committed before")
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
