"""Faults at every named point of the protocol, under load, on simulated instances in processes of their own.

Streams run, end and hang up; others move about; and in between, one move after another is struck (points.py). After
every few strikes the streams end and the books are read: no token may be missing, doubled or wrong, and nothing held.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from arriero.chaos.flip import flip_bit
from arriero.chaos.points import ANSWERED, SENT, Fault, Strike
from arriero.core.config import MigrationConfig, RecoveryConfig
from arriero.core.errors import ArrieroError
from arriero.core.messages import Drop, Op
from arriero.core.types import InstanceId, MigrationMode
from arriero.sim.faults import Operation, Pass
from arriero.sim.fleet import Fleet, Stream, socket_folder
from arriero.transport.shm import SHM

NUM_INSTANCES = 3
NUM_STREAMS = 9  #: that run at a time, beside those that are struck
CHECK_EVERY = 20  #: strikes
MAX_TRIES = 6  #: until a point that a move does not come to counts as not reached
GENTLE_AT_A_TIME = 3
HANG_UPS = 0.01  #: probability, a look at the streams
LOOK_S = 0.01

MIGRATION = MigrationConfig(stage_timeout_s=0.5, lease_s=1.5, retry_s=0.1)
"""Short, so that what is lost or late is soon given up: half of the delays are longer."""

RECOVERY = RecoveryConfig(
    backoff_s=0.05, max_backoff_s=0.05, max_deaths=1_000_000, max_replays=1000, retry_s=0.05, no_instance_timeout_s=30.0
)
"""Nobody is fenced or given up for deaths that we caused."""

DELAYS_S = (0.02, 0.2, 0.8)
ENGINE = {"time_scale": 0.2}

PROVOKED_AT = {Op.DROP: Op.LOAD, Op.RESUME: Op.COMMIT}
"""A move is only called off if something fails: the destination loses its reservation before it is asked for this."""


@dataclass(slots=True, kw_only=True)
class Record:
    """A strike and what came of it."""

    strike: Strike
    reached: bool = False
    num_affected: int = 0  #: streams that ran where it struck
    recovery_s: list[float] = field(default_factory=list)  #: until the next token of each that went on

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "op": self.strike.op.value,
            "side": self.strike.side,
            "fault": self.strike.fault.value,
            "reached": self.reached,
            "affected": self.num_affected,
            "recovery_s": [round(s, 4) for s in self.recovery_s],
        }


@dataclass(slots=True)
class Outcome:
    """What a storm left behind."""

    records: list[Record] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)  #: of the law: nothing lost, doubled, leaked
    num_streams: int = 0
    num_tokens: int = 0
    num_deaths: int = 0
    moves: dict[str, int] = field(default_factory=lambda: {"moved": 0, "stayed": 0})
    seconds: float = 0.0


@dataclass(slots=True)
class _Aim:
    """A strike that waits for its move to come to the point."""

    strike: Strike
    stream: Stream
    source: InstanceId
    destination: InstanceId
    has_struck: bool = False
    is_provoked: bool = False
    on_strike: Callable[[], None] = lambda: None
    watch: asyncio.Task[None] | None = None


class Storm:
    """Strikes a fleet. ``rng`` decides everything but the timing of the machine."""

    def __init__(self, fleet: Fleet, rng: random.Random, say: Callable[[str], None] = lambda line: None) -> None:
        self._fleet = fleet
        self._rng = rng
        self._say = say
        self._aims: dict[str, _Aim] = {}
        self._cut_until: dict[InstanceId, float] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._killed: set[InstanceId] = set()  #: and perhaps not known to be dead yet
        self.outcome = Outcome()

    async def run(self, strikes: Sequence[Strike]) -> Outcome:
        """Strike, check, and so on; those that kill come one at a time, after the others."""
        started_s, done = time.monotonic(), 0
        gentle = [s for s in strikes if s.fault.verb not in ("kill", "drain")]
        deadly = [s for s in strikes if s.fault.verb in ("kill", "drain")]
        for todo, at_a_time in ((gentle, GENTLE_AT_A_TIME), (deadly, 1)):
            for first in range(0, len(todo), CHECK_EVERY):
                await self._strike_all(todo[first : first + CHECK_EVERY], at_a_time)
                done += len(todo[first : first + CHECK_EVERY])
                self._say(f"{done} of {len(strikes)} strikes, {len(self.outcome.violations)} violations")
        self.outcome.seconds = time.monotonic() - started_s
        return self.outcome

    async def _strike_all(self, strikes: Sequence[Strike], at_a_time: int) -> None:
        fleet = self._fleet
        fleet.faults.on_send, fleet.faults.on_answer = partial(self._pass, SENT), partial(self._pass, ANSWERED)
        left = iter(strikes)

        async def work() -> None:
            for strike in left:
                self.outcome.records.append(await self._strike(strike))

        try:
            async with self._load():
                await asyncio.gather(*[work() for _ in range(at_a_time)])
                await self._settle()
            await fleet.ended()
        except TimeoutError as error:
            self._violated(str(error))
        await self._judge()

    async def _judge(self) -> None:
        fleet, outcome = self._fleet, self.outcome
        outcome.num_streams += len(fleet.streams)
        outcome.num_tokens += sum(len(s.tokens) for s in fleet.streams.values())
        found = [fault for s in fleet.streams.values() if (fault := s.fault()) is not None]
        found += [f"nobody's output: {wrong}" for wrong in fleet.wrong]
        found += [f"logged: {message}" for message in fleet.errors()]
        try:
            await self._restore()
            found += [f"leaked: {held}" for held in await fleet.still_held()]
        except (ArrieroError, TimeoutError) as error:
            found.append(f"the books are wrong, or nobody is there to show them: {error}")
        self._violated(*found)
        fleet.forget()

    def _violated(self, *violations: str) -> None:
        self.outcome.violations += violations
        for violation in violations:
            self._say(f"  {violation}")

    # ------------------------------------------------------------------ load

    @contextlib.asynccontextmanager
    async def _load(self) -> AsyncIterator[None]:
        """Streams that come, move about and go, as long as the body runs."""
        tasks = [asyncio.create_task(self._keep_streams()), asyncio.create_task(self._keep_moving())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result

    async def _keep_streams(self) -> None:
        rng, fleet = self._rng, self._fleet
        while True:
            running = [s for s in fleet.streams.values() if s.is_running]
            if len(running) < NUM_STREAMS:
                with contextlib.suppress(ArrieroError):  # no instance is left: later
                    self._submit(rng.randint(40, 200))
            bystanders = [s for s in running if s.id not in self._aims]
            if bystanders and rng.random() < HANG_UPS:
                fleet.abort(rng.choice(bystanders))
            await asyncio.sleep(LOOK_S)

    def _submit(self, max_tokens: int) -> Stream:
        rng = self._rng
        return self._fleet.submit(rng.randint(8, 200), max_tokens, seed=rng.choice((None, rng.randrange(1 << 30))))

    async def _keep_moving(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            free = [s for s in self._fleet.streams.values() if s.is_running and s.id not in self._aims]
            if free and len(self._fleet.ready) > 1:
                stream = self._rng.choice(free)
                await self._move(stream, self._elsewhere(stream))

    def _elsewhere(self, stream: Stream) -> InstanceId:
        return self._rng.choice([i for i in self._fleet.ready if i != stream.where])

    async def _move(self, stream: Stream, to: InstanceId, mode: MigrationMode = MigrationMode.LIVE) -> None:
        try:
            report = await self._fleet.move(stream, to, mode)
        except ArrieroError:
            return  # it ended, or moves already
        self.outcome.moves["moved" if report.ok else "stayed"] += 1

    # ------------------------------------------------------------------ strikes

    async def _strike(self, strike: Strike) -> Record:
        """Move requests until one of the moves has come to the point and was struck."""
        record = Record(strike=strike)
        for _ in range(MAX_TRIES):
            await self._restore()
            if (aim := await self._aim(strike, record)) is None:
                continue
            await self._move(aim.stream, aim.destination, self._mode(strike))
            # A move may have its outcome before it has cleaned up: the point may be yet to come.
            await self._fleet.until(partial(self._is_over, aim))
            del self._aims[aim.stream.id]
            if aim.watch is not None:
                await aim.watch
            if aim.has_struck:
                break
            self._fleet.abort(aim.stream)
        return record

    async def _aim(self, strike: Strike, record: Record) -> _Aim | None:
        """A fresh stream that runs, and where to move it; None if it did not get so far."""
        fleet = self._fleet
        try:
            stream = self._submit(400)
        except ArrieroError:
            return None
        await fleet.until(lambda: len(stream.tokens) >= 3 or not stream.is_running)
        if not stream.is_running or stream.where not in fleet.ready or len(fleet.ready) < 2:
            return None
        aim = _Aim(strike, stream, stream.where, self._elsewhere(stream))
        aim.on_strike = partial(self._watch, aim, record)
        self._aims[stream.id] = aim
        return aim

    def _mode(self, strike: Strike) -> MigrationMode:
        """Live, or now and then another, if that has the point at all."""
        if strike.op in (Op.COPY, Op.LOAD, Op.EXPECT, Op.DROP) or strike.fault is Fault.CORRUPT:
            return MigrationMode.LIVE
        modes: list[MigrationMode] = [MigrationMode.LIVE, MigrationMode.LIVE, *MigrationMode]
        return self._rng.choice(modes)

    def _is_over(self, aim: _Aim) -> bool:
        open_ids = [line.split()[1] for line in self._fleet.cluster.migrations.open_migrations()]
        return aim.has_struck or aim.stream.id not in open_ids

    def _pass(self, side: str, operation: Operation, go: Pass) -> None:
        """Every operation and every answer comes by here."""
        now = time.monotonic()
        if self._cut_until.get(operation.instance, 0.0) > now:
            return
        aim = self._aims.get(operation.message.request_id)
        if aim is None or aim.has_struck:
            go()
            return
        if side == SENT and operation.op is PROVOKED_AT.get(aim.strike.op) and not aim.is_provoked:
            aim.is_provoked = True
            message = operation.message
            self._fleet.faults.send(
                aim.destination, Drop(migration_id=message.migration_id, request_id=message.request_id)
            )
        if (operation.op, side) == (aim.strike.op, aim.strike.side) and is_within_reach(aim.strike, operation):
            aim.has_struck = True
            aim.on_strike()
            self._carry_out(aim, operation, go)
        else:
            go()

    def _carry_out(self, aim: _Aim, operation: Operation, go: Pass) -> None:
        fleet, rng, fault = self._fleet, self._rng, aim.strike.fault
        victims = self._victims(aim)
        match fault.verb:
            case "delay":
                self._later(rng.choice(DELAYS_S), go)
            case "duplicate":
                go()
                self._later(rng.choice((0.0, *DELAYS_S)), go)
            case "cut":
                self._cut_until[operation.instance] = time.monotonic() + rng.choice(DELAYS_S)
            case "corrupt":
                corrupt(operation, rng)
                go()
            case "kill":
                self._killed.update(victims)
                self.outcome.num_deaths += len(victims)
                fleet.kill(*victims)
            case "drain":
                for victim in victims:
                    self._spawn(self._drain(victim))
                go()
            case "stop":
                fleet.signal(signal.SIGSTOP, *victims)
                self._later(rng.choice(DELAYS_S), partial(fleet.signal, signal.SIGCONT, *victims))
                go()
            case "hang":
                asyncio.get_running_loop().call_soon(fleet.abort, aim.stream)  # not inside the move's own turn
                go()
            case "drop":
                pass

    def _victims(self, aim: _Aim) -> list[InstanceId]:
        found = {
            "source": [aim.source],
            "destination": [aim.destination],
            "both": [aim.source, aim.destination],
            "all": self._fleet.ready,
        }.get(aim.strike.fault.victims, [])
        return [i for i in found if i in self._fleet.ready]

    async def _settle(self) -> None:
        """Wait for what is to come late."""
        while self._background:
            await asyncio.gather(*self._background)

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(delay_s)
            with contextlib.suppress(ProcessLookupError):  # the instance that was to go on is dead
                act()

        self._spawn(wait())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ------------------------------------------------------------------ recovery

    def _watch(self, aim: _Aim, record: Record) -> None:
        """From now until each stream that ran where it strikes has gone on."""
        struck = self._victims(aim)
        affected = [s for s in self._fleet.streams.values() if s.is_running and s.where in struck]
        if not affected and aim.strike.fault is not Fault.HANG_UP:
            affected = [aim.stream]
        record.reached, record.num_affected = True, len(affected)
        aim.watch = asyncio.create_task(self._recovery(affected, record))

    async def _recovery(self, affected: list[Stream], record: Record) -> None:
        since_s, waiting = time.monotonic(), {s: len(s.tokens) for s in affected}

        def all_go_on() -> bool:
            for stream in [s for s, before in waiting.items() if len(s.tokens) > before or not s.is_running]:
                del waiting[stream]
                if not stream.aborted:
                    record.recovery_s.append(time.monotonic() - since_s)
            return not waiting

        await self._fleet.until(all_go_on)

    async def _restore(self) -> None:
        """All instances are there again: the dead are replaced by the cluster."""
        fleet = self._fleet
        await fleet.dead(*self._killed)
        self._killed.clear()
        await fleet.until(lambda: len(fleet.ready) >= NUM_INSTANCES)

    async def _drain(self, instance: InstanceId) -> None:
        """Drain it and put another in its place."""
        with contextlib.suppress(ArrieroError):  # it dies, or is being drained
            await self._fleet.cluster.drains.start(instance, cause="chaos")
            await self._fleet.launch()


def is_within_reach(strike: Strike, operation: Operation) -> bool:
    """Whether there is something to strike: an answer without blocks has no bytes to change."""
    return strike.fault is not Fault.CORRUPT or (operation.answer is not None and operation.answer.ticket is not None)


def corrupt(operation: Operation, rng: random.Random) -> None:
    """Change one byte of the blocks that an answer offers, in shared memory."""
    assert operation.answer is not None
    flip_bit(SHM / operation.answer.ticket["name"], operation.answer.ticket["num_bytes"], rng)


@contextlib.asynccontextmanager
async def stormy_fleet() -> AsyncIterator[Fleet]:
    """Instances to strike; ended at exit."""
    with socket_folder() as folder:
        fleet = Fleet(folder, policy="freeness", engine=ENGINE, migration=MIGRATION, recovery=RECOVERY)
        try:
            await fleet.cluster.start(NUM_INSTANCES)
            yield fleet
        finally:
            left = fleet.end()
        if left:
            raise ArrieroError(f"the fleet left {', '.join(left)}")
