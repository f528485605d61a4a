"""Whatever moves whenever: every client gets the tokens that it would have got without a move.

What each test leaves unsaid is checked after it: all streams were exact, and no instance holds anything.
"""

from __future__ import annotations

import asyncio

import pytest

from arriero.core.messages import Op
from arriero.core.types import MigrationMode, Phase
from arriero.sim.wire import SimRequest

from .harness import LIVE, RECOMPUTE, STOP, Fleet, Operation, Pass, Stream, fleet_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLEET = {"num_instances": 3, "engine": {"max_num_batched_tokens": 64, "max_num_seqs": 24}}


@pytest.mark.parametrize("mode", list(MigrationMode))
@pytest.mark.parametrize("num_prompt_tokens", [1, 7, 8, 9, 500])
async def test_a_stream_goes_on_at_exactly_the_next_token(
    fleet: Fleet, mode: MigrationMode, num_prompt_tokens: int
) -> None:
    """Context lengths around a block's, and one of many blocks; source and destination are busy with others."""
    stream = fleet.submit(num_prompt_tokens, 80, at=0, seed=num_prompt_tokens)
    fleet.submit(at=0)
    fleet.submit(at=1)
    await fleet.at_least(5, stream)
    report = await fleet.move(stream, 1, mode)
    assert report.ok, report.reason
    assert (report.source, report.destination, stream.where, stream.live.num_moves) == (0, 1, 1, 1)
    assert report.num_tokens < 80
    assert (report.num_bytes > 0) is (mode is not RECOMPUTE)
    assert (len(report.stages) > 1) is (mode is LIVE and num_prompt_tokens == 500)
    await fleet.ended(stream)
    assert report.pause_s is not None


async def test_back_and_forth_again_and_again(fleet: Fleet) -> None:
    stream = fleet.submit(60, 400, at=0, seed=3)
    await fleet.at_least(2, stream)
    for number in range(24):
        await fleet.at_least(len(stream.tokens) + 1, stream)
        mode = (LIVE, LIVE, STOP, RECOMPUTE)[number % 4]
        report = await fleet.move(stream, (stream.where + 1 + number % 2) % 3, mode)
        assert report.ok, report.reason
    assert stream.finish is None
    assert stream.live.num_moves == 24


async def test_all_at_once_from_everywhere_to_everywhere(fleet: Fleet) -> None:
    streams = [fleet.submit(20 + 11 * i, 300, at=i % 3, seed=i or None) for i in range(15)]
    await fleet.at_least(1, *streams)
    moved = 0
    for step in (1, 2, 1):
        reports = await asyncio.gather(*[fleet.move(s, (s.where + step) % 3) for s in streams])
        moved += sum(r.ok for r in reports)
        assert {r.reason for r in reports} <= {"", "finished", "gone"}
    assert moved >= 15


async def test_sampling_goes_on_where_it_was(fleet: Fleet) -> None:
    """Seeded draws, stop tokens and minimum lengths count the tokens of both instances."""
    reference = fleet.submit(30, 60, at=0, seed=9)
    await fleet.ended(reference)
    stop = reference.tokens[45]
    same_prompt = reference.request.prompt_token_ids or []
    stopped = fleet.submit_request(SimRequest("stopped@0", same_prompt, 60, 9, stop_token_ids=[stop]))
    late = fleet.submit_request(SimRequest("late@0", same_prompt, 60, 9, stop_token_ids=[stop], min_tokens=50))
    await fleet.at_least(20, stopped, late)
    assert all(r.ok for r in await asyncio.gather(*[fleet.move(s, 1) for s in (stopped, late)]))
    await fleet.ended()
    assert (stopped.finish, stopped.tokens) == ("stop", reference.tokens[:46])
    assert (late.finish, late.tokens) == ("length", reference.tokens)
    del fleet.streams["stopped@0"]  # what it should have been was just said


@pytest.mark.parametrize("mode", list(MigrationMode))
async def test_a_prompt_that_is_prefilled_in_chunks_may_move_meanwhile(fleet: Fleet, mode: MigrationMode) -> None:
    """64 tokens a step: the moves fall into a prefill of many steps; blocks that are there travel."""
    first, second = (fleet.submit(1800, 20, at=0, seed=i) for i in range(2))
    await fleet.shown(0, lambda s: any(r.phase is Phase.RUNNING and r.num_blocks > 16 for r in s.requests))
    reports = await asyncio.gather(fleet.move(first, 1, mode), fleet.move(second, 2, mode))
    assert [r.reason for r in reports] == ["", ""]
    assert [len(s.live.tokens) == r.num_tokens == 0 for s, r in zip((first, second), reports, strict=True)]
    assert (reports[0].num_bytes > 0) is (mode is not RECOMPUTE)


async def test_two_hundred_moves_of_streams_that_come_and_go(fleet: Fleet) -> None:
    """Twenty clients, each moving without rest; half of them leave after ten moves."""

    async def client(number: int) -> None:
        stays = number % 2 == 0
        stream = fleet.submit(10 + 17 * number % 200, 150 if stays else 3000, at=number % 3, seed=number)
        while stream.finish is None and (stays or stream.live.num_moves < 10):
            await asyncio.sleep(0)
            if fleet.cluster.requests.get(stream.id) is not None:
                await fleet.move(stream, (stream.where + 1) % 3)
        fleet.abort(stream)

    await asyncio.gather(*[client(number) for number in range(20)])
    assert sum(s.live.num_moves for s in fleet.streams.values()) > 100


# ---------------------------------------------------------------------- ends in the middle


STAGES = [Op.LOCATE, Op.RESERVE, Op.COPY, Op.LOAD, Op.DETACH, Op.COMMIT, Op.RELEASE]


def hold(fleet: Fleet, op: Op, stream: Stream, *, answers: bool = False) -> None:
    """Hold the first ``op`` (or its answer) of a move back until the stream has ended."""
    held: list[asyncio.Task[None]] = []

    def keep(operation: Operation, go: Pass) -> None:
        if operation.op is not op or held:
            go()
            return

        async def later() -> None:
            await fleet.ended(stream)
            go()

        held.append(asyncio.get_running_loop().create_task(later()))

    if answers:
        fleet.faults.on_answer = keep
    else:
        fleet.faults.on_send = keep


@pytest.mark.parametrize("answers", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("op", STAGES)
async def test_a_stream_may_end_at_every_stage_of_its_move(fleet: Fleet, op: Op, answers: bool) -> None:
    """Before an operation is carried out, or after it and before the owner knows. Only a detached request waits."""
    stream = fleet.submit(100, 40, at=0, seed=1)
    await fleet.at_least(3, stream)
    frozen = (op is Op.DETACH and answers) or (op is Op.COMMIT and not answers)
    if not frozen:
        hold(fleet, op, stream, answers=answers)
    report = await fleet.move(stream, 1)
    await fleet.ended(stream)
    moved = frozen or op is Op.RELEASE or (op is Op.COMMIT and answers)
    assert report.ok is moved
    assert stream.where == int(moved)
    if not moved:
        assert report.reason in ("finished", "gone")


@pytest.mark.parametrize("answers", [False, True], ids=["sent", "answered"])
@pytest.mark.parametrize(
    ("op", "mode"),
    [(op, mode) for op in STAGES for mode in MigrationMode if mode is LIVE or op not in (Op.COPY, Op.LOAD)],
)
async def test_a_client_may_leave_at_every_stage_of_the_move(
    fleet: Fleet, op: Op, mode: MigrationMode, answers: bool
) -> None:
    """While an operation is under way, or when its answer has come and before the next one is sent."""
    stream = fleet.submit(100, 2000, at=0)
    await fleet.at_least(3, stream)

    def leave_behind(operation: Operation, go: Pass) -> None:
        go()
        if operation.op is op:
            asyncio.get_running_loop().call_soon(fleet.abort, stream)

    def leave_before(operation: Operation, go: Pass) -> None:
        if operation.op is op:
            fleet.abort(stream)
        go()

    if answers:
        fleet.faults.on_answer = leave_before
    else:
        fleet.faults.on_send = leave_behind
    report = await fleet.move(stream, 1, mode)
    await fleet.until(lambda: stream.aborted)
    if answers:
        assert report.ok is (op in (Op.COMMIT, Op.RELEASE))
        assert report.reason == ("" if op is Op.RELEASE else "client gone")
    else:  # the operation may be quicker
        assert report.ok or report.reason == "client gone"


async def test_clients_that_leave_free_everything_at_once(fleet: Fleet) -> None:
    """Running, waiting, in a move; and twice, and unknown ones."""
    running = [fleet.submit(50, 3000, at=0) for _ in range(24)]
    waiting = [fleet.submit(50, 3000, at=0) for _ in range(3)]
    await fleet.at_least(2, *running)
    moving = [asyncio.ensure_future(fleet.move(s, 1)) for s in (running[0], waiting[0])]
    await asyncio.sleep(0.002)
    fleet.abort(*running, *waiting)
    fleet.cluster.abort([running[0].id, "nobody"])
    for move in moving:
        report = await move
        assert report.ok or report.reason == "client gone"
    await fleet.shown(0, lambda s: not s.requests)
    await fleet.shown(1, lambda s: not s.requests)


# ---------------------------------------------------------------------- queues


async def test_waiting_requests_move_without_a_copy(fleet: Fleet) -> None:
    running = [fleet.submit(20, 3000, at=0) for _ in range(24)]
    waiting = [fleet.submit(20, 30, at=0, seed=i) for i in range(4)]
    await fleet.shown(0, lambda s: s.num_waiting == 4)
    reports = await asyncio.gather(*[fleet.move(s, 1 + i % 2) for i, s in enumerate(waiting)])
    assert [(r.ok, r.num_bytes, r.stages) for r in reports] == [(True, 0, [])] * 4
    await fleet.ended(*waiting)
    assert not any(s.finish for s in running)
    fleet.abort(*running)


async def test_moves_that_must_wait_at_the_destination_are_refused_but_queued_ones_join_its_queue(fleet: Fleet) -> None:
    """A running request would lose its place: it stays. A waiting one only changes the queue."""
    at_0 = [fleet.submit(20, 3000, at=0) for _ in range(25)]
    at_1 = [fleet.submit(20, 3000, at=1) for _ in range(25)]
    await fleet.shown(0, lambda s: s.num_waiting == 1)
    await fleet.shown(1, lambda s: s.num_waiting == 1)
    report = await fleet.move(at_0[0], 1)
    assert not report.ok
    assert report.reason == "destination refused: requests are waiting here already"
    report = await fleet.move(at_0[24], 1)
    assert report.ok, report.reason
    await fleet.shown(1, lambda s: [r.request_id for r in s.requests][-2:] == [at_0[24].id, at_1[24].id])
    fleet.abort(*at_0, *at_1)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("mode", list(MigrationMode))
async def test_streams_are_exact_where_memory_runs_out(mode: MigrationMode) -> None:
    """Preemptions at both ends, before, in and after the moves; refused moves are refused for their reason."""
    async with fleet_of(2, engine={"num_blocks": 40, "max_num_seqs": 16}) as small:
        streams = [small.submit(30 + 3 * i, 100, at=i % 2, seed=i) for i in range(10)]

        async def wander(stream: Stream) -> list[str]:
            reasons = []
            await small.at_least(2, stream)
            while not stream.finish:
                if small.cluster.requests.get(stream.id) is not None:
                    reasons.append((await small.move(stream, 1 - stream.where, mode)).reason)
                await asyncio.sleep(0.003)
            return reasons

        reasons = {r for found in await asyncio.gather(*[wander(s) for s in streams]) for r in found}
        assert sum(s.num_preemptions for s in small.snapshots[-4:]) > 0
        assert "" in reasons, "none moved"
        for reason in reasons - {"", "finished", "gone", "preempted"}:
            assert reason.startswith("destination refused: "), reason
        await small.assert_clean()
