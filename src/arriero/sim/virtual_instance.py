"""An instance in virtual time: what the engine process does with a clock and sockets, done with kernel events.

Like there, operations are carried out between two steps, a snapshot is pushed after a step at most every
``snapshot_interval_s``, and at once before the instance goes idle.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from arriero.core.config import CopyConfig, MigrationConfig
from arriero.core.engine_port import Export
from arriero.core.llumlet import Llumlet
from arriero.core.messages import Answer, Message
from arriero.core.pace import StepPace
from arriero.core.types import InstanceSnapshot, MigrationId, RequestId
from arriero.sim.fast_engine import FastEngine
from arriero.sim.fast_reports import num_used_blocks, snapshot
from arriero.sim.fast_sequence import FastSequence
from arriero.sim.kernel import Kernel
from arriero.sim.network import Network
from arriero.sim.virtual_port import VirtualPort

_SWEEP_S = 1.0  # between two looks of the llumlet at its leases


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceHooks:
    """Whom an instance tells what."""

    on_step: Callable[[int, list[FastSequence], list[FastSequence]], None]  #: awaited ones heard of, ended ones
    on_preempted: Callable[[list[FastSequence]], None]
    on_pushed: Callable[[int], None]  #: a snapshot is due
    is_watched: Callable[[], bool]  #: somebody waits for what a snapshot may show


class VirtualInstance:
    """Steps an engine on the kernel. ``max_steps``: how many alike steps may be taken at once."""

    def __init__(
        self,
        engine: FastEngine,
        kernel: Kernel,
        network: Network,
        hooks: InstanceHooks,
        *,
        migration: MigrationConfig,
        copy: CopyConfig,
        pace: StepPace | None,
        snapshot_interval_s: float | None,
        max_steps: int,
    ) -> None:
        self.engine = engine
        self.instance = engine.instance
        self.due: InstanceSnapshot | None = None  #: pushed, not collected yet
        self.is_dead = False
        self._kernel, self._network, self._hooks = kernel, network, hooks
        self._pace = pace
        self._interval_s = snapshot_interval_s
        self._max_steps = max_steps
        self._order = 1 + engine.instance
        self._inbox: deque[Callable[[], None]] = deque()
        self._version = 0
        self._free_s = 0.0
        self._pushed_s = -1e9
        self._is_shown = True  # nothing but decoding has happened since the last snapshot
        self._step_s = 0.0  # the last one's
        self._begun_s = 0.0
        self._last_end_s = 0.0
        self._swept_s = 0.0
        self.port = VirtualPort(
            engine,
            network,
            stage_bytes=copy.stage_bytes,
            on_copied=self._on_copied,
            stall=self._stall,
            last_step_s=lambda: self._last_end_s,
        )
        self._migration = migration
        self.llumlet = Llumlet(self.port, migration)
        engine.limits.has_moves = lambda: not self.llumlet.is_idle

    # ------------------------------------------------------------------ input

    def add(self, sequence: FastSequence) -> None:
        """A new request arrives. Raises ConflictError if it can never run here."""
        self.settle_snapshots(self._kernel.now)
        self.engine.add(sequence)
        self._is_shown = False
        if self.engine.segment is None:
            self._wake()
        elif self.engine.waiting[0] is sequence or self._hooks.is_watched():
            self.cut()  # otherwise not: those behind a head that cannot run wait anyway

    def park(self, sequence: FastSequence) -> None:
        """A request arrives ahead of its RESERVE."""

        def action() -> None:
            self.port.park(sequence)
            self.llumlet.parked(sequence.request_id, self._kernel.now)

        self._receive(action)

    def abort(self, request_id: RequestId) -> None:
        """An ABORT arrives."""

        def action() -> None:
            self.engine.drop(request_id)
            self.llumlet.request_gone(request_id, self._kernel.now)

        self._receive(action)

    def operate(self, message: Message, reply: Callable[[Answer], None]) -> None:
        """An operation arrives; ``reply`` is called when the answer leaves."""

        def answer(value: Answer) -> None:
            self._kernel.at(max(self._kernel.now, self._free_s), partial(self._leave, reply, value))

        self._receive(lambda: self.llumlet.handle(message, answer, self._kernel.now))

    def _leave(self, reply: Callable[[Answer], None], value: Answer) -> None:
        if not self.is_dead:
            reply(value)

    def _on_copied(self, migration_id: MigrationId, export: Export) -> None:
        self._receive(lambda: self.llumlet.copied(migration_id, export, None, self._kernel.now))

    def _receive(self, action: Callable[[], None]) -> None:
        if self.is_dead:
            return
        self._inbox.append(action)
        if self.engine.segment is None:
            self._wake()
        else:
            self.cut()

    def _stall(self, seconds: float) -> None:
        self._free_s = max(self._free_s, self._kernel.now) + seconds

    def die(self) -> dict[RequestId, FastSequence]:
        """It is gone, with all that it holds, and hears nothing any more; the step in flight gives no token. Returns
        the requests that it had.
        """
        if self.engine.segment is not None:
            del self.engine.segment.ends[self.num_steps_done() :]
            if self.engine.segment.ends:
                self.engine.finish()
        self.is_dead, self.due = True, None
        self._version += 1
        self._inbox.clear()
        held = dict(self.engine.live)
        self.engine.lose_all()
        self.port.parked.clear()
        self.llumlet = Llumlet(self.port, self._migration)
        return held

    # ------------------------------------------------------------------ steps

    def num_steps_done(self) -> int:
        """Of the segment in flight."""
        segment = self.engine.segment
        return bisect.bisect_left(segment.ends, self._kernel.now) if segment is not None else 0

    def step_end_s(self, after_s: float) -> float | None:
        """When the first step of the segment in flight ends that ends after ``after_s``; None: none is known."""
        ends = self.engine.segment.ends if self.engine.segment is not None else []
        first = bisect.bisect_right(ends, after_s)
        return ends[first] if first < len(ends) else None

    def num_used_blocks(self) -> int:
        """KV blocks in use now."""
        return num_used_blocks(self.engine, self.num_steps_done() + 1 if self.engine.segment is not None else 0)

    def cut(self) -> None:
        """Something changed: nothing is foreseen beyond the step in flight."""
        if self.engine.segment is not None and self.engine.cut(self._kernel.now):
            self._schedule_end(self.engine.segment.ends[-1])

    def _wake(self) -> None:
        self._kernel.at(self._kernel.now, self._go_on, self._order)

    def _go_on(self) -> None:
        """Between two steps: operations, then the next step."""
        now = self._kernel.now
        if self.engine.segment is not None or self.is_dead:
            return
        while self._free_s <= now and self._inbox:
            self._inbox.popleft()()
            self._is_shown = False  # what it did, the snapshot of the step before does not show
        if now < self._free_s:
            self._kernel.at(self._free_s, self._go_on, self._order)
            return
        if self.engine.running and (hold_s := self.llumlet.door.hold_for(now, self._step_s)) > 0:
            self._kernel.at(now + hold_s, self._go_on, self._order)
            return
        self.engine.slow_down = self._network.slow_down(self.instance)
        is_near = self.llumlet.door.is_announced or (not self._is_shown and self._hooks.is_watched())
        segment = self.engine.begin(now, 1 if is_near else self._max_steps)
        if self.engine.preempted:
            self._hooks.on_preempted(self.engine.preempted)
            self.engine.preempted.clear()
        if segment is not None:
            self._begun_s = now
            self._schedule_end(segment.ends[-1])
        else:
            self.report()

    def _schedule_end(self, end_s: float) -> None:
        self._version += 1
        self._kernel.at(end_s, partial(self._end, self._version), self._order)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        now, segment = self._kernel.now, self.engine.segment
        assert segment is not None
        self.settle_snapshots(now)
        if self._pace is not None:
            for end_s in segment.ends:
                self._pace.step_ended(self.instance, end_s)
        self._step_s = now - (segment.ends[-2] if len(segment.ends) > 1 else self._begun_s)
        heard, ended = self.engine.finish()
        self._last_end_s = now
        self._hooks.on_step(self.instance, heard, ended)
        if self._pace is not None:
            for sequence in ended:
                self.llumlet.request_gone(sequence.request_id, now)
            if now - self._swept_s >= _SWEEP_S:
                self._swept_s = now
                self.llumlet.after_step(now)
        self._is_shown = False
        if self._interval_s is not None and now - self._pushed_s >= self._interval_s:
            self._push(now)
        self._go_on()

    # ------------------------------------------------------------------ snapshots

    def watch(self) -> None:
        """From now on somebody waits for what the next snapshot shows: it is not foreseen away."""
        if not self._is_shown:
            self.cut()

    def report(self) -> None:
        """Push a snapshot at once, if anybody looks."""
        if self._interval_s is not None:
            self._push(self._kernel.now)

    def settle_snapshots(self, before_s: float) -> None:
        """Take the last snapshot that was pushed before then, while the state that it shows can still be seen."""
        segment = self.engine.segment
        if segment is None or self._interval_s is None:
            return
        done, pushed_at = bisect.bisect_left(segment.ends, before_s), -1
        for number in range(segment.num_reported, done):
            if segment.ends[number] - self._pushed_s >= self._interval_s:
                self._pushed_s, pushed_at = segment.ends[number], number
        segment.num_reported = done
        if pushed_at >= 0:
            self.due = snapshot(self.engine, self._pushed_s, pushed_at + 1)

    def _push(self, now: float) -> None:
        self._pushed_s, self.due = now, snapshot(self.engine, now)
        self._is_shown = True
        self._hooks.on_pushed(self.instance)
