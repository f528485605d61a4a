"""Instances that die in virtual time: nobody is lost, nothing is left behind, and the same seed gives the same log."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.core.config import MigrationConfig, RebalancingConfig, ScalingConfig, SchedulerConfig
from arriero.core.errors import ConfigError
from arriero.core.types import MigrationMode
from arriero.observe.events import EventLog
from arriero.sim.config import SimEngineConfig
from arriero.sim.kills import Kill, parse_kills
from arriero.sim.report import summarize
from arriero.sim.simulator import SimulationResult, Simulator, SimulatorConfig, scheduler_config
from arriero.sim.step_time import StepTimeModel
from arriero.workload.workload import Arrival, Workload, make_workload

PER_TOKEN = StepTimeModel(a_mem=0, a=0, b=1, c=0, d=0, e=0, host_ms=0)
"""One millisecond for each token of the step."""


def engine(**facts: Any) -> SimEngineConfig:
    defaults = {"num_blocks": 1000, "block_bytes": 1 << 20, "step_time": PER_TOKEN, "with_contents": False}
    return SimEngineConfig(**{**defaults, **facts})


def cluster(num_instances: int, *kills: Kill, policy: str = "arriero", **facts: Any) -> SimulatorConfig:
    return SimulatorConfig(
        **{
            "engine": engine(),
            "num_instances": num_instances,
            "scheduler": scheduler_config(policy),
            "kills": kills,
            "launch_s": 0.5,
            **facts,
        }
    )


def simulate(
    arrivals: Sequence[Arrival],
    config: SimulatorConfig,
    prepare: Callable[[Simulator], None] | None = None,
) -> tuple[SimulationResult, Simulator, list[dict[str, Any]], bytes]:
    """Run it, and check what holds for every run; the events, and their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        logs: list[EventLog] = []

        def make_events(clock: Callable[[], float]) -> EventLog:
            logs.append(EventLog(clock, path))
            return logs[0]

        simulator = Simulator(config, Workload("test", arrivals), make_events=make_events)
        if prepare is not None:
            prepare(simulator)
        result = simulator.run()
        logs[0].close()
        written = path.read_bytes()
    simulator.check_integrity()
    for record in result.records:
        assert not record.rejected
        assert record.num_output == record.arrival.output_tokens
        assert record.arrival.arrival_s <= record.dispatch_s < record.first_token_s <= record.finish_s
    for instance in simulator.instances:
        assert instance.engine.num_free == config.engine.num_blocks
        assert [*instance.engine.live, *instance.engine.reserved] == []
        # A replay that came too early, while the import of a move was ending there, is forgotten with its lease.
        assert {f"parked {r}" for r in instance.port.parked} <= set(instance.llumlet.open_migrations())
        assert all(left.startswith("parked ") for left in instance.llumlet.open_migrations())
    assert simulator.migrations.open_migrations() == []
    assert not simulator.scheduler.moving
    assert len(simulator.scheduler.ledger) == simulator.scheduler.num_queued == 0
    events = [json.loads(line) for line in written.splitlines()[1:]]
    finishes = Counter(e["request"] for e in events if e["event"] == "finish")
    assert finishes == Counter({r.request_id: 1 for r in result.records})
    return result, simulator, events, written


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == kind]


# ---------------------------------------------------------------------- by hand


def test_a_request_goes_on_with_the_tokens_that_it_had() -> None:
    """The prompt takes 100 ms, so by 150.5 ms 51 tokens have come. At the other instance 151 tokens are computed anew
    for the 52nd, and the other 48 take a millisecond each. RESERVE, its answer and COMMIT take half a millisecond each.
    """
    config = cluster(2, Kill(0.1505, 0))
    result, _, events, _ = simulate([Arrival(0.0, 100, 100)], config)
    (record,) = result.records
    assert (record.instance, record.num_replays, record.num_kept) == (1, 1, 51)
    assert record.first_token_s == pytest.approx(0.1)
    assert record.finish_s == pytest.approx(0.1505 + 0.0015 + 0.151 + 0.048, abs=1e-6)
    assert [(e["instance"]) for e in of(events, "instance_lost")] == [0]
    (replay,) = of(events, "migration")
    assert (replay["source"], replay["destination"], replay["ok"], replay["cause"]) == (None, 1, True, "instance lost")
    assert [e["instance"] for e in of(events, "dispatch")] == [0, 1]


def test_a_request_without_a_token_starts_anew() -> None:
    result, *_ = simulate([Arrival(0.0, 100, 5)], cluster(2, Kill(0.05, 0)))
    (record,) = result.records
    assert (record.num_kept, record.instance) == (0, 1)
    assert record.first_token_s == pytest.approx(0.05 + 0.0015 + 0.1, abs=1e-6)


def test_a_replacement_joins_after_its_start_up_and_takes_what_waits() -> None:
    """The only instance dies; its request, and one that came before that and waited, are given to the next. The one
    that was running goes first.
    """
    config = cluster(1, Kill(0.2, 0), engine=engine(max_num_seqs=1))
    result, simulator, events, _ = simulate([Arrival(0.0, 100, 200), Arrival(0.1, 10, 1)], config)
    first, second = result.records
    assert [e["instance"] for e in of(events, "instance_ready")] == [0, 1]
    assert of(events, "instance_ready")[1]["time_s"] == pytest.approx(0.7)
    assert (first.instance, second.instance) == (1, 1)
    assert [e["request"] for e in of(events, "dispatch")] == ["r0", "r0", "r1"]
    assert min(first.finish_s, second.first_token_s) > 0.7
    assert (simulator.instances.lives[0].stopped_s, simulator.instances.lives[1].launched_s) == (0.2, 0.2)
    assert summarize(result)["num_lost_instances"] == summarize(result)["num_replays"] == 1


def test_an_instance_that_dies_while_it_is_started_is_started_again() -> None:
    config = cluster(1, Kill(0.2, 0), Kill(0.4, 1))
    result, _, events, _ = simulate([Arrival(0.0, 100, 200)], config)
    assert [e["instance"] for e in of(events, "instance_lost")] == [0, 1]
    assert [(e["instance"], e["time_s"]) for e in of(events, "instance_ready")][1:] == [(2, pytest.approx(0.9))]
    assert result.records[0].num_replays == 1


def test_a_replay_whose_instance_dies_before_it_is_there_is_tried_again() -> None:
    config = cluster(3, Kill(0.15, 0), Kill(0.1503, 1))
    result, _, events, _ = simulate([Arrival(0.0, 100, 100)], config)
    assert [(e["destination"], e["ok"], e["reason"]) for e in of(events, "migration")] == [
        (1, False, "destination lost"),
        (2, True, ""),
    ]
    (record,) = result.records
    assert (record.instance, record.num_kept, record.num_replays) == (2, 50, 1)
    assert record.finish_s > 0.15 + 0.25, "the second try is a quarter of a second later"


def test_after_the_last_request_nobody_dies() -> None:
    result, _, events, _ = simulate([Arrival(0.0, 10, 5)], cluster(2, Kill(99.0, 0)))
    assert result.num_lost_instances == 0
    assert of(events, "instance_lost") == []


@pytest.mark.parametrize("mode", list(MigrationMode))
@pytest.mark.parametrize("victim", [0, 1])
def test_open_migrations_end_as_the_protocol_says(mode: MigrationMode, victim: int) -> None:
    """A request moves from 0 to 1, and one of them dies at every stage of that."""
    idle = SchedulerConfig(
        dispatch_policy="round_robin", rebalancing=RebalancingConfig(low_freeness=-1e9, high_freeness=1e9)
    )
    reasons = set()
    for number in range(60):
        at_s = 0.35 + 0.0033 * number

        def prepare(simulator: Simulator) -> None:
            def move() -> None:
                record = simulator.records["r0"]
                if record.is_live and simulator.migrations.move(record, 1, mode, "test"):
                    simulator.scheduler.migration_started("r0", 0, 1, simulator.kernel.now)

            simulator.kernel.at(0.35, move)

        config = cluster(3, Kill(at_s, victim), scheduler=idle)
        result, _, _, _ = simulate([Arrival(0.0, 300, 300)], config, prepare)
        reasons |= {m.reason for m in result.moves if m.source is not None}
        record = result.records[0]
        assert record.num_replays == (record.num_kept > 0)
    assert reasons <= {"", "finished", "source lost", "destination lost"}
    assert ("source lost" if victim == 0 else "destination lost") in reasons
    assert "" in reasons or mode is MigrationMode.STOP_AND_COPY


def test_who_drains_and_dies_is_not_replaced() -> None:
    scaling = ScalingConfig(low_freeness=-1e9, high_freeness=-1e8, period_s=0, cooldown_s=9, min_instances=1)
    config = cluster(2, scheduler=replace(scheduler_config("infaas"), scaling=scaling, tick_s=0.05))
    arrivals = [Arrival(0.0, 100, 900), Arrival(0.0, 100, 900)]
    _, _, events, _ = simulate(arrivals, config)
    (drain,) = of(events, "instance_draining")
    config = replace(config, kills=(Kill(drain["time_s"] + 0.001, drain["instance"]),))
    _, _, events, _ = simulate(arrivals, config)
    assert len(of(events, "instance_lost")) == 1
    assert of(events, "instance_starting") == []
    stopped = replace(config, kills=(Kill(1.8, drain["instance"]), Kill(1.8, 7)))
    assert of(simulate(arrivals, stopped)[2], "instance_lost") == [], "it has stopped; there never was an instance 7"


# ---------------------------------------------------------------------- laws


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1 << 20),
    policy=st.sampled_from(["arriero", "llumnix", "infaas", "round_robin", "clairvoyant"]),
    times=st.lists(st.floats(0.0, 12.0), max_size=8),
    victims=st.randoms(use_true_random=False),
    num_instances=st.integers(1, 4),
    prefix_caching=st.booleans(),
    max_incoming=st.sampled_from([1, 16]),
)
def test_whoever_dies_every_request_ends_with_exactly_its_tokens(
    seed: int,
    policy: str,
    times: list[float],
    victims: Any,
    num_instances: int,
    prefix_caching: bool,
    max_incoming: int,
) -> None:
    alive, kills = list(range(num_instances)), []
    for time_s in sorted(times):
        victim = victims.choice(alive)
        alive.remove(victim)
        alive.append(num_instances + len(kills))
        kills.append(Kill(time_s, victim))
    workload = make_workload("M-M", num_requests=40, rate=8, priorities={-1: 0.2}, seed=seed)
    small = [
        replace(
            a,
            prompt_tokens=1 + a.prompt_tokens // 4,
            output_tokens=1 + a.output_tokens // 2,
            prefix_blocks=((n % 3, n % 3),) if prefix_caching else (),
        )
        for n, a in enumerate(workload.arrivals)
    ]
    config = cluster(
        num_instances,
        *kills,
        policy=policy,
        engine=engine(
            num_blocks=220,
            step_time=StepTimeModel(),
            priority_scheduling=True,
            prefix_caching=prefix_caching,
            max_num_seqs=12,
        ),
        migration=MigrationConfig(max_incoming=max_incoming),
    )
    result, simulator, events, written = simulate(small, config)
    lost = len(of(events, "instance_lost"))
    assert lost == result.num_lost_instances <= len(kills)
    assert len(simulator.instances) == num_instances + lost
    assert simulate(small, config)[3] == written
    if policy != "clairvoyant":
        assert simulate(small, replace(config, max_steps=1))[3] == written, "alike steps at once change nothing"


# ---------------------------------------------------------------------- what is asked for


def test_kills_are_read_by_time() -> None:
    assert parse_kills(["30:2", "1.5:0"]) == (Kill(1.5, 0), Kill(30.0, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["30"], "--kill 30 is invalid: give a time in seconds and an instance, as in --kill 30:2"),
        (["soon:1"], "--kill soon:1 is invalid: give a time"),
        (["30:x"], "--kill 30:x is invalid: give a time"),
        (["-1:0"], "--kill -1:0 is invalid: the time must be 0 or more seconds"),
        (["nan:0"], "--kill nan:0 is invalid: the time must be 0 or more seconds"),
        (["inf:0"], "--kill inf:0 is invalid: the time must be 0 or more seconds"),
        (["30:9"], "--kill 30:9 is invalid: there is no instance 9 at that time, name one from 0 to 3"),
        (["30:-1"], "--kill 30:-1 is invalid: there is no instance -1 at that time, name one from 0 to 3"),
        (["30:1", "40:1"], "--kill 40:1 is invalid: instance 1 is dead by then, name another"),
        (["30:4", "40:1"], "--kill 30:4 is invalid: there is no instance 4 at that time, name one from 0 to 3"),
    ],
)
def test_what_cannot_be_is_refused(values: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cluster(4, *parse_kills(values))
    assert message in str(raised.value)


def test_a_replacement_may_be_killed_too() -> None:
    assert cluster(4, *parse_kills(["30:1", "40:4"])).kills[1] == Kill(40.0, 4)
