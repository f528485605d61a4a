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

from arriero.core.config import MigrationConfig
from arriero.core.destination import DestinationRole
from arriero.core.door import Door
from arriero.core.engine_port import EnginePort, Export
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
    Reply,
    Reserve,
    Resume,
    refusal,
)
from arriero.core.source import SourceRole
from arriero.core.types import MigrationId, RequestId


class Llumlet:
    """Both roles of one instance. Not thread-safe: engine thread only."""

    def __init__(self, engine: EnginePort, config: MigrationConfig) -> None:
        self._source = SourceRole(engine, config)
        self._destination = DestinationRole(engine, config)
        self.door = Door(config.hold_share)

    def handle(self, message: Message, reply: Reply, now: float) -> None:
        """Carry out one operation; ``reply`` is called once, now or after a copy or a step."""
        if type(message) not in OPERATIONS:
            raise ProtocolError(f"{type(message).__name__} is no operation; see arriero.core.messages")
        try:
            self._dispatch(message, reply, now)
        except ArrieroError as error:
            reply(refusal(message, str(error)))

    def _dispatch(self, message: Message, reply: Reply, now: float) -> None:
        match message:
            case Locate():
                reply(self._source.locate(message))
            case Reserve():
                reply(self._destination.reserve(message, now))
            case Copy():
                self._source.copy(message, reply, now)
            case Load():
                self._destination.load(message, reply, now)
            case Expect():
                self.door.expect(message.migration_id, message.due_s)
                reply(Answer(migration_id=message.migration_id, op=Op.EXPECT))
            case Detach():
                self._source.detach(message, reply, now)
            case Commit():
                self.door.forget(message.migration_id)
                reply(self._destination.commit(message, now))
            case Release():
                reply(self._source.end(message, now, released=True))
            case Resume():
                reply(self._source.end(message, now, released=False))
            case _:
                assert isinstance(message, Drop)
                self.door.forget(message.migration_id)
                reply(self._destination.drop(message, now))

    # ------------------------------------------------------------------ what the engine reports

    def parked(self, request_id: RequestId, now: float) -> None:
        """A request arrived that waits for its RESERVE."""
        self._destination.parked(request_id, now)

    def copied(self, migration_id: MigrationId, export: Export | None, error: str | None, now: float) -> None:
        """A started export or import ended."""
        if not self._source.copied(migration_id, export, error, now):
            self._destination.copied(migration_id, export, error, now)

    def after_step(self, now: float) -> None:
        """A step was processed, or some time has passed."""
        self._source.after_step(now)
        self._destination.after_step(now)

    def request_gone(self, request_id: RequestId, now: float) -> None:
        """The engine finished or aborted this request by itself."""
        self._source.request_gone(request_id, now)

    # ------------------------------------------------------------------ books

    @property
    def is_idle(self) -> bool:
        """Whether nothing here can expire or settle: no timer is needed."""
        return not self.open_migrations()

    @property
    def num_incoming(self) -> int:
        """Reservations that are neither committed nor ended."""
        return self._destination.num_incoming

    def open_migrations(self) -> list[str]:
        """Every migration that still holds something here, for leak checks."""
        return self._source.open_migrations() + self._destination.open_migrations()

    def check_integrity(self) -> None:
        """Raise :class:`ProtocolError` if the books contradict themselves."""
        self._source.check_integrity()
        self._destination.check_integrity()
