"""The migration protocol, as its owner runs it: answers in, commands out.

    LOCATE -> RESERVE -> (COPY -> LOAD)* -> DETACH -> COMMIT -> RELEASE

Blocks that are full never change, so they are copied while the request decodes; only the tail
waits. From DETACH until RELEASE the source keeps everything; the destination owns the request once
it has acknowledged COMMIT. What an unanswered COMMIT did is *asked* (the operation is idempotent),
never guessed.

The machine is pure: time comes in as an argument, the token log is a list that the shell appends to,
and what must be done comes out as commands. One instance of it is one attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from arriero.core.config import MigrationConfig
from arriero.core.messages import (
    OPERATIONS,
    Answer,
    Copy,
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
from arriero.core.migration_commands import Abort, Command, End, Park, Replay, Route, Send, WakeAt
from arriero.core.transfer import Transfer
from arriero.core.types import InstanceId, MigrationId, MigrationMode, Phase, RequestId


class State(StrEnum):
    """Where the owner stands; the name is the operation that it waits for."""

    LOCATING = "locating"
    RESERVING = "reserving"
    COPYING = "copying"
    LOADING = "loading"
    ALIGNING = "aligning"  #: waits for the request's next token, so that DETACH has a whole step to get there
    DETACHING = "detaching"
    COMMITTING = "committing"
    CLOSING = "closing"  #: outcome known; RELEASE / RESUME / DROP are not acknowledged yet
    CLOSED = "closed"


# ---------------------------------------------------------------------- the machine


class Migration:
    """One attempt to move one request from ``source`` to ``destination``.

    ``source`` None: a replay, the request continues from the token log alone.
    ``tokens`` is the live token log: every output token delivered to the client so far.
    ``commit_due`` estimates, at DETACH, when COMMIT will reach the destination, on the destination's clock.
    """

    def __init__(
        self,
        *,
        migration_id: MigrationId,
        request_id: RequestId,
        source: InstanceId | None,
        destination: InstanceId,
        tokens: Sequence[int],
        config: MigrationConfig,
        mode: MigrationMode = MigrationMode.LIVE,
        commit_due: Callable[[float], float] | None = None,
    ) -> None:
        self.migration_id = migration_id
        self.request_id = request_id
        self.source = source
        self.destination = destination
        self.mode = mode if source is not None else MigrationMode.RECOMPUTE
        self.state = State.LOCATING
        self.committed = False
        self.transfer = Transfer(migration_id, request_id, tokens, with_blocks=self.mode is not MigrationMode.RECOMPUTE)
        self.detach_s: float | None = None
        self.commit_s: float | None = None
        self._tokens = tokens
        self._commit_due = commit_due
        self._config = config
        self._handover: Answer | None = None
        self._client_gone = False
        self._wanted = True  # a client waits for more tokens
        self._source_lost = source is None
        self._destination_lost = False
        self._unacknowledged: dict[Op, Send] = {}
        self._asked: Send | None = None  # the operation whose answer is awaited
        self._asked_s = 0.0
        self._poll_s: float | None = None
        self._started_s = 0.0

    # ------------------------------------------------------------------ events

    def start(self, now: float) -> list[Command]:
        """Begin; call once."""
        self._started_s = now
        if self.source is None:
            return self._reserve(0, now)
        return self._ask(self.source, Locate(migration_id=self.migration_id, request_id=self.request_id), now)

    def on_answer(self, answer: Answer, now: float) -> list[Command]:
        """An operation was answered. Answers that nobody waits for are ignored."""
        if self.state is State.CLOSING:
            return self._on_closing_answer(answer)
        if self._asked is None or not _answers(answer, self._asked.message):
            return []
        match self.state:
            case State.LOCATING:
                return self._on_located(answer, now)
            case State.RESERVING:
                return self._on_reserved(answer, now)
            case State.COPYING:
                return self._on_copied(answer, now)
            case State.LOADING:
                return self._on_loaded(answer, now)
            case State.DETACHING:
                return self._on_detached(answer, now)
            case _:
                return self._on_committed(answer, now)

    def on_client_gone(self, now: float) -> list[Command]:
        """The client aborted the request (the shell has aborted nothing itself)."""
        self._client_gone, self._wanted = True, False
        match self.state:
            case State.CLOSED | State.CLOSING:
                return [Abort(self.destination if self.committed else self._source)] if self._runs_somewhere else []
            case State.COMMITTING:
                return [Abort(self.destination)]  # behind COMMIT on the same connection
        aborts: list[Command] = [] if self._source_lost else [Abort(self._source)]
        return aborts + self._give_up("client gone", now)

    def on_token(self, now: float) -> list[Command]:
        """A token of the request was delivered, and more are to come: the source's next step has just begun."""
        return self._detach(now) if self.state is State.ALIGNING else []

    def on_finished(self, now: float) -> list[Command]:
        """The request's last token was delivered (and it ended by itself)."""
        if self.state in (State.CLOSING, State.CLOSED):
            return []
        self._wanted = False
        if self.state is State.COMMITTING:
            return []  # at the destination, then: nothing is to be resumed or replayed whatever COMMIT's answer
        return self._give_up("finished", now)

    def on_instance_lost(self, instance: InstanceId, now: float) -> list[Command]:
        """``instance`` is dead, for sure."""
        self._source_lost = self._source_lost or instance == self.source
        self._destination_lost = self._destination_lost or instance == self.destination
        if self.state is State.CLOSING:
            self._unacknowledged = {o: s for o, s in self._unacknowledged.items() if s.instance != instance}
            return self._close_if_clean([])
        if self.state is State.CLOSED or instance not in (self.source, self.destination):
            return []
        if self.state is State.COMMITTING:
            # Lost with COMMIT unanswered: what the destination delivered before decides.
            return self._uncommit("destination lost", now) if self._destination_lost else []
        side = "destination" if instance == self.destination else "source"
        return self._give_up(f"{side} lost", now)

    def on_time(self, now: float) -> list[Command]:
        """Check deadlines; the shell calls this when a :class:`WakeAt` is due."""
        if self.state is State.CLOSED:
            return []
        if now < self._deadline():  # an earlier stage's timer, or one that fired a nanosecond early
            return [WakeAt(self._deadline())]
        if self.state is State.CLOSING:
            return self._close_again(now)
        if self.state is State.COMMITTING or self._poll_s is not None:
            self._poll_s = None
            return self._ask_again(now)
        if self.state is State.ALIGNING and now < self._give_up_s:
            return self._detach(now)
        return self._give_up("timeout" if now >= self._give_up_s else f"{self.state} timeout", now)

    @property
    def _runs_somewhere(self) -> bool:
        return not (self._destination_lost if self.committed else self._source_lost)

    @property
    def is_closed(self) -> bool:
        """Nothing more will be done or heard."""
        return self.state is State.CLOSED

    # ------------------------------------------------------------------ stages

    @property
    def _source(self) -> InstanceId:
        assert self.source is not None
        return self.source

    def _ask(self, instance: InstanceId, message: Message, now: float) -> list[Command]:
        self._asked, self._asked_s = Send(instance, message), now
        return [self._asked, WakeAt(self._deadline())]

    def _ask_again(self, now: float) -> list[Command]:
        assert self._asked is not None
        return self._ask(self._asked.instance, self._asked.message, now)

    def _deadline(self) -> float:
        """When to act; compared with as it is, since ``now - asked_s`` may round to less than the wait."""
        if self.state in (State.COMMITTING, State.CLOSING):
            return self._asked_s + self._config.retry_s
        if self._poll_s is not None:
            return self._poll_s
        wait_s = self._config.align_s if self.state is State.ALIGNING else self._config.stage_timeout_s
        return min(self._asked_s + wait_s, self._give_up_s)

    @property
    def _give_up_s(self) -> float:
        return self._started_s + self._config.timeout_s

    def _on_located(self, answer: Answer, now: float) -> list[Command]:
        if not answer.ok:
            return self._give_up(answer.reason, now)
        self.transfer.epoch = answer.epoch
        if answer.phase is not Phase.RUNNING:
            self.transfer.with_blocks = False  # no KV yet: moves without a copy
        ahead = self._config.reserve_ahead_blocks * answer.block_size
        return self._reserve(answer.num_tokens + ahead if self.transfer.with_blocks else 0, now)

    def _reserve(self, num_tokens: int, now: float) -> list[Command]:
        self.state = State.RESERVING
        message = Reserve(migration_id=self.migration_id, request_id=self.request_id, num_tokens=num_tokens)
        return [Park(self.destination), *self._ask(self.destination, message, now)]

    def _on_reserved(self, answer: Answer, now: float) -> list[Command]:
        if not answer.ok:
            return self._give_up(f"destination refused: {answer.reason}", now)
        self._poll_s = None
        if not answer.ready:
            if now >= self._give_up_s:
                return self._give_up("timeout", now)
            self._poll_s = now + self._config.ready_poll_s
            return [WakeAt(self._poll_s)]
        if self.source is None:
            return self._commit_replay(now)
        if self.mode is MigrationMode.LIVE and self.transfer.with_blocks:
            return self._copy(now)
        return self._align(now)

    def _copy(self, now: float) -> list[Command]:
        self.state = State.COPYING
        return self._ask(self._source, self.transfer.copy(), now)

    def _on_copied(self, answer: Answer, now: float) -> list[Command]:
        if not answer.ok:
            return self._give_up(answer.reason, now)
        load = self.transfer.load(answer)
        if load is None:
            return self._align(now)
        self.state = State.LOADING
        return self._ask(self.destination, load, now)

    def _on_loaded(self, answer: Answer, now: float) -> list[Command]:
        if not answer.ok:
            return self._give_up(f"destination refused: {answer.reason}", now)
        self.transfer.loaded(answer)
        enough = len(self.transfer.stages) >= self._config.max_stages
        if enough or self.transfer.num_behind <= self._config.stop_blocks:
            return self._align(now)
        return self._copy(now)

    def _align(self, now: float) -> list[Command]:
        """DETACH leaves as a token comes in: it cannot miss the end of the source's step, which COMMIT's estimate is
        built on, and EXPECT has that step to reach the destination. Not if no token is to be expected soon."""
        if self._commit_due is None or not self.transfer.with_blocks or not self._tokens:
            return self._detach(now)
        self.state, self._asked, self._asked_s = State.ALIGNING, None, now
        return [WakeAt(self._deadline())]

    def _detach(self, now: float) -> list[Command]:
        self.state, self.detach_s = State.DETACHING, now
        return [*self._announce(now), *self._ask(self._source, self.transfer.detach(), now)]

    def _announce(self, now: float) -> list[Command]:
        """Tell the destination when COMMIT will come, so that it can hold its door (see core/door.py)."""
        if self._commit_due is None or not self.transfer.with_blocks:
            return []
        due_s = self._commit_due(now)
        return [Send(self.destination, Expect(migration_id=self.migration_id, request_id=self.request_id, due_s=due_s))]

    def _on_detached(self, answer: Answer, now: float) -> list[Command]:
        if not answer.ok:
            return self._give_up(answer.reason, now)
        if answer.num_output_tokens != len(self._tokens):
            return self._give_up(
                f"the source handed over {answer.num_output_tokens} output tokens, "
                f"the client has received {len(self._tokens)}",
                now,
            )
        return self._commit(answer, now)

    def _commit_replay(self, now: float) -> list[Command]:
        """There is no source: the token log is all that is handed over."""
        return self._commit(
            Answer(migration_id=self.migration_id, op=Op.DETACH, num_output_tokens=len(self._tokens)), now
        )

    def _commit(self, handover: Answer, now: float) -> list[Command]:
        self.state, self.commit_s, self._handover = State.COMMITTING, now, handover
        return [Route(self.destination), *self._ask(self.destination, self.transfer.commit(handover), now)]

    def _on_committed(self, answer: Answer, now: float) -> list[Command]:
        self.committed = answer.ok
        if answer.ok:
            closing = [] if self._source_lost else [self._closing(self._source, Release)]
            return self._close(closing, True, "", now)
        return self._uncommit(f"destination refused: {answer.reason}", now)

    # ------------------------------------------------------------------ ways out

    def _uncommit(self, reason: str, now: float) -> list[Command]:
        """COMMIT did not happen, for sure: the source continues, or the token log does."""
        assert self._handover is not None
        delivered = len(self._tokens) > self._handover.num_output_tokens
        closing = [] if self._destination_lost else [self._closing(self.destination, Drop)]
        before: list[Command] = []
        if not self._source_lost:
            stays = self._wanted and not delivered
            closing.append(self._closing(self._source, Resume if stays else Release))
            if stays:
                before = [Route(self._source)]
        replay = self._wanted and (self._source_lost or delivered)
        return [*before, *self._close(closing, False, reason, now), *([Replay()] if replay else [])]

    def _give_up(self, reason: str, now: float) -> list[Command]:
        """Before COMMIT: the source carries on, the destination forgets."""
        closing = []
        if not self._source_lost:
            closing.append(self._closing(self._source, Resume))
        if not self._destination_lost and self.state is not State.LOCATING:
            closing.append(self._closing(self.destination, Drop))
        replay = self._wanted and self._source_lost
        return [*self._close(closing, False, reason, now), *([Replay()] if replay else [])]

    def _closing(self, instance: InstanceId, kind: type[Release] | type[Resume] | type[Drop]) -> Send:
        return Send(instance, kind(migration_id=self.migration_id, request_id=self.request_id))

    def _close(self, closing: list[Send], ok: bool, reason: str, now: float) -> list[Command]:
        self.state, self._asked, self._asked_s = State.CLOSING, None, now
        self._unacknowledged = {OPERATIONS[type(s.message)]: s for s in closing}
        end = End(ok, "client gone" if self._client_gone and ok else reason)
        return [*closing, *([WakeAt(self._deadline())] if closing else []), *self._close_if_clean([end])]

    def _close_if_clean(self, commands: list[Command]) -> list[Command]:
        if not self._unacknowledged:
            self.state = State.CLOSED
        return commands

    def _on_closing_answer(self, answer: Answer) -> list[Command]:
        self._unacknowledged.pop(answer.op, None)
        return self._close_if_clean([])

    def _close_again(self, now: float) -> list[Command]:
        self._asked_s = now
        return [*self._unacknowledged.values(), WakeAt(self._deadline())]


def _answers(answer: Answer, message: Message) -> bool:
    """Whether this is the answer that is awaited, not a late one of an earlier stage."""
    if OPERATIONS[type(message)] is not answer.op:
        return False
    return not (answer.ok and isinstance(message, Copy | Load)) or answer.first == message.first
