"""A whole cluster in one thread: front end, network, instances; every interleaving is the caller's choice.

The front end does what production's does: it keeps the token log, follows the route, runs one
migration at a time for a request and replays what a crash orphaned. The network keeps each
connection's order and may take any time; answers can be lost, messages repeated.

:meth:`Cluster.check` states the laws that hold after every step, :meth:`Cluster.quiesce` those that
hold when everything has come to rest.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fake_engine import FakeEngine, Spec, Staging, reference

from arriero.core.config import MigrationConfig
from arriero.core.llumlet import Llumlet
from arriero.core.messages import OPERATIONS, Answer, Message, Op
from arriero.core.migration import Migration, State
from arriero.core.migration_commands import Abort, Command, End, Park, Replay, Route, Send, WakeAt
from arriero.core.types import MigrationId, MigrationMode, Phase, RequestId

FRONT_END = -1
REPLAY_BACKOFF_S = 0.5


@dataclass(frozen=True, slots=True)
class Add:
    spec: Spec


@dataclass(frozen=True, slots=True)
class Parked:
    spec: Spec


@dataclass(frozen=True, slots=True)
class Gone:
    """The front end's "abort this request"."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Output:
    request_id: RequestId
    tokens: list[int]
    finished: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection is closed for good: the last thing heard from an instance."""


Packet = Add | Parked | Gone | Output | Lost | Message | Answer
Link = tuple[int, int]


@dataclass(eq=False, slots=True)
class Stream:
    """A client's request, as the front end knows it."""

    spec: Spec
    route: int
    log: list[int] = field(default_factory=list)
    migration: Migration | None = None  # the latest attempt
    ended: bool = True  # whether that attempt has said End
    replay_at: float | None = None  # nobody runs it: when to try again
    finished: bool = False
    gone: bool = False

    @property
    def is_open(self) -> bool:
        return not (self.finished or self.gone)


class Cluster:
    """The model. ``counts`` says what was reached: vacuous runs show."""

    def __init__(
        self,
        num_instances: int = 2,
        *,
        config: MigrationConfig | None = None,
        num_blocks: int | list[int] = 16,
        max_num_seqs: int = 4,
        depth: int = 1,
        stage_blocks: int = 2,
    ) -> None:
        self.config = config or MigrationConfig()
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.staging: Staging = {}
        self.engines: dict[int, FakeEngine] = {}
        self.llumlets: dict[int, Llumlet] = {}
        self.dead: set[int] = set()  # crashed
        self.lost: set[int] = set()  # crashed, and the front end knows
        self.links: dict[Link, deque[Packet]] = {}
        self.streams: dict[RequestId, Stream] = {}
        self.migrations: dict[MigrationId, Migration] = {}
        self.ends: dict[MigrationId, End] = {}
        self.losing: list[tuple[int, Op]] = []  # answers that will be lost when sent
        self.sent: list[tuple[int, Message]] = []  # operations, in the order of their sending
        self._timers: list[tuple[float, int, MigrationId]] = []
        self._shape = {"max_num_seqs": max_num_seqs, "depth": depth, "stage_blocks": stage_blocks}
        for i in range(num_instances):
            self.join(num_blocks if isinstance(num_blocks, int) else num_blocks[i])

    def join(self, num_blocks: int) -> int:
        """A new instance, under a number that none has had."""
        i = len(self.engines)
        engine = FakeEngine(i, self.staging, self._emitter(i), num_blocks=num_blocks, **self._shape)
        engine.llumlet = self.llumlets[i] = Llumlet(engine, self.config)
        self.engines[i] = engine
        self.links[FRONT_END, i] = deque()
        self.links[i, FRONT_END] = deque()
        return i

    # ------------------------------------------------------------------ what clients and operators do

    @property
    def alive(self) -> list[int]:
        return [i for i in self.engines if i not in self.dead]

    def submit(self, spec: Spec, instance: int) -> Stream:
        stream = self.streams[spec.request_id] = Stream(spec, instance)
        self._send(instance, Add(spec))
        return stream

    def can_migrate(self, stream: Stream) -> bool:
        return stream.is_open and stream.ended and stream.replay_at is None and stream.route not in self.lost

    def migrate(self, stream: Stream, destination: int, mode: MigrationMode = MigrationMode.LIVE) -> Migration:
        assert self.can_migrate(stream)
        assert destination != stream.route
        return self._start(stream, stream.route, destination, mode)

    def client_gone(self, stream: Stream) -> None:
        stream.gone, stream.replay_at = True, None
        migration = stream.migration
        if migration is not None and not stream.ended:
            self._carry_out(migration, migration.on_client_gone(self.now))
        elif stream.route not in self.lost:
            self._send(stream.route, Gone(stream.spec.request_id))

    def crash(self, instance: int, heard: int = 0) -> None:
        """The instance dies; ``heard`` of its packets on the wire still arrive before that is known."""
        self.dead.add(instance)
        self.links[FRONT_END, instance].clear()
        wire = self.links[instance, FRONT_END]
        while len(wire) > heard:
            wire.pop()
        wire.append(Lost())
        for key in [k for k in self.staging if k[0] == instance]:
            del self.staging[key]

    # ------------------------------------------------------------------ the network

    def wires(self) -> list[Link]:
        """Connections with packets on them, in a fixed order."""
        return [link for link, wire in self.links.items() if wire]

    def deliver(self, link: Link) -> None:
        packet = self.links[link].popleft()
        sender, receiver = link
        if receiver == FRONT_END:
            self._hear(sender, packet)
        else:
            self._obey(receiver, packet)

    def repeat(self, back: int) -> bool:
        """Send the last operation but ``back`` once more, behind everything else on its connection.

        Harsher than any network: the owner itself repeats only RESERVE, COMMIT and what closes.
        """
        if back >= len(self.sent):
            return False
        instance, message = self.sent[-1 - back]
        if instance in self.dead:
            return False
        self.links[FRONT_END, instance].append(message)
        self.counts["repeated"] += 1
        return True

    def lose_operation(self, instance: int, index: int) -> bool:
        """An operation on the wire gets lost; everything else on the connection arrives."""
        operations = [p for p in self.links[FRONT_END, instance] if isinstance(p, Message)]
        if operations:
            self.links[FRONT_END, instance].remove(operations[index % len(operations)])
            self.counts["operation lost"] += 1
        return bool(operations)

    def delay_answer(self, link: Link, index: int) -> bool:
        """An answer on the wire comes after everything else that is on it."""
        answers = [p for p in self.links[link] if isinstance(p, Answer)]
        if answers:
            late = answers[index % len(answers)]
            self.links[link].remove(late)
            self.links[link].append(late)
            self.counts["answer late"] += 1
        return bool(answers)

    def lose_answer(self, link: Link, index: int) -> bool:
        """An answer on the wire gets lost; everything else on the connection arrives."""
        answers = [p for p in self.links[link] if isinstance(p, Answer)]
        if answers:
            self.links[link].remove(answers[index % len(answers)])
            self.counts["answer lost"] += 1
        return bool(answers)

    # ------------------------------------------------------------------ time

    def step(self, instance: int) -> bool:
        if instance in self.dead:
            return False
        return self.engines[instance].step(self.now)

    def finish_copy(self, instance: int) -> bool:
        if instance in self.dead or not self.engines[instance].jobs:
            return False
        self.engines[instance].finish_copy(self.now)
        return True

    def advance(self, seconds: float) -> None:
        """Let time pass; timers fire when they are due."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            due, _, migration_id = heapq.heappop(self._timers)
            self.now = max(self.now, due)
            migration = self.migrations[migration_id]
            if migration.state is State.COMMITTING:
                self.counts["woken while committing"] += 1
            self._carry_out(migration, migration.on_time(self.now))
        self.now = end
        self._replay_orphans()

    def progress(self, seconds: float = 0.002, *, copies: bool = True) -> bool:
        """Everything moves on a little (but for copies, perhaps); False: nothing could."""
        moved = False
        for link in self.wires():
            for _ in range(len(self.links[link])):
                self.deliver(link)
                moved = True
        for instance in self.alive:
            moved |= copies and self.finish_copy(instance)
            moved |= self.step(instance)
        self.advance(seconds)
        return moved

    def run_until(self, reached: Callable[[], object], rounds: int = 2000) -> None:
        for _ in range(rounds):
            if reached():
                return
            if not self.progress() and self._timers:
                self.advance(max(0.0, self._timers[0][0] - self.now))
        raise AssertionError("not reached")

    def run_until_sent(self, op: Op) -> Message:
        """Until the front end has sent ``op`` (which is on the wire yet)."""
        return next(p for p in self._on_wire(lambda p: isinstance(p, Message) and OPERATIONS[type(p)] is op))

    def run_until_answered(self, op: Op) -> Answer:
        """Until an answer to ``op`` is on the wire."""
        return next(p for p in self._on_wire(lambda p: isinstance(p, Answer) and p.op is op))

    def _on_wire(self, wanted: Callable[[Packet], bool], rounds: int = 5000) -> Iterator[Any]:
        """Step by step, as few as possible, until such a packet is on a wire."""
        for _ in range(rounds):
            yield from (packet for wire in self.links.values() for packet in wire if wanted(packet))
            if self.wires():
                self.deliver(self.wires()[0])
            else:
                self.progress()
            self.check()
        raise AssertionError("it never comes")

    def quiesce(self, rounds: int = 5000) -> None:
        """Natural progress to the end; then nothing may be left anywhere."""
        for n in range(rounds):
            moved = self.progress(0.002 if n < 500 else 0.1)  # two may preempt each other until a timeout frees blocks
            self.check()
            open_streams = [s for s in self.streams.values() if s.is_open]
            if not moved and not self.wires() and not open_streams and self._is_clean():
                break
            if not moved:
                self.advance(max(1.0, self._timers[0][0] - self.now if self._timers else 0.0))
        else:
            raise AssertionError(f"no quiescence: {self.leaks()}")
        for stream in self.streams.values():
            assert stream.gone or tuple(stream.log) == reference(stream.spec), "a stream is not whole"
        for migration_id, migration in self.migrations.items():
            assert migration.is_closed, f"migration {migration_id} is still {migration.state}"
        for instance in self.alive:
            assert self.llumlets[instance].is_idle
        self.advance(2 * self.config.tombstone_s)
        for instance in self.alive:
            self.step(instance)
            self._check_forgotten(self.llumlets[instance])

    def _check_forgotten(self, llumlet: Llumlet) -> None:
        owners = [llumlet._source, llumlet._destination]
        if not self.counts["repeated"]:  # a late announcement is forgotten with the next step that has work
            owners.append(llumlet.door)
        books = {name: book for owner in owners for name, book in vars(owner).items() if isinstance(book, dict)}
        assert len(books) >= 5, f"these are not all the books: {books}"
        assert not any(books.values()), f"an idle instance never forgets {books}"

    # ------------------------------------------------------------------ laws

    def check(self) -> None:
        """The laws of every moment."""
        for instance in self.alive:
            self.engines[instance].check_integrity()
            self.llumlets[instance].check_integrity()
        for request_id, stream in self.streams.items():
            log = tuple(stream.log)
            assert log == reference(stream.spec)[: len(log)], f"{request_id}: wrong tokens {log}"
            runners = [i for i in self.alive if self.engines[i].schedules(request_id)]
            assert len(runners) <= 1, f"{request_id} runs on {runners}"
        assert not self.counts["stray output"], "an instance produced tokens after it had handed over"
        if not any(wire for (sender, _), wire in self.links.items() if sender == FRONT_END):
            self._check_obeyed()

    def _check_obeyed(self) -> None:
        """The laws of a moment at which every word of the front end has reached its instance."""
        for request_id, stream in self.streams.items():
            if stream.gone and (stream.migration is None or stream.migration.is_closed):
                holders = [i for i in self.alive if request_id in self.engines[i].requests]
                assert not holders, f"{request_id} was aborted, and {holders} go on with it"
        for instance in self.alive:
            for held in self.llumlets[instance].open_migrations():
                words = held.split()
                migration, state = self.migrations.get(words[1]), words[-1]
                waits_for_owner = state in ("copying", "detaching", "detached", "reserved")
                assert not (migration and migration.is_closed and waits_for_owner), f"{instance} was left with {held}"

    def leaks(self) -> list[str]:
        left = [f"{i}: {leak}" for i in self.alive for leak in self.engines[i].leaks()]
        left += [f"{i}: {leak}" for i in self.alive for leak in self.llumlets[i].open_migrations()]
        left += [f"migration {m.migration_id} {m.state}" for m in self.migrations.values() if not m.is_closed]
        return left + [f"staging of dead {k}" for k in self.staging if k[0] in self.dead]

    def _is_clean(self) -> bool:
        return not self.leaks()

    # ------------------------------------------------------------------ front end

    def _send(self, instance: int, packet: Packet) -> None:
        if isinstance(packet, Message):
            self.sent.append((instance, packet))
        if instance not in self.dead:
            self.links[FRONT_END, instance].append(packet)

    def _start(self, stream: Stream, source: int | None, destination: int, mode: MigrationMode) -> Migration:
        migration = Migration(
            migration_id=f"m{len(self.migrations)}",
            request_id=stream.spec.request_id,
            source=source,
            destination=destination,
            tokens=stream.log,
            config=self.config,
            mode=mode,
            commit_due=lambda now: now + FakeEngine.step_s / 2,
        )
        self.migrations[migration.migration_id] = migration
        stream.migration, stream.ended, stream.replay_at = migration, False, None
        self.counts["replay started" if source is None else f"{mode} started"] += 1
        self._carry_out(migration, migration.start(self.now))
        return migration

    def _carry_out(self, migration: Migration, commands: list[Command]) -> None:
        stream = self.streams[migration.request_id]
        for command in commands:
            match command:
                case Park(instance):
                    self._send(instance, Parked(stream.spec))
                case Send(instance, message):
                    self._send(instance, message)
                case Abort(instance):
                    self._send(instance, Gone(stream.spec.request_id))
                case Route(instance):
                    stream.route = instance
                case WakeAt(time_s):
                    heapq.heappush(self._timers, (time_s, len(self.sent), migration.migration_id))
                case Replay():
                    assert stream.is_open, "the replay of a stream that has ended"
                    assert migration is stream.migration
                    stream.replay_at = self.now + (REPLAY_BACKOFF_S if migration.source is None else 0.0)
                    self.counts["replay wanted"] += 1
                case End():
                    self._on_end(stream, migration, command)

    def _on_end(self, stream: Stream, migration: Migration, end: End) -> None:
        assert migration.migration_id not in self.ends, "a migration ended twice"
        assert migration is stream.migration
        self.ends[migration.migration_id] = end
        stream.ended = True
        kind = "replay" if migration.source is None else str(migration.mode)
        reason = re.sub(r":.*|\d+", "", end.reason)
        self.counts[f"{kind} committed" if end.ok else f"{kind} aborted"] += 1
        if end.ok and migration.transfer.stages:
            self.counts["committed after stages"] += 1
        if not end.ok:
            self.counts[f"aborted: {reason}"] += 1

    def _replay_orphans(self) -> None:
        for stream in self.streams.values():
            if stream.replay_at is None or stream.replay_at > self.now:
                continue
            candidates = [i for i in self.engines if i not in self.lost]
            if candidates:
                destination = candidates[len(self.migrations) % len(candidates)]
                self._start(stream, None, destination, MigrationMode.RECOMPUTE)

    def _hear(self, sender: int, packet: Packet) -> None:
        match packet:
            case Answer():
                migration = self.migrations[packet.migration_id]
                if packet.op is Op.DETACH and packet.ok and migration.state is State.DETACHING:
                    self.counts["detached"] += 1
                if packet.op is Op.COMMIT and not packet.ok and migration.state is State.COMMITTING:
                    self.counts["commit refused"] += 1
                self._carry_out(migration, migration.on_answer(packet, self.now))
            case Output():
                self._on_output(sender, packet)
            case Lost():
                self._on_lost(sender)
            case _:
                raise AssertionError(f"the front end heard {packet}")

    def _on_output(self, sender: int, output: Output) -> None:
        stream = self.streams[output.request_id]
        if not stream.is_open:
            if stream.gone and output.finished:
                self.counts["ran to its end for nobody"] += 1
            return
        if sender != stream.route:
            self.counts["stray output"] += 1
            return
        stream.log.extend(output.tokens)
        migration = stream.migration
        if migration is not None and migration.state is State.COMMITTING:
            self.counts["delivered while committing"] += 1
        if output.finished:
            stream.finished = True
            if migration is not None and not stream.ended:
                self._carry_out(migration, migration.on_finished(self.now))
        elif migration is not None and not stream.ended:
            self._carry_out(migration, migration.on_token(self.now))

    def _on_lost(self, instance: int) -> None:
        self.lost.add(instance)
        self.counts["crash"] += 1
        for migration in list(self.migrations.values()):
            if not migration.is_closed:
                if migration.state is State.COMMITTING:
                    self.counts["lost while committing"] += 1
                    delivered = len(migration._tokens) > migration._handover.num_output_tokens
                    if delivered and instance == migration.destination:
                        self.counts["lost after it had delivered"] += 1
                self._carry_out(migration, migration.on_instance_lost(instance, self.now))
        for stream in self.streams.values():
            if stream.is_open and stream.ended and stream.replay_at is None and stream.route == instance:
                stream.replay_at = self.now
                self.counts["orphan"] += 1

    # ------------------------------------------------------------------ instances

    def _obey(self, instance: int, packet: Packet) -> None:
        engine, llumlet = self.engines[instance], self.llumlets[instance]
        match packet:
            case Add(spec):
                engine.add(spec)
            case Parked(spec):
                engine.park(spec)
                llumlet.parked(spec.request_id, self.now)
            case Gone(request_id):
                engine.abort(request_id, self.now)
            case Message():
                llumlet.handle(packet, self._replier(instance), self.now)
            case _:
                raise AssertionError(f"instance {instance} heard {packet}")

    def _replier(self, instance: int) -> Callable[[Answer], None]:
        replied: list[Answer] = []

        def reply(answer: Answer) -> None:
            assert not replied, f"answered twice: {replied[0]} and {answer}"
            replied.append(answer)
            if (instance, answer.op) in self.losing:
                self.losing.remove((instance, answer.op))
                self.counts["answer lost"] += 1
            elif instance not in self.dead:
                self.links[instance, FRONT_END].append(answer)

        return reply

    def _emitter(self, instance: int) -> Callable[[RequestId, list[int], bool], None]:
        def emit(request_id: RequestId, tokens: list[int], finished: bool) -> None:
            self.links[instance, FRONT_END].append(Output(request_id, tokens, finished))

        return emit


def phase_of(cluster: Cluster, instance: int, request_id: RequestId) -> Phase | None:
    """Where the request stands on ``instance``."""
    status = cluster.engines[instance].find(request_id)
    return None if status is None else status.phase
