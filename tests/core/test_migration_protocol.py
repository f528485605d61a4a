"""The migration protocol under chaos: a Hypothesis state machine, and a long seeded walk over the same rules.

After every rule the laws of :class:`cluster_model.Cluster` hold: streams are prefixes of their
reference, at most one instance schedules a request, blocks are conserved, nobody produces after
handing over. Each run ends in natural progress: every stream is whole and nothing is left anywhere.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_model import FRONT_END, Cluster, Stream
from fake_engine import Spec
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arriero import core
from arriero.core.config import MigrationConfig
from arriero.core.messages import Op
from arriero.core.migration import State
from arriero.core.types import MigrationMode

CONFIG = MigrationConfig(max_incoming=3, tombstone_s=1000.0, max_stages=3)
"""Chaos makes the clock jump by less than ``tombstone_s`` in all: no packet is older than a tombstone."""

JUMPS = (2.1, 21.0, 61.0, 121.0)  # past retry_s, stage_timeout_s, lease_s, timeout_s
FAILURES = (
    "reserve", "start_export", "export_copy", "export_rest",
    "start_import", "import_copy", "grow", "import_rest", "admit",
)  # fmt: skip
MODES = (MigrationMode.LIVE, MigrationMode.LIVE, MigrationMode.STOP_AND_COPY, MigrationMode.RECOMPUTE)
NUM_CHAOS = 6
NATURAL = (*["progress"] * 4, *["deliver"] * 4, "step", "finish_copy", *["migrate"] * 3)
DISTURBING = (
    "client_gone", "preempt", "crash", "restart",
    *["lose_answer", "lose_commit", "lose_operation", "delay_answer", "repeat", "jump", "fail"] * 2,
)  # fmt: skip

LONG = os.environ.get("ARRIERO_HYPOTHESIS") == "long"
NUM_WALKS = 20_000 if LONG else 1000

TOTALS: Counter[str] = Counter()  # over all examples of the state machine


class Chaos:
    """The rules. Each takes numbers that choose among what there is to choose from."""

    def __init__(self, shape: int) -> None:
        blocks, seats = ((24, 4), (14, 3), (32, 6))[shape % 3]
        self.blocks = blocks
        self.cluster = Cluster(
            3,
            config=CONFIG,
            num_blocks=[blocks, blocks, 14],
            max_num_seqs=seats,
            depth=shape // 3 % 3,
            stage_blocks=(2, 8)[shape // 9 % 2],
        )
        self.budget = NUM_CHAOS
        self._specs = 0

    def submit(self, n: int) -> None:
        self._specs += 1
        prompt = tuple(range(n % 7, n % 7 + 1 + n % 29))
        unmovable = "pooling" if n % 23 == 22 else None
        spec = Spec(f"r{self._specs}", prompt, 1 + n % 27, grammar_polls=2 * (n % 5 == 0), unmovable=unmovable)
        self.cluster.submit(spec, self._alive(n // 7))

    def progress(self, n: int) -> None:
        for _ in range(1 + n % 3):
            self.cluster.progress(copies=n % 2 == 0)

    def deliver(self, n: int) -> None:
        wires = self.cluster.wires()
        if wires:
            self.cluster.deliver(wires[n % len(wires)])

    def step(self, n: int) -> None:
        self.cluster.step(n % len(self.cluster.engines))

    def finish_copy(self, n: int) -> None:
        self.cluster.finish_copy(n % len(self.cluster.engines))

    def migrate(self, n: int) -> None:
        movable = [s for s in self._open() if self.cluster.can_migrate(s)]
        if movable:
            stream = movable[n % len(movable)]
            others = [i for i in self.cluster.engines if i != stream.route and i not in self.cluster.lost]
            if others:
                self.cluster.migrate(stream, others[n // 5 % len(others)], MODES[n // 11 % 4])

    # ------------------------------------------------------------------ what costs budget

    def client_gone(self, n: int) -> None:
        streams = self._open()
        if streams:
            self.budget -= 1
            self.cluster.client_gone(streams[n % len(streams)])

    def preempt(self, n: int) -> None:
        running = [(i, r) for i in self.cluster.alive for r in self.cluster.engines[i].running]
        if running:
            self.budget -= 1
            instance, request = running[n % len(running)]
            self.cluster.engines[instance].preempt(request.spec.request_id)

    def crash(self, n: int) -> None:
        if len(self.cluster.alive) > 1:
            self.budget -= 1
            committing = [m for m in self.cluster.migrations.values() if m.state is State.COMMITTING]
            ends = [i for m in committing for i in (m.destination, m.source) if i in self.cluster.alive]
            instance = ends[n % len(ends)] if ends and n % 3 else self._alive(n)  # where it hurts, mostly
            self.cluster.crash(instance, heard=n // 3 % 4)

    def restart(self, n: int) -> None:
        """An instance crashes, be it the last one, and another one joins before or after that is known."""
        self.budget -= 1
        self.cluster.crash(self._alive(n), heard=n // 3 % 4)
        for wire in self.cluster.wires() if n % 2 else ():
            self.cluster.deliver(wire)
        self.cluster.join(self.blocks)
        self.cluster.counts["restarted"] += 1

    def lose_operation(self, n: int) -> None:
        if self.cluster.lose_operation(self._alive(n), n // 3):
            self.budget -= 1

    def delay_answer(self, n: int) -> None:
        wires = [w for w in self.cluster.wires() if w[1] == FRONT_END]
        if wires and self.cluster.delay_answer(wires[n % len(wires)], n // 3):
            self.budget -= 1

    def lose_commit(self, n: int) -> None:
        """The next answers to COMMIT of one instance get lost: what it did has to be asked."""
        self.budget -= 1
        self.cluster.losing += [(n % len(self.cluster.engines), Op.COMMIT)] * (1 + n // 3 % 3)

    def lose_answer(self, n: int) -> None:
        wires = [w for w in self.cluster.wires() if w[1] == FRONT_END]
        if wires and self.cluster.lose_answer(wires[n % len(wires)], n // 3):
            self.budget -= 1

    def repeat(self, n: int) -> None:
        if self.cluster.repeat(n % 12):
            self.budget -= 1

    def jump(self, n: int) -> None:
        self.budget -= 1
        self.cluster.advance(JUMPS[n % len(JUMPS)])

    def fail(self, n: int) -> None:
        self.budget -= 1
        self.cluster.engines[n % len(self.cluster.engines)].fail_next.add(FAILURES[n // 3 % len(FAILURES)])

    def _alive(self, n: int) -> int:
        return self.cluster.alive[n % len(self.cluster.alive)]

    def _open(self) -> list[Stream]:
        return [s for s in self.cluster.streams.values() if s.is_open]


WEIGHTS: dict[str, int] = {
    "submit": 3, "progress": 18, "deliver": 30, "step": 12, "finish_copy": 8, "migrate": 14,
    "client_gone": 1, "preempt": 1, "crash": 4, "restart": 1, "lose_operation": 2, "delay_answer": 2, "lose_answer": 3,
    "lose_commit": 3, "repeat": 3, "jump": 2, "fail": 3,
}  # fmt: skip


def walk(seed: int, num_steps: int) -> Cluster:
    """One episode of random rules, then rest. Same seed, same episode."""
    rng = random.Random(seed)
    chaos = Chaos(seed)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    for _ in range(1 + rng.randrange(4)):
        chaos.submit(rng.randrange(1000))
    for name in rng.choices(names, weights, k=num_steps):
        if (name in DISTURBING and not chaos.budget) or (name == "submit" and len(chaos.cluster.streams) >= 8):
            continue
        act: Callable[[int], None] = getattr(chaos, name)
        act(rng.randrange(1000))
        chaos.cluster.check()
    chaos.cluster.quiesce()
    return chaos.cluster


REACHED = (
    "live committed", "committed after stages", "stop_and_copy committed", "recompute committed", "replay committed",
    "aborted: client gone", "aborted: finished", "aborted: preempted", "aborted: unmovable",
    "aborted: destination refused", "aborted: destination lost", "aborted: source lost", "aborted: export failed",
    "aborted: locating timeout", "aborted: reserving timeout", "aborted: copying timeout",
    "aborted: loading timeout", "aborted: detaching timeout",
    "commit refused", "woken while committing", "delivered while committing", "lost while committing",
    "lost after it had delivered",
    "answer lost", "answer late", "operation lost", "repeated", "crash", "restarted", "orphan",
)  # fmt: skip
"""What the walk must have seen, or it has proved nothing."""


def test_walk_keeps_every_law_and_reaches_every_outcome() -> None:
    """Thousands of random steps break no law, and reach commits of all kinds and aborts for every reason."""
    counts: Counter[str] = Counter()
    for seed in range(NUM_WALKS):
        try:
            counts.update(walk(seed, 100).counts)
        except AssertionError as error:
            raise AssertionError(f"walk({seed}, 100): {error}") from error
    assert not [name for name in REACHED if counts[name] < 5], counts
    assert counts["live committed"] > NUM_WALKS / 4, counts


def test_walk_is_deterministic() -> None:
    """The same seed tells the same story."""
    assert walk(11, 100).sent == walk(11, 100).sent


NUMBERS = st.integers(0, 1000)


class MigrationMachine(RuleBasedStateMachine):
    @initialize(shape=st.integers(0, 17), numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def begin(self, shape: int, numbers: list[int]) -> None:
        self.chaos = Chaos(shape)
        for n in numbers:
            self.chaos.submit(n)

    @precondition(lambda self: len(self.chaos.cluster.streams) < 8)
    @rule(n=NUMBERS)
    def submit(self, n: int) -> None:
        self.chaos.submit(n)

    @rule(what=st.sampled_from(NATURAL), n=NUMBERS)
    def live(self, what: str, n: int) -> None:
        getattr(self.chaos, what)(n)

    @precondition(lambda self: self.chaos.budget > 0)
    @rule(what=st.sampled_from(DISTURBING), n=NUMBERS)
    def disturb(self, what: str, n: int) -> None:
        getattr(self.chaos, what)(n)

    @invariant()
    def laws(self) -> None:
        if hasattr(self, "chaos"):
            self.chaos.cluster.check()

    def teardown(self) -> None:
        if hasattr(self, "chaos"):
            self.chaos.cluster.quiesce()
            counts = self.chaos.cluster.counts
            event(f"commits: {min(3, sum(v for k, v in counts.items() if k.endswith(' committed')))}")
            TOTALS.update(counts)


TestMigrationMachine = MigrationMachine.TestCase
if not LONG:
    TestMigrationMachine.settings = settings(max_examples=200, stateful_step_count=60)


def test_state_machine_reached_commits_and_aborts() -> None:
    """Runs after the state machine: its examples were not vacuous."""
    if not TOTALS:
        pytest.skip("the state machine did not run in this process before")
    commits = sum(count for name, count in TOTALS.items() if name.endswith(" committed"))
    aborts = {name for name in TOTALS if name.startswith("aborted: ")}
    assert commits > 50, TOTALS
    assert TOTALS["live committed"] > 10, TOTALS
    assert TOTALS["replay committed"] > 3, TOTALS
    assert len(aborts) > 6, TOTALS


def test_every_planted_fault_fits_the_code() -> None:
    """`make mutants` takes minutes; that its patches still apply is known in milliseconds."""
    from arriero.bench.mutants import patch
    from arriero.bench.planted import MUTANTS

    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        file = Path(core.__path__[0]).parent / mutant.file
        assert patch(file.read_text(), mutant) != file.read_text()
