"""Simulated instances in processes of their own behind the real front end, and clients that know what they must get.

No vLLM and no model: what the tests of crashes and moves run on, and `make chaos`.
"""

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from arriero.core.commands import Command
from arriero.core.config import (
    CopyConfig,
    DrainConfig,
    MigrationConfig,
    QueueingConfig,
    RebalancingConfig,
    RecoveryConfig,
    ScalingConfig,
    SchedulerConfig,
)
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, MigrationMode, RequestId
from arriero.frontend.cluster import Cluster
from arriero.frontend.instances import Instance
from arriero.frontend.links import InstanceLinks
from arriero.frontend.migrations import MigrationReport
from arriero.launch.local import LocalLauncher
from arriero.launch.port import LaunchSpec
from arriero.observe.events import EventLog
from arriero.sim.faults import Faults
from arriero.sim.tokens import expected_tokens
from arriero.sim.wire import EngineCoreOutputs, EngineCoreRequest, SimCodec, SimRequest, to_job
from arriero.transport.shm import SHM, sweep

WAIT_S = 30.0
"""Until something that must happen counts as not happening. Nothing here measures how long it takes."""

POLL_S = 0.005

ENGINE: dict[str, Any] = {"num_blocks": 512, "block_size": 8, "block_bytes": 256, "time_scale": 0.1}
MIGRATION = MigrationConfig(retry_s=0.2)
RECOVERY = RecoveryConfig(restart=False, max_replays=1000, no_instance_timeout_s=WAIT_S)
"""Who dies stays dead: a test launches by itself. No request is suspected: deaths are by our hand."""
DRAIN = DrainConfig()
COPY = CopyConfig(stage_bytes=4096, slice_bytes=1024)  # 16 blocks a stage: some stages even for short requests

HELD = ("requests", "frozen", "parked", "reserved", "open", "staged")
"""What a clean instance has none of, in the answer to `arriero_check`."""

_prefixes = itertools.count()


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
    last_token_s: float = 0.0  #: time.monotonic()

    @property
    def id(self) -> RequestId:
        return self.request.request_id

    @property
    def where(self) -> InstanceId | None:
        """The instance that the tokens come from; None: it waits for one."""
        route: InstanceId | None = self.live.route
        return route

    @property
    def is_running(self) -> bool:
        return self.finish is None and not self.aborted

    @property
    def expected(self) -> list[int]:
        """All tokens that the request should produce."""
        job = to_job(self.request)
        assert job.max_tokens is not None
        return expected_tokens(job.prompt_token_ids, job.seed, job.max_tokens)

    def fault(self) -> str | None:
        """How what came differs from what a request that never moved produces, as far as the client wanted it."""
        expected = self.expected if not self.aborted else self.expected[: len(self.tokens)]
        if self.tokens != expected:
            same = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(self.tokens, expected, strict=False)))
            return f"{self.id}: {len(self.tokens)} tokens came, {len(expected)} were expected, {same} are right"
        if self.finish != (None if self.aborted else "length"):
            return f"{self.id}: finish reason {self.finish}"
        return None


def facts_of(request: EngineCoreRequest) -> Dispatchable:
    """What the scheduler needs to know of a request."""
    job = to_job(request)
    return Dispatchable(
        request_id=request.request_id,
        num_prompt_tokens=len(job.prompt_token_ids),
        max_tokens=job.max_tokens or 1,
        priority=job.priority,
        unmovable=job.unmovable,
    )


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
        engine: dict[str, Any] | None = None,
        migration: MigrationConfig = MIGRATION,
        rebalancing: RebalancingConfig | None = None,
        queueing: QueueingConfig | None = None,
        scaling: ScalingConfig | None = None,
        recovery: RecoveryConfig = RECOVERY,
        drain: DrainConfig = DRAIN,
        events: EventLog | None = None,
    ) -> None:
        self.prefix = f"arriero-fleet-{os.getpid()}-{next(_prefixes)}"
        self.engine = {**ENGINE, **(engine or {})}
        self.engine_of: dict[InstanceId, dict[str, Any]] = {}  #: an instance's deviations
        self.streams: dict[RequestId, Stream] = {}
        self.snapshots: list[InstanceSnapshot] = []  #: all that arrived since the last :meth:`forget`
        self.wrong: list[str] = []  #: outputs that nobody should get
        self.progress: list[str] = []
        self.folder = folder
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
            launcher=LocalLauncher(lambda: sweep(self.prefix)),
            make_spec=lambda instance, place: self.spec(instance),  # a test may put its own in place
            scheduler=SchedulerConfig(
                dispatch_policy=policy,
                rebalancing=rebalancing,
                queueing=queueing,
                scaling=scaling,
                no_instance_timeout_s=recovery.no_instance_timeout_s,
                tick_s=0.05,
                drain=drain,
            ),
            migration=migration,
            recovery=recovery,
            deliver=self._deliver,
            progress=self.progress.append,
            events=events,
        )
        self._watch_snapshots()

    def _watch_snapshots(self) -> None:
        schedule = self.cluster.scheduler.snapshot

        def watched(snapshot: InstanceSnapshot, now: float) -> list[Command]:
            self.snapshots.append(snapshot)
            return schedule(snapshot, now)

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

    def end(self) -> list[str]:
        """End everything. Returns what it left: shared memory, processes."""
        pids = [i.pid for i in self.cluster.instances]
        self.cluster.close(5.0)
        self.cluster.close_sockets()
        logging.getLogger("arriero").removeHandler(self._errors)
        killed = {f"{i.pid}" for i in self.cluster.instances if i.state is InstanceState.DEAD}
        left = [f"shared memory {name}" for name in self.segments() if name.split("-")[-2] not in killed]
        sweep(self.prefix)
        left += [f"shared memory {name}, swept" for name in self.segments()]
        return left + [f"process {pid}" for pid in pids if is_running(pid)]

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
        """A new client; ``at`` asks for an instance, if the policy knows of names like ``r7@2``."""
        number = next(self._numbers)
        name = f"r{number}" if at is None else f"r{number}@{at}"
        return self.submit_request(SimRequest(name, prompt(num_prompt_tokens, number), max_tokens, seed, **sampling))

    def submit_request(self, request: EngineCoreRequest) -> Stream:
        """A client with a request of its own making."""
        self.cluster.intake.submit(request, facts_of(request), request.external_req_id or request.request_id)
        stream = Stream(request, self.cluster.requests.get(request.request_id))
        self.streams[request.request_id] = stream
        return stream

    def abort(self, *streams: Stream) -> None:
        """The clients go away."""
        for stream in streams:
            stream.aborted = stream.finish is None
        self.cluster.abort([s.id for s in streams])

    def _deliver(self, outputs: EngineCoreOutputs) -> None:
        now = time.monotonic()
        for output in outputs.outputs:
            stream = self.streams.get(output.request_id)
            if stream is None or not stream.is_running:
                self.wrong.append(f"{output} of instance {outputs.engine_index}")
                continue
            stream.tokens += output.new_token_ids
            stream.last_token_s = now
            if output.finish_reason is not None:
                stream.finish = str(output.finish_reason)

    async def move(self, stream: Stream, to: InstanceId, mode: MigrationMode = MigrationMode.LIVE) -> MigrationReport:
        """Move a client's request and wait for the outcome."""
        async with asyncio.timeout(WAIT_S):
            return await self.cluster.migrate(stream.id, to, mode)

    # ------------------------------------------------------------------ waiting

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for ``condition``. Raises TimeoutError after ``WAIT_S``, or if the front end failed meanwhile."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if any("could not be handled" in m for m in self._errors.messages):
                raise TimeoutError(f"the front end failed: {self._errors.messages}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {WAIT_S} s in vain: {self.state()}")
            await asyncio.sleep(0.001)

    async def at_least(self, num_tokens: int, *streams: Stream) -> None:
        """Wait until each of the streams shows so many tokens."""
        await self.until(lambda: all(len(s.tokens) >= num_tokens for s in streams))

    async def ended(self, *streams: Stream) -> None:
        """Wait for the end of the streams, or of all."""
        await self.until(lambda: not any(s.is_running for s in streams or self.streams.values()))

    def state(self) -> str:
        """For a person who looks at a failure."""
        running = [f"{s.id} at {s.where}: {len(s.tokens)}" for s in self.streams.values() if s.is_running]
        return f"{running=}, {self.cluster.migrations.open_migrations()=}, {self.cluster.describe_instances()=}"

    # ------------------------------------------------------------------ instances

    async def launch(self, num_instances: int = 1) -> list[Instance]:
        """More instances."""
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*[self.cluster.instances.launch() for _ in range(num_instances)])

    def signal(self, number: signal.Signals, *instances: InstanceId) -> None:
        """To every process of the instances."""
        for instance in instances:
            os.killpg(self.cluster.instances[instance].pid, number)

    def kill(self, *instances: InstanceId) -> None:
        """SIGKILL, at once."""
        self.signal(signal.SIGKILL, *instances)

    async def dead(self, *instances: InstanceId) -> None:
        """Wait until the front end knows."""
        await self.until(lambda: all(self.cluster.instances[i].state is InstanceState.DEAD for i in instances))

    @property
    def ready(self) -> list[InstanceId]:
        return self.cluster.instances.ready_ids()

    def segments(self) -> list[str]:
        """Shared memory of this fleet."""
        return [p.name for p in SHM.iterdir() if p.name.startswith(self.prefix)]

    # ------------------------------------------------------------------ the law

    async def held(self) -> list[Any]:
        """What keeps an idle fleet from being clean. Raises if a book contradicts itself."""
        cluster = self.cluster
        cluster.check_integrity()
        held: list[Any] = [*cluster.migrations.open_migrations(), *[r.request_id for r in cluster.requests]]
        for instance in self.ready:
            books = await self.links.utility(instance, "arriero_check")
            if books["free_blocks"] != books["num_blocks"] or any(books[k] for k in HELD):
                held.append((instance, books))
            if cluster.scheduler.ledger.num_outstanding(instance):
                held.append(f"the ledger counts requests at {instance}")
        return held

    async def still_held(self) -> list[Any]:
        """What is held even after a while: empty, or a leak."""
        held: list[Any] = []
        for _ in range(int(WAIT_S / POLL_S)):
            if not (held := await self.held()):
                break
            await asyncio.sleep(POLL_S)
        return held

    def errors(self) -> list[str]:
        """What the front end has logged as errors since the last call; the deaths of instances are none."""
        messages, self._errors.messages = self._errors.messages, []
        return [m for m in messages if "ended unexpectedly (exit code -9)" not in m]

    def forget(self) -> None:
        """Begin anew with the same instances."""
        self.streams.clear()
        self.snapshots.clear()
        self.wrong.clear()
        self.faults.reset()
        self._errors.messages.clear()


@contextlib.contextmanager
def socket_folder() -> Iterator[Path]:
    """A short path: those of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="arriero-fleet-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def is_running(pid: int) -> bool:
    """Whether the process has not ended; one that waits to be collected by its parent has."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False
