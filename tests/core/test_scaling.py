"""Scaling: enough instances, not more, and no flapping."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from arriero.core.commands import Command, Drain, Launch, Stop
from arriero.core.config import LoadConfig, ScalingConfig, SchedulerConfig
from arriero.core.scaling import Scaler
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, InstanceState, Phase, RequestSnapshot
from arriero.core.view import ClusterView

CONFIG = ScalingConfig(
    low_freeness=10, high_freeness=60, min_instances=1, max_instances=4, period_s=5, cooldown_s=20, looks_ahead=False
)
AHEAD = replace(CONFIG, looks_ahead=True)


def snapshot(instance: InstanceId, num_running: int, blocks: int = 1) -> InstanceSnapshot:
    names = [f"{instance}-{n}" for n in range(num_running)]
    requests = [RequestSnapshot(request_id=name, phase=Phase.RUNNING, num_blocks=blocks) for name in names]
    return InstanceSnapshot.of(
        requests, instance=instance, time_s=0.0, num_blocks=100, num_free_blocks=100 - num_running * blocks,
        block_size=16, max_num_seqs=64,
    )  # fmt: skip


def view(*num_running: int, blocks: int = 1) -> ClusterView:
    made = ClusterView(LoadConfig(), random.Random(0))
    for instance, num in enumerate(num_running):
        made.set_state(instance, InstanceState.READY)
        made.see(snapshot(instance, num, blocks))
    return made


def decide(seen: ClusterView, *times: float, config: ScalingConfig = CONFIG, num_starting: int = 0) -> list[Command]:
    """What one scaler wants at the last of these times, while the load stays."""
    scaler, found = Scaler(config), list[Command]()
    for now in times:
        found = scaler.round(seen, (0, 0), num_starting, now)
    return found


def test_below_the_range_for_the_period_so_many_are_added_that_the_projected_average_is_in_it() -> None:
    """20 requests, 100 - 20 * 4 = 20 blocks: average 1; 180 more are needed for 10."""
    full = view(20, blocks=4)
    assert decide(full, 0, 4.9) == []
    assert decide(full, 0, 5) == [Launch(num_instances=2, reason="average freeness 1.0")]
    assert decide(full, 0, 5, config=replace(CONFIG, max_instances=2)) == [
        Launch(num_instances=1, reason="average freeness 1.0")
    ]
    assert decide(full, 0, 5, config=replace(CONFIG, max_instances=1)) == []


def test_instances_that_are_starting_count_as_if_they_were_there() -> None:
    assert decide(view(20, blocks=4), 0, 5, num_starting=2) == []


def test_above_the_range_even_without_it_the_one_with_fewest_requests_is_drained() -> None:
    idle = view(2, 0, 1)
    assert decide(idle, 0, 4.9) == []
    assert decide(idle, 0, 5) == [Drain(instance=1, reason="average freeness 65.7 without it")]


def test_one_is_drained_only_if_the_others_stay_within_the_range_without_it() -> None:
    assert decide(view(3, 3), 0, 5) == [], "(100 - 6) / 6 would be in the range, not above"
    assert decide(view(0, 1), 0, 5) == [Drain(instance=0, reason="average freeness 99.0 without it")]
    assert decide(view(1), 0, 5) == [], "the last one stays"
    assert decide(view(0, 1), 0, 5, num_starting=1) == [], "first see what comes"


def test_below_the_minimum_instances_are_started_at_once() -> None:
    three = replace(CONFIG, min_instances=3)
    assert decide(view(1), 0, config=three) == [Launch(num_instances=2, reason="1 instances, at least 3")]
    assert decide(view(1), 0, config=three, num_starting=2) == []


def test_nothing_is_decided_before_an_instance_has_shown_its_load() -> None:
    made = ClusterView(LoadConfig(), random.Random(0))
    made.set_state(0, InstanceState.READY)
    assert decide(made, 0, 5, 50) == []


def test_what_waits_globally_counts() -> None:
    scaler = Scaler(replace(CONFIG, period_s=0))
    (launch,) = scaler.round(view(1), (9, 90), 0, 0.0)
    assert launch == Launch(num_instances=1, reason="average freeness 0.9")


def test_a_scheduler_drains_stops_and_remembers_what_is_starting() -> None:
    config = SchedulerConfig(scaling=replace(CONFIG, period_s=0, cooldown_s=10))
    made = GlobalScheduler(config)
    for instance in (0, 1):
        made.instance_joined(instance, 0.0)
        made.snapshot(snapshot(instance, 0), 0.0)
    drain, stop = made.tick(1.0)
    assert isinstance(drain, Drain)
    assert stop == Stop(instance=drain.instance)
    made.instance_lost(drain.instance, 1.0)
    left = 1 - drain.instance
    made.snapshot(snapshot(left, 20, blocks=4), 2.0)
    assert made.tick(3.0) == [], "cooldown"
    (launch,) = made.tick(20.0)
    assert launch == Launch(num_instances=2, reason="average freeness 1.0")
    assert made.tick(60.0) == []
    made.launch_failed(60.0)
    assert made.tick(70.0) == [Launch(num_instances=1, reason="average freeness 6.0")]
    made.arrived(Dispatchable(request_id="r", num_prompt_tokens=1, max_tokens=1), 70.0)


def growing(config: ScalingConfig, blocks_per_s: float, until_s: int) -> tuple[float, Command] | None:
    """The first decision, and when, while the demand of one request on each of two instances grows."""
    scaler = Scaler(config)
    for now in range(until_s):
        commands = scaler.round(view(1, 1, blocks=int(blocks_per_s * now / 2)), (0, 0), 0, now)
        if commands:
            return now, commands[0]
    return None


def test_a_demand_that_keeps_growing_is_met_by_the_time_that_a_new_instance_takes_to_start() -> None:
    """200 blocks, 4 more a second are used: free for each of two requests are 100 - 2 t, and 60 less in 30 s."""
    plain, ahead = growing(CONFIG, 4, 60), growing(AHEAD, 4, 60)
    assert plain == (51, Launch(num_instances=1, reason="average freeness -2.0"))
    assert ahead is not None
    assert ahead[0] == 21, "at 16 s the 68 that are free for each will be 8 in 30 s; and 5 s of that"
    assert isinstance(ahead[1], Launch)
    assert growing(replace(AHEAD, start_s=0), 4, 60) == plain


def test_how_long_an_instance_takes_to_start_is_learned() -> None:
    scaler = Scaler(replace(AHEAD, period_s=1, cooldown_s=0))
    full = view(20, blocks=4)
    assert [len(scaler.round(full, (0, 0), 0, now)) for now in (0.0, 1.0)] == [0, 1]
    scaler.round(full, (0, 0), 2, 2.0)
    scaler.round(view(20, 0, 0, blocks=4), (0, 0), 0, 61.0)
    assert scaler._start_s == 60.0


def test_a_jump_is_no_growth() -> None:
    scaler = Scaler(AHEAD)
    loads = [view(2, 2)] * 12 + [view(2, 2, blocks=20)] * 20
    assert not [c for now, seen in enumerate(loads) for c in scaler.round(seen, (0, 0), 0, now)]


def test_with_a_look_ahead_nothing_is_drained_before_two_periods_have_been_seen() -> None:
    times = [float(now) for now in range(15)]
    assert decide(view(1, 0), *times, config=AHEAD) == []
    assert isinstance(decide(view(1, 0), *times, 15.0, config=AHEAD)[0], Drain)
    assert isinstance(decide(view(1, 0), 0.0, config=replace(AHEAD, period_s=0))[0], Drain)


class Load:
    """A cluster in which so many requests run, spread evenly; it does what the scaler says, with a delay."""

    def __init__(self, config: ScalingConfig, num_instances: int) -> None:
        self.config = config
        self.scaler = Scaler(config)
        self.num = num_instances
        self.starting: list[float] = []
        self.decisions: list[tuple[float, str]] = []

    def go_on(self, until_s: float, from_s: float, num_requests: int) -> None:
        for now in range(int(from_s), int(until_s)):
            self.num += sum(t <= now for t in self.starting)
            self.starting = [t for t in self.starting if t > now]
            share, rest = divmod(num_requests, self.num)
            seen = view(*[share + (n < rest) for n in range(self.num)], blocks=2)
            for command in self.scaler.round(seen, (0, 0), len(self.starting), now):
                self.decisions.append((now, type(command).__name__))
                if isinstance(command, Launch):
                    self.starting += [now + 30.0] * command.num_instances
                else:
                    self.num -= 1
            total = self.num + len(self.starting)
            assert self.config.min_instances <= total <= self.config.max_instances


@given(st.integers(1, 4), st.lists(st.integers(0, 60), min_size=1, max_size=4), st.booleans())
def test_minimum_maximum_and_cooldown_are_kept_and_a_steady_load_does_not_flap(
    num_instances: int, loads: Sequence[int], looks_ahead: bool
) -> None:
    cluster = Load(replace(CONFIG, looks_ahead=looks_ahead), num_instances)
    for phase, num_requests in enumerate(loads):
        before = len(cluster.decisions)
        cluster.go_on(400.0 * (phase + 1), 400.0 * phase, num_requests)
        kinds = {kind for _, kind in cluster.decisions[before:]}
        assert len(kinds) <= 1, "never up and down under one load"
    times = [t for t, _ in cluster.decisions]
    assert all(b - a >= CONFIG.cooldown_s for a, b in itertools.pairwise(times))
