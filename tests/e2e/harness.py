"""A cluster of simulated instances in processes of their own, behind the real front end: no vLLM, no model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from arriero.core.config import CopyConfig, MigrationConfig, RebalancingConfig, SchedulerConfig
from arriero.core.dispatch import DispatchView, MaxFreeness
from arriero.core.messages import OPERATIONS, Answer, Message, Op
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, MigrationMode, RequestId
from arriero.frontend.cluster import Cluster
from arriero.frontend.instances import Instance
from arriero.frontend.links import InstanceLinks
from arriero.frontend.migrations import MigrationReport
from arriero.launch.local import LocalLauncher
from arriero.launch.port import LaunchSpec
from arriero.sim.tokens import expected_tokens
from arriero.sim.wire import EngineCoreOutputs, EngineCoreRequest, SimCodec, SimRequest, to_job
from arriero.transport.shm import sweep

LIVE, STOP, RECOMPUTE = MigrationMode.LIVE, MigrationMode.STOP_AND_COPY, MigrationMode.RECOMPUTE

WAIT_S = 30.0
"""Until a test gives up waiting; how long something takes is never tested."""

ENGINE: dict[str, Any] = {"num_blocks": 512, "block_size": 8, "block_bytes": 256, "time_scale": 0.1}
MIGRATION = MigrationConfig(retry_s=0.2)
COPY = CopyConfig(stage_bytes=4096, slice_bytes=1024)  # 16 blocks a stage: some stages even for short requests

Answered = Callable[[Answer], None]
Pass = Callable[[], None]

_prefixes = itertools.count()


class Placed:
    """A user's own policy: a request called ``name@2`` goes to instance 2 if that is ready; others by freeness."""

    def __init__(self) -> None:
        self._otherwise = MaxFreeness()

    def choose(self, request: Dispatchable, view: DispatchView) -> InstanceId:
        """See :class:`~arriero.core.dispatch.DispatchPolicy`."""
        _, _, place = request.request_id.partition("@")
        if place and int(place) in view.candidates:
            return int(place)
        return self._otherwise.choose(request, view)


PLACED = f"{__name__}.{Placed.__name__}"


def prompt(num_tokens: int, number: int = 0) -> list[int]:
    """Token ids that differ from those of any other ``number``."""
    return [(7 * i + 1009 * number) % 31_000 + 1 for i in range(num_tokens)]


@dataclass(eq=False)
class Stream:
    """A client: what it asked for, and what it got."""

    request: EngineCoreRequest
    live: Any  #: the cluster's LiveRequest
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    aborted: bool = False

    @property
    def id(self) -> RequestId:
        return self.request.request_id

    @property
    def where(self) -> InstanceId:
        """The instance that the tokens come from."""
        return int(self.live.route)

    @property
    def expected(self) -> list[int]:
        """All tokens that the request should produce."""
        job = to_job(self.request)
        assert job.max_tokens is not None
        return expected_tokens(job.prompt_token_ids, job.seed, job.max_tokens)

    def assert_exact(self) -> None:
        """The client got what a request that never moved produces, as far as it wanted it."""
        expected = self.expected if not self.aborted else self.expected[: len(self.tokens)]
        assert self.tokens == expected, f"{self.id}: {len(self.tokens)} tokens, {len(expected)} expected"
        assert self.finish == (None if self.aborted else "length"), self.id


@dataclass
class Operation:
    """One operation of a migration, on its way; see :class:`Faults`."""

    instance: InstanceId
    message: Message
    answer: Answer | None = None  #: once there is one; a fault may put another in its place

    @property
    def op(self) -> Op:
        return OPERATIONS[type(self.message)]


class Faults:
    """Between the front end and its links: watches operations, holds them up, loses them.

    ``on_send(operation, go)`` and ``on_answer(operation, go)`` decide when, how often and whether the operation is sent
    and its answer is heard: each ``go()`` lets it pass once.
    """

    def __init__(self, links: InstanceLinks) -> None:
        self._call = links.call
        links.call = self._intercepted  # type: ignore[method-assign]
        self.reset()

    def reset(self) -> None:
        """Everything passes."""
        self.seen: list[tuple[Op, InstanceId]] = []
        self.on_send: Callable[[Operation, Pass], None] = lambda operation, go: go()
        self.on_answer: Callable[[Operation, Pass], None] = lambda operation, go: go()

    def send(self, instance: InstanceId, message: Message) -> None:
        """An operation that the owner of the migration knows nothing of."""
        self._call(instance, message, lambda answer: None)

    def _intercepted(self, instance: InstanceId, message: Message, callback: Answered) -> None:
        operation = Operation(instance, message)
        self.seen.append((operation.op, instance))
        self.on_send(operation, partial(self._send, operation, callback))

    def _send(self, operation: Operation, callback: Answered) -> None:
        def answered(answer: Answer) -> None:
            operation.answer = answer
            self.on_answer(operation, lambda: callback(operation.answer or answer))

        self._call(operation.instance, operation.message, answered)


class _Errors(logging.Handler):
    """Errors that the front end only logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(self.format(record))


class Fleet:
    """A cluster, its clients, and ways to look at it and to hurt it."""

    def __init__(
        self,
        folder: Path,
        *,
        policy: str,
        engine: dict[str, Any],
        migration: MigrationConfig,
        rebalancing: RebalancingConfig | None,
    ) -> None:
        self.prefix = f"arriero-e2e-{os.getpid()}-{next(_prefixes)}"
        self.engine = {**ENGINE, **engine}
        self.engine_of: dict[InstanceId, dict[str, Any]] = {}  #: an instance's deviations
        self.streams: dict[RequestId, Stream] = {}
        self.snapshots: list[InstanceSnapshot] = []  #: all that arrived since the start of the test
        self.wrong: list[str] = []  #: outputs that nobody should get
        self.progress: list[str] = []
        self._folder = folder
        self._migration = migration
        self._numbers = itertools.count()
        self._errors = _Errors()
        logging.getLogger("arriero").addHandler(self._errors)
        self._addresses = (f"ipc://{folder / 'in'}", f"ipc://{folder / 'out'}")
        self.links = InstanceLinks(
            input_address=self._addresses[0], output_address=self._addresses[1], codec=SimCodec()
        )
        self.faults = Faults(self.links)
        self.cluster = Cluster(
            links=self.links,
            launcher=LocalLauncher(),
            make_spec=lambda instance: self.spec(instance),  # a test may put its own in place
            scheduler=SchedulerConfig(dispatch_policy=policy, rebalancing=rebalancing),
            migration=migration,
            deliver=self._deliver,
            progress=self.progress.append,
        )
        self._watch_snapshots()

    def _watch_snapshots(self) -> None:
        schedule = self.cluster.scheduler.snapshot

        def watched(snapshot: InstanceSnapshot) -> None:
            self.snapshots.append(snapshot)
            schedule(snapshot)

        self.cluster.scheduler.snapshot = watched  # type: ignore[method-assign]

    def spec(self, instance: InstanceId) -> LaunchSpec:
        """How to launch an instance."""
        payload = {
            "instance": instance,
            "input_address": self._addresses[0],
            "output_address": self._addresses[1],
            "engine": {**self.engine, **self.engine_of.get(instance, {})},
            "migration": asdict(self._migration),
            "copy": asdict(COPY),
            "snapshot_interval_s": 0.02,
            "transport": {"kind": "shm", "prefix": f"{self.prefix}-i{instance}"},
        }
        return LaunchSpec(module="arriero.sim.process", payload=json.dumps(payload).encode())

    def close(self) -> None:
        """End everything; check that it left nothing."""
        pids = [i.pid for i in self.cluster.instances]
        self.cluster.close(5.0)
        self.cluster.close_sockets()
        logging.getLogger("arriero").removeHandler(self._errors)
        killed = {f"{i.pid}" for i in self.cluster.instances if i.state is InstanceState.DEAD}
        left = [name for name in self.segments() if name.split("-")[-2] not in killed]
        sweep(self.prefix)
        assert left == [], "an instance that ended in order left shared memory"
        assert self.segments() == []
        assert [pid for pid in pids if is_running(pid)] == []

    # ------------------------------------------------------------------ clients

    def submit(
        self,
        num_prompt_tokens: int = 40,
        max_tokens: int = 60,
        *,
        at: InstanceId | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Stream:
        """A new client; with the policy ``PLACED``, on instance ``at``."""
        number = next(self._numbers)
        name = f"r{number}" if at is None else f"r{number}@{at}"
        return self.submit_request(SimRequest(name, prompt(num_prompt_tokens, number), max_tokens, seed, **sampling))

    def submit_request(self, request: EngineCoreRequest) -> Stream:
        """A client with a request of its own making."""
        job = to_job(request)
        facts = Dispatchable(
            request_id=request.request_id,
            num_prompt_tokens=len(job.prompt_token_ids),
            max_tokens=job.max_tokens or 1,
            priority=job.priority,
            unmovable=job.unmovable,
        )
        self.cluster.submit(request, facts, request.external_req_id or request.request_id)
        stream = Stream(request, self.cluster.requests.get(request.request_id))
        self.streams[request.request_id] = stream
        return stream

    def abort(self, *streams: Stream) -> None:
        """The clients go away."""
        for stream in streams:
            stream.aborted = stream.finish is None
        self.cluster.abort([s.id for s in streams])

    def _deliver(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            stream = self.streams.get(output.request_id)
            if stream is None or stream.finish is not None or stream.aborted:
                self.wrong.append(f"{output} of instance {outputs.engine_index}")
                continue
            stream.tokens += output.new_token_ids
            if output.finish_reason is not None:
                stream.finish = str(output.finish_reason)

    async def move(self, stream: Stream, to: InstanceId, mode: MigrationMode = LIVE) -> MigrationReport:
        """Move a client's request and wait for the outcome."""
        async with asyncio.timeout(WAIT_S):
            return await self.cluster.migrate(stream.id, to, mode)

    # ------------------------------------------------------------------ waiting

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for ``condition``; nothing that it waits for may take ``WAIT_S``."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert not any("could not be handled" in m for m in self._errors.messages), self._errors.messages
            assert time.monotonic() < deadline, f"waited {WAIT_S} s in vain: {self.state()}"
            await asyncio.sleep(0.001)

    async def at_least(self, num_tokens: int, *streams: Stream) -> None:
        """Wait until each of the streams shows so many tokens."""
        await self.until(lambda: all(len(s.tokens) >= num_tokens for s in streams))

    async def ended(self, *streams: Stream) -> None:
        """Wait for the end of the streams, or of all."""
        await self.until(lambda: all(s.finish or s.aborted for s in streams or self.streams.values()))

    async def shown(self, instance: InstanceId, condition: Callable[[InstanceSnapshot], Any]) -> InstanceSnapshot:
        """Wait for a snapshot of ``instance`` that fulfils ``condition``."""

        def latest() -> InstanceSnapshot | None:
            return self.cluster.scheduler.snapshot_of(instance)

        await self.until(lambda: (snapshot := latest()) is not None and condition(snapshot))
        found = latest()
        assert found is not None
        return found

    def state(self) -> str:
        """For a person who looks at a failed test."""
        running = [f"{s.id} at {s.where}: {len(s.tokens)}" for s in self.streams.values() if not s.finish]
        return f"{running=}, {self.cluster.migrations.open_migrations()=}, {self.cluster.describe_instances()=}"

    # ------------------------------------------------------------------ instances

    async def launch(self, num_instances: int = 1) -> list[Instance]:
        """More instances."""
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*[self.cluster.instances.launch(self.spec) for _ in range(num_instances)])

    def kill(self, *instances: InstanceId) -> None:
        """SIGKILL, at once."""
        for instance in instances:
            os.killpg(self.cluster.instances[instance].pid, signal.SIGKILL)

    async def dead(self, *instances: InstanceId) -> None:
        """Wait until the front end knows."""
        await self.until(lambda: all(self.cluster.instances[i].state is InstanceState.DEAD for i in instances))

    @property
    def ready(self) -> list[InstanceId]:
        return self.cluster.instances.ready_ids()

    def segments(self) -> list[str]:
        """Shared memory of this fleet."""
        return [p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(self.prefix)]

    async def ledger_agrees(self) -> None:
        """Once nothing moves, the dispatcher counts every request where it runs."""
        cluster = self.cluster
        await self.until(
            lambda: all(
                r.route in self.ready and not cluster.migrations.is_moving(r.request_id) for r in cluster.requests
            )
        )
        routes = [r.route for r in cluster.requests]
        counted = {i: cluster.scheduler.ledger.num_outstanding(i) for i in self.ready}
        assert counted == {i: routes.count(i) for i in self.ready}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind."""
        return [e for e in self.cluster.events.recent(100_000) if e["event"] == kind]

    # ------------------------------------------------------------------ the law

    async def assert_clean(self) -> None:
        """Every stream was exact, and nothing is held anywhere; then forget the streams."""
        await self.ended()
        for stream in self.streams.values():
            if stream.finish != "error":
                stream.assert_exact()
        assert self.wrong == []
        assert self._errors.messages == []
        await self._nothing_is_held()
        self.forget()

    async def _nothing_is_held(self) -> None:
        self.cluster.check_integrity()
        deadline = time.monotonic() + WAIT_S
        while (held := await self._held()) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        assert held == []

    async def _held(self) -> list[Any]:
        """What keeps the fleet from being clean."""
        cluster = self.cluster
        held: list[Any] = [*cluster.migrations.open_migrations(), *[r.request_id for r in cluster.requests]]
        for instance in self.ready:
            books = await self.links.utility(instance, "arriero_check")  # raises if they contradict themselves
            if books["free_blocks"] != books["num_blocks"] or any(books[k] for k in HELD):
                held.append((instance, books))
            if cluster.scheduler.ledger.num_outstanding(instance):
                held.append(f"the ledger counts requests at {instance}")
        return held

    def expect_errors(self, *parts: str) -> None:
        """These were logged, in this order, and rightly so."""
        messages, self._errors.messages = self._errors.messages, []
        assert len(messages) == len(parts), messages
        for message, part in zip(messages, parts, strict=True):
            assert part in message

    def expect_deaths(self) -> None:
        """Every error was the death of an instance."""
        others = [m for m in self._errors.messages if "ended unexpectedly (exit code -9)" not in m]
        self._errors.messages = []
        assert others == []

    def forget(self) -> None:
        """A new test begins."""
        self.streams.clear()
        self.snapshots.clear()
        self.wrong.clear()
        self.faults.reset()
        self._errors.messages.clear()


HELD = ("requests", "frozen", "parked", "reserved", "open", "staged")
"""What a clean instance has none of, in the answer to `arriero_check`."""


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A short path: those of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="arriero-e2e-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def fleet_of(
    num_instances: int,
    *,
    policy: str = PLACED,
    engine: dict[str, Any] | None = None,
    engine_of: dict[InstanceId, dict[str, Any]] | None = None,
    migration: MigrationConfig = MIGRATION,
    rebalancing: RebalancingConfig | None = None,
) -> AsyncIterator[Fleet]:
    """Running instances; everything is ended at exit."""
    with socket_folder() as folder:
        fleet = Fleet(folder, policy=policy, engine=engine or {}, migration=migration, rebalancing=rebalancing)
        fleet.engine_of = engine_of or {}
        try:
            async with asyncio.timeout(WAIT_S):
                await fleet.cluster.start(num_instances)
            yield fleet
        finally:
            fleet.close()


def is_running(pid: int) -> bool:
    """Whether the process has not ended; one that waits to be collected by its parent has."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False
