"""GlobalScheduler: events in, decisions out; its laws hold whatever happens in whatever order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arriero.core.commands import Command, Dispatch, Move, PolicyFailed, Reject, RejectKind, Stop
from arriero.core.config import RebalancingConfig, SchedulerConfig
from arriero.core.errors import ConfigError, PolicyError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, Phase, RequestId, RequestSnapshot

REBALANCING = RebalancingConfig(low_freeness=10, high_freeness=20, cooldown_s=5, max_migrations_per_instance=1)


def facts(request_id: RequestId = "r", num_prompt_tokens: int = 15) -> Dispatchable:
    return Dispatchable(request_id=request_id, num_prompt_tokens=num_prompt_tokens, max_tokens=10)


def running(request_id: RequestId, blocks: int) -> RequestSnapshot:
    return RequestSnapshot(request_id=request_id, phase=Phase.RUNNING, num_blocks=blocks, num_tokens=16 * blocks)


def snapshot(instance: InstanceId, *requests: RequestSnapshot, num_blocks: int = 100) -> InstanceSnapshot:
    free = num_blocks - sum(r.num_blocks for r in requests)
    return InstanceSnapshot.of(
        requests, instance=instance, time_s=0.0, num_blocks=num_blocks, num_free_blocks=free, block_size=16,
        max_num_seqs=8,
    )  # fmt: skip


def scheduler(
    *instances: InstanceId, rebalancing: RebalancingConfig | None = REBALANCING, dispatch_policy: str = "freeness"
) -> GlobalScheduler:
    made = GlobalScheduler(SchedulerConfig(dispatch_policy=dispatch_policy, rebalancing=rebalancing))
    for instance in instances:
        assert made.instance_joined(instance, 0.0) == []
    return made


def dispatched(commands: Sequence[Command]) -> InstanceId:
    """Where the one request goes that is dispatched."""
    (dispatch,) = commands
    assert isinstance(dispatch, Dispatch)
    return dispatch.instance


def rejected(commands: Sequence[Command]) -> RejectKind:
    (reject,) = commands
    assert isinstance(reject, Reject)
    return reject.kind


def moves_of(commands: Sequence[Command]) -> list[Move]:
    assert all(isinstance(c, Move) for c in commands)
    return [c for c in commands if isinstance(c, Move)]


def unbalanced(rebalancing: RebalancingConfig = REBALANCING) -> GlobalScheduler:
    """Instance 0 is full with requests of 20 blocks, a to e; instance 1 is empty."""
    made = scheduler(0, 1, rebalancing=rebalancing)
    for name in "abcde":
        made.view.sent(facts(name), 0)
    made.snapshot(snapshot(0, *[running(name, 20) for name in "abcde"]), 0.0)
    made.snapshot(snapshot(1), 0.0)
    return made


def requests_of(commands: Sequence[Command]) -> list[RequestId]:
    return [m.request_id for m in moves_of(commands)]


# ---------------------------------------------------------------------- dispatch


def test_a_request_goes_to_the_freest_instance_and_counts_there_at_once() -> None:
    cluster = scheduler(0, 1)
    cluster.snapshot(snapshot(0, running("old", 1)), 0.0)
    cluster.snapshot(snapshot(1), 0.0)
    assert dispatched(cluster.arrived(facts("a"), 0.0)) == 1
    # Now both have 99 blocks left, but 0 has no request of ours in its care.
    assert cluster.freeness(0) == cluster.freeness(1) == 99
    assert dispatched(cluster.arrived(facts("b"), 0.0)) == 0


def test_nothing_can_be_dispatched_before_an_instance_has_joined() -> None:
    cluster = scheduler()
    assert rejected(cluster.arrived(facts(), 0.0)) is RejectKind.UNAVAILABLE
    assert cluster.num_queued == 0


def test_a_request_may_wait_for_the_first_instance_until_its_time_is_over() -> None:
    cluster = GlobalScheduler(SchedulerConfig(no_instance_timeout_s=5))
    for number, now in enumerate((0.0, 1.0, 2.0)):
        assert cluster.arrived(facts(f"r{number}"), now) == []
    cluster.ended("r1", 2.0)
    assert cluster.tick(5.0) == []
    assert rejected(cluster.tick(5.1)) is RejectKind.UNAVAILABLE
    assert dispatched(cluster.instance_joined(0, 6.0)) == 0
    assert cluster.tick(100.0) == []
    assert cluster.num_queued == 0
    assert cluster.ledger.instance_of("r2") == 0


def test_replays_go_first_then_the_more_urgent_then_who_came_first() -> None:
    cluster = GlobalScheduler(SchedulerConfig(no_instance_timeout_s=5))
    for name, urgency, is_replay in (("c", 0, False), ("d", 0, False), ("b", -1, False), ("a", 7, True)):
        cluster.arrived(replace(facts(name), priority=urgency, is_replay=is_replay), 0.0)
    commands = cluster.instance_joined(0, 1.0)
    assert [c.request_id for c in commands if isinstance(c, Dispatch)] == ["a", "b", "c", "d"]


def test_a_request_that_fits_no_instance_is_rejected_and_one_that_fits_some_is_not() -> None:
    cluster = scheduler(0, 1)
    assert dispatched(cluster.arrived(facts("early", 10_000), 0.0)) == 0, "no instance has shown its size"
    cluster.snapshot(snapshot(0, num_blocks=10), 0.0)
    assert rejected(cluster.arrived(facts("long", 160), 0.0)) is RejectKind.IMPOSSIBLE
    assert not cluster.ledger.knows("long")
    cluster.snapshot(snapshot(1, num_blocks=11), 0.0)
    cluster.arrived(facts("long", 160), 0.0)
    assert cluster.ledger.knows("long")


def test_nothing_is_dispatched_to_a_draining_or_dead_instance_however_empty_it_is() -> None:
    cluster = scheduler(0, 1, 2)
    cluster.snapshot(snapshot(0, running("old", 90)), 0.0)
    cluster.instance_draining(1, 0.0)
    cluster.instance_lost(2, 0.0)
    assert {dispatched(cluster.arrived(facts(f"r{n}"), 0.0)) for n in range(20)} == {0}
    cluster.instance_lost(0, 0.0)
    assert rejected(cluster.arrived(facts("last"), 0.0)) is RejectKind.UNAVAILABLE


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(ConfigError):
        scheduler(dispatch_policy="fastest")


def test_a_request_that_could_not_be_placed_or_has_ended_counts_nowhere() -> None:
    cluster = scheduler(0)
    cluster.snapshot(snapshot(0), 0.0)
    cluster.arrived(facts("a"), 0.0)
    cluster.ended("a", 0.0)
    cluster.ended("a", 0.0)
    assert cluster.freeness(0) == 100


# ---------------------------------------------------------------------- snapshots


def test_a_snapshot_that_shows_a_request_takes_the_place_of_the_estimate() -> None:
    cluster = scheduler(0)
    cluster.snapshot(snapshot(0), 0.0)
    cluster.arrived(facts("a", num_prompt_tokens=10 * 16 - 1), 0.0)
    assert cluster.freeness(0) == 90
    cluster.snapshot(snapshot(0, running("a", 4)), 0.0)
    assert cluster.freeness(0) == 96


def test_an_instance_without_a_snapshot_has_no_freeness_to_show() -> None:
    cluster = scheduler(0)
    assert cluster.freeness(0) == 0
    assert cluster.snapshot_of(0) is None


def test_the_late_snapshot_of_an_instance_that_left_is_ignored() -> None:
    cluster = scheduler(0)
    cluster.instance_lost(0, 0.0)
    cluster.snapshot(snapshot(0), 0.0)
    assert cluster.snapshot_of(0) is None
    assert cluster.tick(0.0) == []


def test_a_draining_instance_has_no_freeness_at_all() -> None:
    cluster = scheduler(0)
    cluster.snapshot(snapshot(0), 0.0)
    cluster.instance_draining(0, 0.0)
    assert cluster.freeness(0) == -math.inf


# ---------------------------------------------------------------------- rebalancing


def test_the_fuller_instance_gives_a_request_to_the_emptier_one_and_says_why() -> None:
    (move,) = moves_of(unbalanced().tick(0.0))
    assert (move.request_id, move.source, move.destination) == ("a", 0, 1)
    assert move.reason == "0 has 0.0 blocks a request left; 20 blocks move"


def test_without_a_configuration_nothing_moves() -> None:
    cluster = scheduler(0, 1, rebalancing=None)
    cluster.snapshot(snapshot(0, *[running(name, 20) for name in "abcde"]), 0.0)
    cluster.snapshot(snapshot(1), 0.0)
    assert cluster.tick(0.0) == []


def test_a_pair_of_instances_without_a_request_that_may_move_is_left_alone() -> None:
    cluster = scheduler(0, 1)
    cluster.snapshot(snapshot(0, running("too big", 99)), 0.0)
    cluster.snapshot(snapshot(1, num_blocks=50), 0.0)
    assert cluster.tick(0.0) == []


def test_an_instance_takes_part_in_no_more_moves_than_the_limit_on_either_side() -> None:
    for ends in ((0, 7), (7, 0), (1, 7), (7, 1)):
        cluster = unbalanced()
        cluster.migration_started("a", *ends, 0.0)
        assert cluster.tick(0.0) == []
        cluster.migration_ended("a", 0.0, ok=False)
        assert requests_of(cluster.tick(0.0)) == ["b"]


def test_up_to_the_limit_another_request_may_move_meanwhile() -> None:
    cluster = unbalanced(replace(REBALANCING, max_migrations_per_instance=2))
    cluster.migration_started("a", 0, 1, 0.0)
    assert requests_of(cluster.tick(0.0)) == ["b"], "a is moving already"


def test_a_request_that_could_not_move_rests_before_it_is_tried_again() -> None:
    cluster = unbalanced()
    cluster.migration_started("a", 0, 1, 0.0)
    cluster.migration_ended("a", 100.0, ok=False)
    assert requests_of(cluster.tick(104.9)) == ["b"]
    assert requests_of(cluster.tick(105.0)) == ["a"]


def test_a_request_that_moved_counts_at_its_destination_and_rests_there() -> None:
    cluster = unbalanced()
    cluster.migration_started("a", 0, 1, 99.99)
    cluster.migration_ended("a", 100.0, ok=True)
    assert [cluster.ledger.num_outstanding(i) for i in (0, 1)] == [4, 1]
    cluster.snapshot(snapshot(0), 0.0)
    cluster.snapshot(snapshot(1, running("a", 45), running("new", 50)), 0.0)
    assert requests_of(cluster.tick(104.9)) == ["new"]
    assert requests_of(cluster.tick(105.0)) == ["a"]


def test_a_request_that_ended_while_it_moved_leaves_nothing_behind() -> None:
    cluster = unbalanced()
    cluster.migration_started("a", 0, 1, 0.0)
    cluster.ended("a", 0.0)
    cluster.migration_ended("a", 0.0, ok=True)
    assert not cluster.ledger.knows("a")
    assert cluster.ledger.num_outstanding(1) == 0
    assert cluster.moving == {}


def test_a_draining_instance_gives_everything_away_however_empty_it_is() -> None:
    cluster = scheduler(0, 1)
    cluster.view.sent(facts("last"), 0)
    cluster.snapshot(snapshot(0, running("last", 2)), 0.0)
    cluster.snapshot(snapshot(1, running("busy", 30)), 0.0)
    assert cluster.tick(0.0) == []
    assert requests_of(cluster.instance_draining(0, 0.0)) == ["last"]


def test_a_draining_instance_is_stopped_once_it_holds_nothing_and_nothing_is_on_its_way() -> None:
    cluster = scheduler(0, 1)
    for name in ("a", "b", "c"):
        cluster.view.sent(facts(name), 0)
    cluster.snapshot(snapshot(0, running("a", 2), running("b", 2)), 0.0)
    assert requests_of(cluster.instance_draining(0, 1.0)) == ["c"], "where there is room is not known yet"
    cluster.migration_started("a", 0, 1, 1.0)
    assert cluster.ended("b", 2.0) == []
    assert cluster.ended("c", 2.0) == [], "it was sent, though no snapshot has shown it"
    assert cluster.snapshot(snapshot(0), 2.0) == [], "the move has not ended"
    assert cluster.migration_ended("a", 3.0, ok=True) == [Stop(instance=0)]
    assert scheduler(7).instance_draining(7, 0.0) == [Stop(instance=7)], "nothing was there at all"


def test_nothing_moves_to_a_draining_instance() -> None:
    cluster = unbalanced()
    cluster.instance_draining(1, 0.0)
    assert cluster.tick(0.0) == []


# ---------------------------------------------------------------------- laws of whole rounds

sizes = st.lists(st.integers(1, 30), max_size=6)
fleets = st.lists(st.tuples(sizes, st.integers(0, 100)), min_size=2, max_size=6)


def fleet(loads: Sequence[tuple[Sequence[int], int]], names: Sequence[int]) -> list[InstanceSnapshot]:
    """For each instance the blocks of its running requests, and its free blocks."""
    return [
        snapshot(name, *[running(f"{n}-{k}", b) for k, b in enumerate(blocks)], num_blocks=sum(blocks) + free)
        for n, (name, (blocks, free)) in enumerate(zip(names, loads, strict=True))
    ]


def watching(snapshots: Sequence[InstanceSnapshot]) -> GlobalScheduler:
    made = scheduler(*[s.instance for s in snapshots], rebalancing=replace(REBALANCING, cooldown_s=0))
    for s in snapshots:
        made.snapshot(s, 0.0)
    return made


def carry_out(snapshots: Sequence[InstanceSnapshot], moves: Sequence[Move]) -> list[InstanceSnapshot]:
    """The same load after the moves: nothing arrives, ends or grows."""
    requests = {s.instance: list(s.requests) for s in snapshots}
    for move in moves:
        (moved,) = [r for r in requests[move.source] if r.request_id == move.request_id]
        requests[move.source].remove(moved)
        requests[move.destination].append(moved)
    return [snapshot(s.instance, *requests[s.instance], num_blocks=s.num_blocks) for s in snapshots]


def num_in_need(snapshots: Sequence[InstanceSnapshot]) -> int:
    """Requests on instances that will soon run out of memory."""
    low = REBALANCING.low_freeness
    return sum(s.num_running for s in snapshots if s.num_running > 1 and s.num_free_blocks < low * s.num_running)


@given(fleets)
def test_a_steady_load_comes_to_rest_and_every_round_leaves_fewer_in_need(
    loads: list[tuple[list[int], int]],
) -> None:
    """No ping-pong, not even with no rest between two moves: whole numbers cannot fall for ever."""
    snapshots = fleet(loads, range(len(loads)))
    while moves := moves_of(watching(snapshots).tick(0.0)):
        after = carry_out(snapshots, moves)
        assert num_in_need(after) < num_in_need(snapshots)
        snapshots = after


@given(fleets, st.data())
def test_renaming_the_instances_changes_no_decision_but_ties(
    loads: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    names = data.draw(st.permutations(range(len(loads))))
    before, after = (watching(fleet(loads, order)) for order in (range(len(loads)), names))
    assume(len({before.freeness(n) for n in range(len(loads))}) == len(loads))
    rooms = [free - REBALANCING.high_freeness * (len(blocks) + 1) for blocks, free in loads]
    assume(len(set(rooms)) == len(rooms))
    renamed = [(m.request_id, names[m.source], names[m.destination]) for m in moves_of(before.tick(0.0))]
    assert [(m.request_id, m.source, m.destination) for m in moves_of(after.tick(0.0))] == renamed
    assert names[dispatched(before.arrived(facts(), 0.0))] == dispatched(after.arrived(facts(), 0.0))


class AnyHistory(RuleBasedStateMachine):
    """Instances come, fill, drain and die while requests run and move: the laws of every single decision."""

    def __init__(self) -> None:
        super().__init__()
        self.config = replace(REBALANCING, low_freeness=30, max_migrations_per_instance=2, high_freeness=30)
        self.cluster = scheduler(rebalancing=self.config)
        self.ready: set[InstanceId] = set()
        self.draining: set[InstanceId] = set()
        self.where: dict[RequestId, InstanceId] = {}
        self.blocks: dict[RequestId, int] = {}
        self.moving: dict[RequestId, tuple[InstanceId, InstanceId]] = {}
        self.rested_s: dict[RequestId, float] = {}
        self.now = 0.0
        self.num_instances = self.num_requests = 0

    @initialize(num_instances=st.integers(1, 4))
    def start(self, num_instances: int) -> None:
        for _ in range(num_instances):
            self.join()

    @rule()
    def join(self) -> None:
        self.cluster.instance_joined(self.num_instances, 0.0)
        self.ready.add(self.num_instances)
        self.num_instances += 1
        self.push(self.num_instances - 1)

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(sorted(self.ready)))
        self.cluster.instance_draining(instance, 0.0)
        self.ready.remove(instance)
        self.draining.add(instance)

    @precondition(lambda self: self.ready or self.draining)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """What it ran is lost, as far as the scheduler is concerned; open moves fail."""
        instance = data.draw(st.sampled_from(sorted(self.ready | self.draining)))
        self.cluster.instance_lost(instance, 0.0)
        self.ready.discard(instance)
        self.draining.discard(instance)
        for request in [r for r, ends in self.moving.items() if instance in ends]:
            self.end_move(request, ok=False)
        for request in [r for r, i in self.where.items() if i == instance]:
            self.end(request)

    @rule(blocks=st.integers(1, 40))
    def dispatch(self, blocks: int) -> None:
        self.num_requests += 1
        request = facts(f"r{self.num_requests}", 16 * blocks - 1)
        free = {i: self.cluster.freeness(i) for i in self.ready}
        commands = self.cluster.arrived(request, self.now)
        if not self.ready:
            assert rejected(commands) is RejectKind.UNAVAILABLE
            return
        chosen = dispatched(commands)
        assert chosen in self.ready, "never to a draining or dead instance"
        assert free[chosen] == max(free.values())
        self.where[request.request_id], self.blocks[request.request_id] = chosen, blocks

    @precondition(lambda self: self.where)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.where))))

    def end(self, request: RequestId) -> None:
        del self.where[request], self.blocks[request]
        self.rested_s.pop(request, None)
        self.obey(self.cluster.ended(request, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def push_all(self) -> None:
        for instance in self.ready | self.draining:
            self.push(instance)

    def push(self, instance: InstanceId) -> None:
        held = [running(r, self.blocks[r]) for r, i in self.where.items() if i == instance]
        total = sum(r.num_blocks for r in held)
        self.obey(self.cluster.snapshot(snapshot(instance, *held, num_blocks=max(100, total)), self.now))

    def obey(self, commands: Sequence[Command]) -> None:
        """Empty draining instances are stopped, and only those; moves lead away from them."""
        for command in commands:
            if isinstance(command, Move):
                assert command.source in self.draining
                assert command.destination in self.ready
                continue
            assert isinstance(command, Stop)
            assert command.instance in self.draining
            assert command.instance not in self.where.values()

    @rule()
    def rebalance(self) -> None:
        moves = moves_of(self.cluster.tick(self.now))
        self.begin(moves)

    def begin(self, moves: Sequence[Move]) -> None:
        ends = [i for m in moves for i in (m.source, m.destination)]
        assert len(ends) == len(set(ends)), "no instance is both source and destination in one round"
        busy = Counter(i for pair in self.moving.values() for i in pair)
        for move in moves:
            assert move.source in self.ready, "the evacuation sees to draining ones"
            assert move.destination in self.ready
            assert busy[move.source] < self.config.max_migrations_per_instance
            assert busy[move.destination] < self.config.max_migrations_per_instance
            assert move.request_id not in self.moving
            assert self.now - self.rested_s.get(move.request_id, -math.inf) >= self.config.cooldown_s
            if self.where.get(move.request_id) == move.source:  # it has not ended since the snapshot
                self.cluster.migration_started(move.request_id, move.source, move.destination, 0.0)
                self.moving[move.request_id] = (move.source, move.destination)

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), ok=st.booleans())
    def migration_ends(self, data: st.DataObject, ok: bool) -> None:
        self.end_move(data.draw(st.sampled_from(sorted(self.moving))), ok=ok)

    def end_move(self, request: RequestId, *, ok: bool) -> None:
        _, destination = self.moving.pop(request)
        commands = self.cluster.migration_ended(request, self.now, ok=ok)
        if request in self.where:
            # An instance's death takes its requests out of the ledger before the moves of them have failed.
            if self.cluster.ledger.knows(request):
                self.rested_s[request] = self.now
            if ok:
                self.where[request] = destination
        moves = [c for c in commands if isinstance(c, Move) and c.source not in self.draining]
        self.obey([c for c in commands if c not in moves])
        self.begin(moves)

    @invariant()
    def every_request_is_in_the_care_of_the_instance_where_it_is(self) -> None:
        there = Counter(self.where.values())
        for instance in range(self.num_instances):
            assert self.cluster.ledger.num_outstanding(instance) == there[instance]

    def teardown(self) -> None:
        """Once everything has ended, the scheduler remembers no request and no instance."""
        for request in list(self.moving):
            self.end_move(request, ok=False)
        for request in list(self.where):
            self.end(request)
        for instance in self.ready | self.draining:
            self.cluster.instance_lost(instance, 0.0)
        cluster = self.cluster
        assert not any(vars(cluster.ledger).values())
        assert not (cluster.moving)
        assert not (cluster.num_queued)
        assert not (cluster.view.snapshots)
        assert not (cluster.view.states)
        assert cluster._rebalancer is not None
        assert not cluster._rebalancer._rested_at


TestAnyHistory = AnyHistory.TestCase


def test_a_request_whose_source_dies_in_the_middle_of_its_move_counts_at_the_destination() -> None:
    """It goes on there if the move succeeds; one that went to a dead instance counts nowhere."""
    made = scheduler(0, 1)
    made.arrived(facts("r"), 0.0)
    source = next(i for i in (0, 1) if made.ledger.num_outstanding(i))
    made.migration_started("r", source, 1 - source, 0.0)
    made.instance_lost(source, 0.0)
    assert made.ledger.num_outstanding(1 - source) == 1
    made.instance_lost(1 - source, 0.0)
    assert not made.ledger.knows("r")


class Stubborn:
    """A user's policy with a mistake."""

    def choose(self, request: Dispatchable, view: object) -> InstanceId:
        return 7


class Broken:
    """Another, which raises."""

    def choose(self, request: Dispatchable, view: object) -> InstanceId:
        raise ZeroDivisionError(request.request_id)


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ("Stubborn", "chose instance 7, which is none of the candidates [0, 1]"),
        ("Broken", "raised ZeroDivisionError('r')"),
    ],
)
def test_where_a_policy_fails_the_freest_instance_serves_and_the_failure_is_told(policy: str, error: str) -> None:
    made = scheduler(0, 1, dispatch_policy=f"{__name__}.{policy}")
    made.snapshot(snapshot(0, running("old", 10)), 0.0)
    made.snapshot(snapshot(1), 0.0)
    failed, dispatch = made.arrived(facts("r"), 0.0)
    assert failed == PolicyFailed(policy=f"{__name__}.{policy}", error=error)
    assert dispatched([dispatch]) == 1


@pytest.mark.parametrize("policy", ["Stubborn", "Broken"])
def test_a_simulation_stops_where_a_policy_fails_with_its_inputs(policy: str) -> None:
    made = GlobalScheduler(SchedulerConfig(dispatch_policy=f"{__name__}.{policy}", policy_errors_stop=True))
    made.instance_joined(0, 0.0)
    made.snapshot(snapshot(0, running("old", 10)), 0.0)
    with pytest.raises(PolicyError, match=rf"{policy}' .*request_id='r'.*request_id='old'"):
        made.arrived(facts("r"), 0.0)
    assert not made.ledger.knows("r")


def test_a_dispatch_says_what_its_instance_holds_of_the_prompt() -> None:
    made = scheduler(0, 1, dispatch_policy="prefix_freeness")
    for name, why in (("a", "by prefix_freeness; freeness 0.0"), ("b", "; holds 32 tokens of its prompt")):
        request = replace(facts(name, 40), block_hashes=(1, 2), num_hashed_tokens=32)
        (dispatch,) = made.arrived(request, 0.0)
        assert isinstance(dispatch, Dispatch)
        assert dispatch.instance == 0
        assert dispatch.reason.endswith(why)
        made.ended(name, 1.0)
