"""A full event log, replayed, gives the commands that it has; and what is wrong with a log is said."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core.commands import Dispatch, Move
from arriero.core.config import (
    EventLogConfig,
    LoadConfig,
    LogLevel,
    QueueingConfig,
    RebalancingConfig,
    RebalancingRule,
    SchedulerConfig,
)
from arriero.core.errors import ConfigError, PolicyError
from arriero.core.policies import policy_config
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, Phase, RequestSnapshot
from arriero.core.view import ClusterView
from arriero.observe.decisions import EVENTS, RecordedScheduler, make_scheduler
from arriero.observe.events import EventLog
from arriero.observe.parity import Replay, replay, replay_lines

REBALANCING = RebalancingConfig(
    rule=RebalancingRule.PAPER, low_freeness=30, high_freeness=30, cooldown_s=0.5, max_migrations_per_instance=2
)
LOG = Path("events.jsonl")


FULL = EventLogConfig(level=LogLevel.FULL)


def log_of(config: SchedulerConfig, drive: Callable[[GlobalScheduler], object]) -> list[bytes]:
    """The lines of a full log, of a scheduler that ``drive`` told of events."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        events = EventLog(lambda: 0.0, path, config=FULL)
        drive(make_scheduler(config, events))
        events.close()
        return path.read_bytes().splitlines(keepends=True)


class AnyPolicy:
    """A user's own policy, which draws lots and now and then fails."""

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        if view.rng.random() < 0.2:
            raise ZeroDivisionError(request.request_id)
        return view.rng.choice(view.candidates)


# ---------------------------------------------------------------------- what is an event

ANY_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [*["arrived"] * 3, *["snapshot"] * 2, "tick", "ended", "joined", "draining", "lost", "migration_ended"]
        ),
        st.integers(0, 3),
        st.integers(0, 12),
        st.floats(0, 1, allow_nan=False),
    ),
    max_size=60,
)


class History:
    """Drives a scheduler through a drawn history, as a shell would."""

    def __init__(self, scheduler: GlobalScheduler) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.num_requests = 0
        self.where: dict[str, InstanceId] = {}
        self.alive: list[InstanceId] = []

    def run(self, events: Sequence[tuple[str, int, int, float]]) -> None:
        for instance in range(3):
            self.alive.append(instance)
            self.obey(self.scheduler.instance_joined(instance, self.now))
        for kind, instance, number, elapsed in events:
            self.now += elapsed
            getattr(self, f"_{kind}")(instance, number)

    def obey(self, commands: Sequence[Any]) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                self.where[command.request_id] = command.instance
            elif isinstance(command, Move) and self.where.get(command.request_id) == command.source:
                moving = self.scheduler.moving
                if command.request_id not in moving:
                    ends = (command.source, command.destination)
                    self.obey(self.scheduler.migration_started(command.request_id, *ends, self.now))

    def _arrived(self, instance: int, number: int) -> None:
        self.num_requests += 1
        facts = Dispatchable(
            request_id=f"r{self.num_requests}\u2028é",
            num_prompt_tokens=1 + 40 * number,
            max_tokens=100,
            priority=instance - 1,
            is_replay=number == 12,
            block_hashes=tuple(range(2**63 - 2, 2**63 - 2 + number % 2)),
        )
        self.obey(self.scheduler.arrived(facts, self.now))

    def _snapshot(self, instance: int, number: int) -> None:
        held = sorted(r for r, i in self.where.items() if i == instance)
        requests = [
            RequestSnapshot(
                request_id=r,
                phase=Phase.WAITING if n % 4 == 3 else Phase.RUNNING,
                priority=n % 3,
                num_tokens=16 * number,
                num_blocks=0 if n % 4 == 3 else 1 + number,
                demand_blocks=number,
            )
            for n, r in enumerate(held)
        ]
        used = sum(r.num_blocks for r in requests)
        snapshot = InstanceSnapshot.of(
            requests,
            instance=instance,
            time_s=self.now / 3,
            num_blocks=200,
            num_free_blocks=max(0, 200 - used),
            block_size=16,
            max_num_seqs=8,
            num_preemptions=number,
        )
        self.obey(self.scheduler.snapshot(snapshot, self.now))

    def _tick(self, instance: int, number: int) -> None:
        self.obey(self.scheduler.tick(self.now))

    def _ended(self, instance: int, number: int) -> None:
        if self.where:
            request = sorted(self.where)[number % len(self.where)]
            del self.where[request]
            self.obey(self.scheduler.ended(request, self.now))

    def _joined(self, instance: int, number: int) -> None:
        if instance not in self.alive:
            self.alive.append(instance)
            self.obey(self.scheduler.instance_joined(instance, self.now))

    def _draining(self, instance: int, number: int) -> None:
        if instance in self.alive:
            self.obey(self.scheduler.instance_draining(instance, self.now))

    def _lost(self, instance: int, number: int) -> None:
        if instance in self.alive:
            self.alive.remove(instance)
            self.obey(self.scheduler.instance_lost(instance, self.now))
            self.where = {r: i for r, i in self.where.items() if i != instance}

    def _migration_ended(self, instance: int, number: int) -> None:
        if self.scheduler.moving:
            request, (_, destination) = sorted(self.scheduler.moving.items())[0]
            ok = number % 3 > 0
            if ok and request in self.where:
                self.where[request] = destination
            self.obey(self.scheduler.migration_ended(request, self.now, ok=ok))


CONFIGS = {
    "freeness": SchedulerConfig(rebalancing=REBALANCING, no_instance_timeout_s=0.5),
    "headroom": SchedulerConfig(load=LoadConfig(load_targets=((-1, 0.5), (0, 0.9))), rebalancing=REBALANCING),
    "arriero": replace(
        policy_config("arriero"), queueing=QueueingConfig(reserve_tokens_per_running=16), no_instance_timeout_s=0.5
    ),
    "random": SchedulerConfig(dispatch_policy=f"{__name__}.AnyPolicy", seed=7, rebalancing=REBALANCING),
}


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.sampled_from(sorted(CONFIGS)), ANY_EVENTS)
def test_any_history_replayed_gives_the_identical_commands(
    name: str, events: list[tuple[str, int, int, float]]
) -> None:
    lines = log_of(CONFIGS[name], lambda scheduler: History(scheduler).run(events))
    result = replay_lines(LOG, lines)
    assert result.difference is None
    assert result.num_events == sum(b'"event":"decision"' in line for line in lines)


def long_history(seed: int) -> list[tuple[str, int, int, float]]:
    rng = random.Random(seed)
    kinds = ["arrived"] * 4 + ["ended"] * 4 + ["snapshot"] * 4 + ["tick", "tick", "migration_ended"]
    return [(rng.choice(kinds), rng.randrange(3), rng.randrange(13), rng.random()) for _ in range(600)]


@pytest.mark.parametrize("name", CONFIGS)
def test_another_process_with_other_hashes_decides_alike(name: str, tmp_path: Path) -> None:
    """The order of a set of strings changes from process to process: no decision may depend on it."""
    path = tmp_path / "events.jsonl"
    lines = log_of(CONFIGS[name], lambda scheduler: History(scheduler).run(long_history(seed=3)))
    path.write_bytes(b"".join(lines))
    assert name == "arriero" or sum(b'"Move"' in line for line in lines) > 5
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "arriero.cli", "replay", str(path)], capture_output=True, text=True, env=env, cwd=root
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" commands, identical\n")


def test_every_method_of_the_scheduler_that_is_told_the_time_is_recorded() -> None:
    """And nothing else that changes it is public: what only reads may be called at any time."""
    told = {n for n, m in inspect.getmembers(GlobalScheduler, inspect.isfunction) if "now" in _parameters(m)}
    assert {n for n in told if not n.startswith("_")} == set(EVENTS)
    assert {"arrived", "snapshot", "ended", "instance_joined", "migration_started", "tick"} < set(EVENTS)
    assert all(getattr(RecordedScheduler, n) is not getattr(GlobalScheduler, n) for n in EVENTS)


def _parameters(function: Any) -> Any:
    return inspect.signature(function).parameters


def test_without_a_full_log_nothing_is_recorded() -> None:
    not_full = EventLog(lambda: 0.0, Path(os.devnull))
    for events in (None, not_full, EventLog(lambda: 0.0, config=FULL)):
        assert type(make_scheduler(SchedulerConfig(), events)) is GlobalScheduler
    not_full.close()


def test_decisions_go_to_the_file_alone(tmp_path: Path) -> None:
    events = EventLog(lambda: 0.0, tmp_path / "log", config=FULL)
    make_scheduler(SchedulerConfig(), events).instance_joined(0, 1.5)
    events.emit("instance_ready", instance=0)
    events.close()
    assert [e["event"] for e in events.recent(10)] == ["instance_ready"]
    decision = json.loads((tmp_path / "log").read_text().splitlines()[2])
    assert decision == {
        "seq": 2,
        "time_s": 1.5,
        "event": "decision",
        "on": "instance_joined",
        "given": {"instance": 0},
        "commands": [],
    }


def test_a_policy_that_stops_the_scheduler_stops_it_in_the_replay_too() -> None:

    def until_it_stops(scheduler: GlobalScheduler) -> None:
        scheduler.instance_joined(0, 0.0)
        with contextlib.suppress(PolicyError):
            for number in range(100):
                scheduler.arrived(Dispatchable(request_id=f"r{number}", num_prompt_tokens=1, max_tokens=1), 1.0)

    lines = log_of(replace(CONFIGS["random"], policy_errors_stop=True), until_it_stops)
    assert b'"error":"dispatch policy' in lines[-1]
    assert replay_lines(LOG, lines).difference is None


# ---------------------------------------------------------------------- what the replay says


def a_log() -> list[bytes]:
    def drive(scheduler: GlobalScheduler) -> None:
        scheduler.instance_joined(0, 1.0)
        scheduler.instance_joined(1, 2.0)
        scheduler.arrived(Dispatchable(request_id="r", num_prompt_tokens=5, max_tokens=9), 3.25)

    return log_of(SchedulerConfig(), drive)


def test_identical_is_said_with_what_was_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = replay_lines(LOG, a_log())
    assert str(result) == "3 events, 1 commands, identical"


def test_the_first_difference_is_shown_with_its_inputs() -> None:
    lines = a_log()
    lines[-1] = lines[-1].replace(b'"instance":0,"reason"', b'"instance":1,"reason"')
    result = replay_lines(LOG, lines)
    difference = result.difference
    assert difference is not None
    assert (difference.line, difference.time_s, difference.event) == (5, 3.25, "arrived")
    first, shown, was, now = str(result).splitlines()
    assert first == "different after 3 events, 1 commands"
    assert shown.startswith('line 5, 3.250000 s: arrived {"request":{"request_id":"r","num_prompt_tokens":5')
    assert was.startswith('  recorded: [{"Dispatch":{"request_id":"r","instance":1')
    assert now.startswith('  replayed: [{"Dispatch":{"request_id":"r","instance":0')


def test_every_run_in_a_file_is_replayed_by_a_scheduler_of_its_own() -> None:
    assert str(replay_lines(LOG, a_log() + a_log())) == "6 events, 2 commands, identical"


def test_a_log_of_another_version_is_replayed_and_said_to_be_one() -> None:
    lines = a_log()
    lines[0] = b'{"format":"arriero-events/1","arriero":"0.0.1"}\n'
    assert "identical; the log is of arriero 0.0.1, this is " in str(replay_lines(LOG, lines))


def test_a_log_that_ends_in_the_middle_of_a_line_is_replayed_up_to_there() -> None:
    lines = a_log()
    lines.append(lines[-1][:50])
    assert str(replay_lines(LOG, lines)) == "3 events, 1 commands, identical; line 6 is cut off, and ends the log"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [], "has no decisions: record it with --event-log-level full"),
        (lambda lines: lines[:1], "has no decisions"),
        (lambda lines: lines[1:], "line 1: format=None is not 'arriero-events/1'"),
        (lambda lines: [b'{"format":"arriero-events/9"}\n'], "line 1: format='arriero-events/9' is not"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: a decision of no scheduler"),
        (lambda lines: [*lines, b"rubbish\n"], "line 6: b'rubbish\\n' cannot be understood"),
        (lambda lines: [*lines, b"\xff{}\n"], "line 6: "),
        (lambda lines: [*lines, b'{"event":"events_left_out","num_events":7}\n'], "line 6: 7 events are missing"),
        (lambda lines: [*lines, b'{"event":"decision","on":"sang"}\n'], "line 6: on='sang' is no event"),
        (lambda lines: [*lines, b'{"event":"decision","on":"_forget"}\n'], "line 6: on='_forget' is no event"),
        (lambda lines: [*lines, b'{"event":"decision","on":"ended","given":{}}\n'], "line 6: b'{}' cannot be"),
        (lambda lines: [lines[0], b'{"event":"scheduler","config":{"tick_s":"x"}}\n'], "line 2: "),
        (lambda lines: [lines[0], b'{"event":"scheduler","config":{"tick_s":-1.0}}\n'], "tick_s=-1.0 is invalid"),
    ],
)
def test_what_is_wrong_with_a_log_is_said(change: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        replay_lines(LOG, change(a_log()))
    assert says in str(error.value)


def test_a_log_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        replay(tmp_path / "missing.jsonl")


def test_the_replay_of_a_file_is_that_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"".join(a_log()))
    assert replay(tmp_path / "log") == Replay(num_events=3, num_commands=1)
