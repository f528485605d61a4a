"""Draining: who leaves, in which order, where to, and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.commands import Command, Move, Stop
from arriero.core.config import DrainConfig, SchedulerConfig
from arriero.core.errors import ConfigError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceSnapshot, MigrationMode, Phase, RequestSnapshot

LIVE, RECOMPUTE = MigrationMode.LIVE, MigrationMode.RECOMPUTE
DRAIN = DrainConfig(max_moves=4, retry_s=0.1, max_tries=2, patience_s=2.0)


class World:
    """A scheduler with instances of 100 blocks and 8 places; all requests are on instance 0."""

    def __init__(self, num_instances: int = 2, drain: DrainConfig = DRAIN) -> None:
        self.scheduler = GlobalScheduler(SchedulerConfig(dispatch_policy="round_robin", drain=drain))
        self.now = 0.0
        self.scheduler.instance_joined(0, self.now)
        self.shows(0)
        self._waiting_instances = range(1, num_instances)

    def arrive(self, name: str, *, unmovable: str | None = None) -> None:
        self.scheduler.arrived(
            Dispatchable(request_id=name, num_prompt_tokens=10, max_tokens=99, unmovable=unmovable), self.now
        )

    def others_join(self) -> None:
        for instance in self._waiting_instances:
            self.scheduler.instance_joined(instance, self.now)
            self.shows(instance)

    def shows(self, instance: int, *requests: RequestSnapshot, free: int = 100) -> list[Command]:
        return self.scheduler.snapshot(
            InstanceSnapshot.of(
                requests,
                instance=instance,
                time_s=self.now,
                num_blocks=100,
                num_free_blocks=free,
                block_size=16,
                max_num_seqs=8,
            ),
            self.now,
        )

    def drain(self) -> list[Command]:
        return self.scheduler.instance_draining(0, self.now)

    def started(self, *commands: Command) -> None:
        for move in moves(commands):
            self.scheduler.migration_started(move.request_id, move.source, move.destination, self.now)

    def ended(self, name: str, *, ok: bool) -> list[Command]:
        return self.scheduler.migration_ended(name, self.now, ok=ok)


def runs(name: str, num_blocks: int = 5) -> RequestSnapshot:
    return RequestSnapshot(request_id=name, phase=Phase.RUNNING, num_tokens=16 * num_blocks, num_blocks=num_blocks)


def waits(name: str) -> RequestSnapshot:
    return RequestSnapshot(request_id=name, phase=Phase.WAITING, num_tokens=10, demand_blocks=1)


def moves(commands: list[Command] | tuple[Command, ...]) -> list[Move]:
    return [c for c in commands if isinstance(c, Move)]


def who(commands: list[Command]) -> list[str]:
    return [m.request_id for m in moves(commands)]


def test_waiting_requests_leave_first_then_short_ones_and_so_many_at_a_time() -> None:
    world = World()
    for name in "abcdef":
        world.arrive(name)
    world.others_join()
    world.shows(0, runs("a", 9), runs("b", 3), runs("c", 7), waits("d"), waits("e"))
    commands = world.drain()
    assert who(commands) == ["f", "d", "e", "b"], "f was sent and not seen yet: it waits"
    assert {(m.source, m.destination, m.mode, m.reason) for m in moves(commands)} == {(0, 1, LIVE, "0 drains")}
    world.started(*commands)
    assert moves(world.shows(0, runs("a", 9), runs("c", 7))) == []
    assert who(world.ended("d", ok=True)) == ["c"]


def test_an_empty_instance_is_to_be_stopped_at_once_and_a_full_one_when_all_have_left() -> None:
    world = World()
    world.others_join()
    assert world.drain() == [Stop(instance=0)]
    world = World()
    world.arrive("a")
    world.others_join()
    world.shows(0, runs("a"))
    world.started(*world.drain())
    assert world.ended("a", ok=True) == [], "its last snapshot shows the request"
    assert world.shows(0) == [Stop(instance=0)]


def test_requests_go_where_most_room_is_left() -> None:
    world = World(3)
    for name in "abc":
        world.arrive(name)
    world.others_join()
    world.shows(0, *[runs(n, 10) for n in "abc"])
    world.shows(1, free=30)
    world.shows(2, free=40)
    assert [m.destination for m in moves(world.drain())] == [2, 1, 2]


def test_what_fits_nowhere_waits_for_a_while_and_then_goes_without_its_cache() -> None:
    world = World()
    world.arrive("a")
    world.others_join()
    world.shows(0, runs("a", 10))
    world.shows(1, free=10)
    assert moves(world.drain()) == []
    world.now = 1.9
    assert moves(world.shows(0, runs("a", 10))) == []
    world.now = 2.0
    (move,) = moves(world.shows(0, runs("a", 10)))
    assert (move.destination, move.mode) == (1, RECOMPUTE)


def test_an_instance_with_a_queue_or_a_full_batch_takes_none_in_with_its_cache() -> None:
    for busy in ([waits("x")], [runs(f"x{n}", 1) for n in range(8)]):
        world = World()
        world.arrive("a")
        world.others_join()
        world.shows(0, runs("a"))
        world.shows(1, *busy)
        assert moves(world.drain()) == []


def test_a_move_that_failed_is_tried_again_after_a_while_and_then_without_its_cache() -> None:
    world = World()
    world.arrive("a")
    world.others_join()
    world.shows(0, runs("a"))
    commands = world.drain()
    for mode in (LIVE, RECOMPUTE):
        world.started(*commands)
        assert moves(world.ended("a", ok=False)) == []
        world.now += 0.1
        commands = world.shows(0, runs("a"))
        assert [m.mode for m in moves(commands)] == [mode]


def test_a_failure_elsewhere_is_not_remembered() -> None:
    world = World()
    world.arrive("a")
    world.others_join()
    world.shows(0, runs("a"))
    world.scheduler.migration_started("a", 0, 1, world.now)
    world.ended("a", ok=False)
    assert who(world.drain()) == ["a"]


def test_what_cannot_move_stays_and_nobody_is_stopped_before_its_end() -> None:
    world = World()
    world.arrive("a", unmovable="pooling")
    world.others_join()
    world.shows(0, runs("a"))
    assert world.drain() == []
    assert world.scheduler.ended("a", world.now) == []
    assert world.shows(0) == [Stop(instance=0)]


def test_with_nobody_to_go_to_they_stay_until_somebody_joins() -> None:
    world = World()
    world.arrive("a")
    world.shows(0, runs("a"))
    assert world.drain() == []
    world.scheduler.instance_joined(1, world.now)
    assert who(world.shows(1)) == ["a"]


def test_a_second_drain_has_its_own_moves_and_the_dead_have_none() -> None:
    world = World(3)
    world.arrive("a")
    world.others_join()
    world.shows(0, runs("a"))
    world.started(*world.drain())
    assert world.scheduler.instance_draining(1, world.now) == [], "somebody is about to arrive there"
    world.scheduler.instance_lost(0, world.now)
    world.scheduler.instance_lost(1, world.now)
    world.scheduler.instance_lost(1, world.now)
    assert moves(world.shows(2)) == []


def test_only_the_last_one_is_better_not_drained() -> None:
    world = World()
    assert world.scheduler.why_not_drain(0) == (
        "instance 0 is the last one that takes requests: nothing could move away from it"
    )
    world.others_join()
    assert world.scheduler.why_not_drain(0) is None
    world.drain()
    assert world.scheduler.why_not_drain(1) is not None
    assert world.scheduler.why_not_drain(0) is None
    assert world.scheduler.why_not_drain(7) is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_moves": 0}, "max_moves=0"),
        ({"max_tries": -1}, "max_tries=-1"),
        ({"copy_share": 1.5}, "copy_share=1.5"),
        ({"patience_s": -1.0}, "patience_s=-1.0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
    ],
)
def test_nonsense_is_refused(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DrainConfig(**values)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.sampled_from(["run", "wait", "unseen"]), st.integers(1, 60)), max_size=20),
    st.lists(st.booleans(), max_size=200),
    st.lists(st.integers(0, 100), min_size=1, max_size=3),
)
def test_every_drain_ends_whatever_fails(
    requests: list[tuple[str, int]], outcomes: list[bool], rooms: list[int]
) -> None:
    """Moves fail as they please for a while: each request leaves once, to an instance that is ready, and never more
    than ``max_moves`` are on their way.
    """
    world = World(1 + len(rooms))
    names = [f"r{n}" for n in range(len(requests))]
    for name in names:
        world.arrive(name)
    world.others_join()
    for instance, free in enumerate(rooms, 1):
        world.shows(instance, free=free)
    left = dict(zip(names, requests, strict=True))
    open_moves: list[Move] = []
    fate = iter(outcomes)

    def seen() -> list[RequestSnapshot]:
        shown = [runs(n, size) if how == "run" else waits(n) for n, (how, size) in left.items() if how != "unseen"]
        return sorted(shown, key=lambda r: r.phase is Phase.WAITING)

    def take(commands: list[Command]) -> bool:
        for move in moves(commands):
            assert move.request_id in left
            assert move.request_id not in {m.request_id for m in open_moves}
            assert 1 <= move.destination <= len(rooms)
            world.scheduler.migration_started(move.request_id, 0, move.destination, world.now)
            open_moves.append(move)
        assert len(open_moves) <= DRAIN.max_moves
        return Stop(instance=0) in commands

    world.shows(0, *seen())
    stopped = take(world.drain())
    for _ in range(500):
        if stopped:
            break
        world.now += 0.06
        if open_moves:
            move = open_moves.pop(0)
            ok = next(fate, True)
            if ok:
                del left[move.request_id]
            stopped = take(world.ended(move.request_id, ok=ok))
        stopped = take(world.shows(0, *seen())) or stopped
    assert stopped
    assert not left
