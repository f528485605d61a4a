"""Scripted worst cases: one disturbance at one exact moment of a migration, and what must come of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cluster_model import Cluster, Stream, phase_of
from fake_engine import Spec, reference

from arriero.core.config import MigrationConfig
from arriero.core.messages import Answer, Commit, Copy, Detach, Drop, Expect, Load, Op, Release
from arriero.core.migration import Migration, State
from arriero.core.migration_commands import Abort, End, Replay, Route, Send, WakeAt
from arriero.core.types import MigrationMode, Phase

LIVE, STOP, RECOMPUTE = MigrationMode.LIVE, MigrationMode.STOP_AND_COPY, MigrationMode.RECOMPUTE
SOURCE, DESTINATION, THIRD = 0, 1, 2
SPEC = Spec("r", tuple(range(1, 20)), 50)
LONG = replace(SPEC, num_outputs=200)

BEFORE_COMMIT = [
    *((LIVE, op) for op in (Op.LOCATE, Op.RESERVE, Op.COPY, Op.LOAD, Op.DETACH)),
    *((STOP, op) for op in (Op.LOCATE, Op.RESERVE, Op.DETACH)),
    *((RECOMPUTE, op) for op in (Op.LOCATE, Op.RESERVE, Op.DETACH)),
]
ALL = [*BEFORE_COMMIT, *((mode, op) for mode in (LIVE, STOP, RECOMPUTE) for op in (Op.COMMIT, Op.RELEASE))]
HEARD = [False, True]  # whether the operation is still on the wire, or its answer is


def start(
    mode: MigrationMode = LIVE,
    *,
    num_instances: int = 2,
    spec: Spec = SPEC,
    num_tokens: int = 5,
    config: MigrationConfig | None = None,
    num_blocks: int | list[int] = 32,
    depth: int = 1,
    stage_blocks: int = 2,
) -> tuple[Cluster, Stream, Migration]:
    """A cluster in which one request has delivered ``num_tokens`` tokens and begins to move."""
    cluster = Cluster(num_instances, config=config, num_blocks=num_blocks, depth=depth, stage_blocks=stage_blocks)
    stream = cluster.submit(spec, SOURCE)
    if num_tokens:
        cluster.run_until(lambda: len(stream.log) >= num_tokens)
    return cluster, stream, cluster.migrate(stream, DESTINATION, mode)


def reach(cluster: Cluster, op: Op, heard: bool) -> None:
    """Run until ``op`` has been sent; if ``heard``, until its answer is on the wire."""
    if heard:
        cluster.run_until_answered(op)
    else:
        cluster.run_until_sent(op)


def sent(cluster: Cluster, op: Op) -> list[int]:
    """The instances that ``op`` was sent to, in order."""
    return [instance for instance, message in cluster.sent if type(message).__name__.lower() == op]


def whole(stream: Stream) -> bool:
    return tuple(stream.log) == reference(stream.spec)


# ---------------------------------------------------------------------- nothing goes wrong


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("mode", [LIVE, STOP, RECOMPUTE])
def test_a_running_request_moves_and_its_stream_stays_whole(mode: MigrationMode, depth: int) -> None:
    """Whatever the mode, and however many steps are in flight."""
    cluster, stream, migration = start(mode, depth=depth)
    cluster.run_until(lambda: stream.ended)
    assert migration.committed
    assert stream.route == DESTINATION
    assert bool(migration.transfer.stages) is (mode is LIVE)
    assert (migration.transfer.num_bytes > 0) is (mode is not RECOMPUTE)
    cluster.quiesce()


def test_a_live_migration_pauses_for_the_tail_only() -> None:
    """Full blocks travel while the request decodes; the pause carries no more than the last ones."""
    cluster, _, migration = start(LIVE)
    commit = cluster.run_until_sent(Op.COMMIT)
    assert isinstance(commit, Commit)
    assert commit.end - commit.first <= 2
    assert sum(stage.num_blocks for stage in migration.transfer.stages) == commit.first >= 5
    assert all(stage.export_s == 0.5 and stage.import_s == 0.25 for stage in migration.transfer.stages)
    assert len(commit.output_token_ids) < commit.num_output_tokens, "LOAD has told the destination most tokens before"
    cluster.quiesce()


def test_the_sampler_state_travels_with_the_request() -> None:
    cluster, _, _ = start(LIVE)
    commit = cluster.run_until_sent(Op.COMMIT)
    assert isinstance(commit, Commit)
    assert commit.sampler_state == str(commit.num_output_tokens).encode()
    cluster.quiesce()


def test_a_request_moves_back_and_forth() -> None:
    """Six moves in a row, each started as soon as the one before has committed (its clean-up still running)."""
    cluster, stream, _ = start(LIVE, spec=LONG, num_blocks=64, stage_blocks=8)
    for _ in range(5):
        cluster.run_until(lambda: stream.ended)
        assert stream.migration is not None
        assert stream.migration.committed
        cluster.migrate(stream, 1 - stream.route)
    cluster.quiesce()
    assert cluster.counts["live committed"] == 6


def test_a_waiting_request_moves_without_a_copy() -> None:
    cluster = Cluster(max_num_seqs=1, num_blocks=32)
    cluster.submit(replace(SPEC, request_id="first"), SOURCE)
    stream = cluster.submit(SPEC, SOURCE)
    cluster.run_until(lambda: phase_of(cluster, SOURCE, "r") is Phase.WAITING)
    migration = cluster.migrate(stream, DESTINATION)
    cluster.quiesce()
    assert migration.committed
    assert not sent(cluster, Op.COPY)
    assert migration.transfer.num_bytes == 0


def test_a_request_moves_in_the_middle_of_its_prefill() -> None:
    """No token yet, some chunks computed: the destination computes the others."""
    cluster = Cluster(num_blocks=32)
    stream = cluster.submit(Spec("r", tuple(range(60)), 3), SOURCE)
    cluster.run_until(lambda: phase_of(cluster, SOURCE, "r") is Phase.RUNNING)
    migration = cluster.migrate(stream, DESTINATION, STOP)
    commit = cluster.run_until_sent(Op.COMMIT)
    assert isinstance(commit, Commit)
    assert 0 < commit.num_computed_tokens < 60
    assert commit.num_output_tokens == 0
    cluster.quiesce()
    assert migration.committed


def test_a_busy_destination_that_holds_its_door_for_a_commit_loses_nothing() -> None:
    """Also when the COMMIT that was announced never comes."""
    cluster, stream, _ = start(LIVE)
    busy = cluster.submit(replace(SPEC, request_id="busy", num_outputs=30), DESTINATION)
    cluster.run_until_sent(Op.EXPECT)
    cluster.deliver((-1, DESTINATION))
    cluster.crash(SOURCE)
    assert cluster.step(DESTINATION), "it waits"
    cluster.quiesce()
    assert whole(busy)
    assert whole(stream)


def test_the_grammar_is_waited_for_before_detach() -> None:
    """RESERVE is asked again until the destination is ready; meanwhile the source decodes."""
    cluster, _, migration = start(LIVE, spec=replace(LONG, grammar_polls=3), num_blocks=64)
    cluster.quiesce()
    assert migration.committed
    assert len(sent(cluster, Op.RESERVE)) == 4


def test_a_grammar_that_is_never_ready_ends_the_migration() -> None:
    config = MigrationConfig(timeout_s=0.1, ready_poll_s=0.01)
    cluster, _, migration = start(LIVE, spec=replace(SPEC, grammar_polls=10**6, num_outputs=60), config=config)
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "timeout")


def test_copying_that_does_not_converge_is_cut_short() -> None:
    """After ``max_stages`` the request detaches, whatever is left."""
    cluster, _, migration = start(LIVE, config=MigrationConfig(max_stages=1))
    cluster.quiesce()
    assert migration.committed
    assert len(migration.transfer.stages) == 1


# ---------------------------------------------------------------------- one disturbance at each moment


@pytest.mark.parametrize("heard", HEARD)
@pytest.mark.parametrize(("mode", "op"), BEFORE_COMMIT)
def test_source_crash_before_commit_is_replayed(mode: MigrationMode, op: Op, heard: bool) -> None:
    cluster, stream, migration = start(mode)
    reach(cluster, op, heard)
    cluster.crash(SOURCE, heard=9 * heard)
    cluster.quiesce()
    assert whole(stream)
    if not heard:
        assert cluster.ends[migration.migration_id] == End(False, "source lost")
        assert cluster.counts["replay committed"] == 1


@pytest.mark.parametrize("heard", HEARD)
@pytest.mark.parametrize("mode", [LIVE, STOP, RECOMPUTE])
def test_source_crash_while_committing_leaves_the_decision_to_the_destination(mode: MigrationMode, heard: bool) -> None:
    """With COMMIT on the wire its staging memory is gone: refused and replayed. Once carried out: committed."""
    cluster, stream, migration = start(mode)
    reach(cluster, Op.COMMIT, heard)
    cluster.crash(SOURCE)
    cluster.quiesce()
    assert whole(stream)
    assert migration.committed is (heard or mode is RECOMPUTE)
    assert cluster.counts["replay committed"] == (not migration.committed)


@pytest.mark.parametrize("heard", HEARD)
@pytest.mark.parametrize(("mode", "op"), ALL)
def test_destination_crash_never_loses_the_request(mode: MigrationMode, op: Op, heard: bool) -> None:
    """Before the answer to COMMIT the source goes on; after it the token log does."""
    cluster, stream, migration = start(mode)
    reach(cluster, op, heard)
    cluster.crash(DESTINATION)
    cluster.quiesce()
    assert whole(stream)
    assert stream.route == SOURCE
    if not migration.committed:
        assert cluster.ends[migration.migration_id] == End(False, "destination lost")
        assert cluster.counts["replay started"] == 0


@pytest.mark.parametrize("first", [SOURCE, DESTINATION])
@pytest.mark.parametrize(("mode", "op"), ALL)
def test_crash_of_both_is_replayed_elsewhere(mode: MigrationMode, op: Op, first: int) -> None:
    cluster, stream, _ = start(mode, num_instances=3)
    cluster.run_until_sent(op)
    cluster.crash(first)
    cluster.deliver((first, -1))
    cluster.crash(1 - first)
    cluster.quiesce()
    assert whole(stream)
    assert stream.route == THIRD


@pytest.mark.parametrize("heard", HEARD)
@pytest.mark.parametrize(("mode", "op"), ALL)
def test_client_abort_leaves_nothing_behind(mode: MigrationMode, op: Op, heard: bool) -> None:
    cluster, stream, migration = start(mode)
    reach(cluster, op, heard)
    cluster.client_gone(stream)
    cluster.quiesce()
    assert len(stream.log) < SPEC.num_outputs, "it was in the middle of its output"
    assert not cluster.counts["ran to its end for nobody"]
    end = cluster.ends[migration.migration_id]
    assert end.reason == ("" if op is Op.RELEASE else "client gone")


@pytest.mark.parametrize(
    ("mode", "op", "heard"),
    [(mode, op, heard) for mode, op in BEFORE_COMMIT for heard in HEARD if not (op is Op.DETACH and heard)],
)
def test_preemption_at_the_source_ends_the_migration(mode: MigrationMode, op: Op, heard: bool) -> None:
    """The blocks that were copied are no longer the request's: the epoch tells."""
    cluster, stream, migration = start(mode)
    reach(cluster, op, heard)
    cluster.engines[SOURCE].preempt("r")
    cluster.quiesce()
    assert whole(stream)
    if op is Op.LOCATE and not heard:
        assert migration.committed, "it was seen as a waiting request"
    else:
        assert cluster.ends[migration.migration_id] == End(False, "preempted")


@pytest.mark.parametrize(("mode", "op"), BEFORE_COMMIT)
def test_a_lost_answer_before_commit_times_out_and_the_source_goes_on(mode: MigrationMode, op: Op) -> None:
    cluster, stream, migration = start(mode)
    cluster.losing = [(SOURCE, op), (DESTINATION, op)]
    cluster.run_until(lambda: cluster.counts["answer lost"])
    cluster.advance(cluster.config.stage_timeout_s)
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, f"{migration_state(op)} timeout")
    assert stream.route == SOURCE


def migration_state(op: Op) -> State:
    """What the owner waits in for the answer to ``op``."""
    return {
        Op.LOCATE: State.LOCATING,
        Op.RESERVE: State.RESERVING,
        Op.COPY: State.COPYING,
        Op.LOAD: State.LOADING,
        Op.DETACH: State.DETACHING,
    }[op]


@pytest.mark.parametrize("op", [Op.COMMIT, Op.RELEASE])
@pytest.mark.parametrize("num_lost", [1, 5])
def test_a_lost_answer_after_detach_is_asked_for_again(op: Op, num_lost: int) -> None:
    cluster, stream, migration = start(LIVE)
    cluster.losing = [(SOURCE, op), (DESTINATION, op)] * num_lost
    cluster.quiesce()
    assert migration.committed
    assert stream.route == DESTINATION
    assert len(sent(cluster, op)) == num_lost + 1


@pytest.mark.parametrize("op", [Op.RESUME, Op.DROP])
def test_lost_answers_to_the_clean_up_are_asked_for_again(op: Op) -> None:
    cluster, stream, _ = start(LIVE, config=MigrationConfig(max_incoming=1), num_blocks=[32, 3])
    cluster.losing = [(SOURCE, op), (DESTINATION, op)]
    cluster.quiesce()
    assert stream.route == SOURCE
    assert len(sent(cluster, op)) == 2


@pytest.mark.parametrize("heard", HEARD)
@pytest.mark.parametrize(("mode", "op"), ALL)
def test_a_repeated_operation_changes_nothing(mode: MigrationMode, op: Op, heard: bool) -> None:
    """At once, or when the first one has been answered."""
    cluster, stream, migration = start(mode)
    reach(cluster, op, heard)
    back = next(b for b in range(9) if type(cluster.sent[-1 - b][1]).__name__.lower() == op)
    cluster.repeat(back)
    cluster.quiesce()
    assert migration.committed
    assert stream.route == DESTINATION


@pytest.mark.parametrize("heard", HEARD)
@pytest.mark.parametrize(("mode", "op"), ALL)
def test_a_long_silence_is_survived(mode: MigrationMode, op: Op, heard: bool) -> None:
    """Everything on the wire is held past every deadline and lease, and only then arrives."""
    cluster, stream, _ = start(mode)
    reach(cluster, op, heard)
    cluster.advance(cluster.config.timeout_s + cluster.config.lease_s)
    for instance in cluster.alive:
        cluster.step(instance)
    cluster.quiesce()
    assert whole(stream)


METHODS = ["reserve", "start_export", "export_copy", "start_import", "import_copy", "grow", "import_rest", "admit"]


@pytest.mark.parametrize("method", [*METHODS, "export_rest"])
def test_a_failing_engine_ends_the_migration_and_the_source_goes_on(method: str) -> None:
    cluster, stream, migration = start(LIVE)
    for engine in cluster.engines.values():
        engine.fail_next.add(method)
    cluster.quiesce()
    assert not migration.committed
    assert stream.route == SOURCE


# ---------------------------------------------------------------------- refusals


def test_a_full_destination_refuses_and_nothing_leaks() -> None:
    cluster, stream, migration = start(LIVE, num_blocks=[32, 3])
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "destination refused: no free blocks")
    assert stream.route == SOURCE


def test_a_destination_that_fills_up_meanwhile_refuses_at_load() -> None:
    cluster, stream, migration = start(LIVE, num_blocks=[32, 12])
    cluster.run_until_sent(Op.COPY)
    cluster.submit(Spec("hog", tuple(range(16)), 4), DESTINATION)
    cluster.quiesce()
    assert cluster.ends[migration.migration_id].reason == "destination refused: no free blocks"
    assert whole(stream)


def test_too_many_incoming_are_refused() -> None:
    config = MigrationConfig(max_incoming=1)
    cluster = Cluster(config=config, num_blocks=48)
    streams = [cluster.submit(replace(SPEC, request_id=f"r{i}"), SOURCE) for i in range(2)]
    cluster.run_until(lambda: all(len(s.log) > 4 for s in streams))
    moves = [cluster.migrate(stream, DESTINATION) for stream in streams]
    cluster.quiesce()
    assert moves[0].committed
    assert cluster.ends["m1"] == End(False, "destination refused: 1 migrations are coming in already")


def test_an_unmovable_request_stays() -> None:
    cluster, _, migration = start(LIVE, spec=replace(SPEC, unmovable="pooling"))
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "unmovable: pooling")


def test_a_request_that_finished_before_locate_is_gone() -> None:
    """Its last token is on the wire: the owner hears of the end first."""
    cluster, stream, migration = start(LIVE, spec=replace(SPEC, num_outputs=6))
    for _ in range(4):
        cluster.step(SOURCE)
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "finished")
    assert whole(stream)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_finishes_in_a_step_in_flight_does_not_detach(depth: int) -> None:
    """Frozen, it is finished by the output that was on its way."""
    cluster, stream, migration = start(STOP, spec=replace(SPEC, num_outputs=9), num_tokens=5, depth=depth)
    cluster.run_until_sent(Op.DETACH)
    while len(cluster.engines[SOURCE].requests["r"].outputs) < 8:
        cluster.step(SOURCE)
    cluster.deliver((-1, SOURCE))
    assert phase_of(cluster, SOURCE, "r") is Phase.FROZEN
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "finished")
    assert whole(stream)


# ---------------------------------------------------------------------- the commit point


def test_a_silent_commit_is_asked_about_and_the_source_never_resumes_on_a_guess() -> None:
    """For as long as it takes; the destination runs meanwhile, and its tokens are the client's."""
    cluster, stream, migration = start(LIVE)
    cluster.losing = [(DESTINATION, Op.COMMIT)] * 200
    cluster.run_until(lambda: cluster.counts["answer lost"] >= 200)
    assert migration.state is State.COMMITTING
    assert phase_of(cluster, SOURCE, "r") is Phase.FROZEN
    cluster.quiesce()
    assert migration.committed
    assert sent(cluster, Op.RESUME) == []
    assert whole(stream)


def test_commit_is_remembered_while_the_request_runs_however_late_it_is_asked_about() -> None:
    """A destination that had forgotten would say no, and the source would run the request a second time."""
    config = MigrationConfig(tombstone_s=1.0)
    cluster, stream, migration = start(LIVE, config=config)
    cluster.losing = [(DESTINATION, Op.COMMIT)]
    cluster.run_until(lambda: cluster.counts["answer lost"])
    cluster.now += 1.5  # and no timer fires, as on a stalled front end
    cluster.step(DESTINATION)
    cluster.step(DESTINATION)
    cluster.advance(config.retry_s)
    cluster.quiesce()
    assert migration.committed
    assert stream.route == DESTINATION


def test_destination_dies_unanswered_and_silent_so_the_source_resumes() -> None:
    cluster, stream, _ = start(LIVE)
    cluster.run_until_answered(Op.COMMIT)
    cluster.crash(DESTINATION)
    cluster.deliver((DESTINATION, -1))
    assert stream.route == SOURCE
    cluster.quiesce()
    assert sent(cluster, Op.RESUME) == [SOURCE]


def test_destination_dies_unanswered_after_it_delivered_so_the_log_is_replayed() -> None:
    """The source is behind what the client has: resuming it would repeat tokens."""
    cluster, stream, migration = start(LIVE)
    cluster.losing = [(DESTINATION, Op.COMMIT)]
    cluster.run_until(lambda: cluster.counts["delivered while committing"])
    cluster.crash(DESTINATION)
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "destination lost")
    assert sent(cluster, Op.RESUME) == []
    assert sent(cluster, Op.RELEASE) == [SOURCE]
    assert whole(stream)


def test_destination_dies_unanswered_after_it_finished_the_request() -> None:
    """The stream is whole: nothing is resumed, nothing replayed."""
    cluster, stream, migration = start(LIVE)
    cluster.losing = [(DESTINATION, Op.COMMIT)]
    cluster.run_until(lambda: stream.finished)
    assert migration.state is State.COMMITTING
    cluster.crash(DESTINATION)
    cluster.quiesce()
    assert cluster.counts["replay wanted"] == 0
    assert sent(cluster, Op.RESUME) == []


def test_client_aborts_then_the_destination_dies_unanswered() -> None:
    """The abort went to the destination; the source must not resume without it."""
    cluster, stream, _ = start(LIVE)
    cluster.run_until_sent(Op.COMMIT)
    cluster.client_gone(stream)
    cluster.crash(DESTINATION)
    cluster.quiesce()
    assert sent(cluster, Op.RESUME) == []
    assert sent(cluster, Op.RELEASE) == [SOURCE]
    assert not cluster.counts["ran to its end for nobody"]


def test_commit_refused_after_the_source_died_is_replayed() -> None:
    cluster, stream, migration = start(LIVE)
    cluster.run_until_sent(Op.COMMIT)
    cluster.crash(SOURCE)
    cluster.deliver((SOURCE, -1))
    assert migration.state is State.COMMITTING, "the destination decides"
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(
        False, "destination refused: the source's staging memory is gone"
    )
    assert whole(stream)


def test_an_expired_reservation_refuses_its_commit_and_the_source_resumes() -> None:
    cluster, stream, migration = start(STOP)
    cluster.run_until_sent(Op.COMMIT)
    cluster.now += cluster.config.lease_s + 1
    cluster.step(DESTINATION)
    cluster.quiesce()
    assert cluster.ends[migration.migration_id] == End(False, "destination refused: lease expired")
    assert stream.route == SOURCE


def test_a_commit_after_drop_is_refused_for_good() -> None:
    """The owner has given the migration up; whatever of it is still on its way comes to nothing."""
    cluster, stream, _ = start(LIVE)
    commit = cluster.run_until_sent(Op.COMMIT)
    wire = cluster.links[-1, DESTINATION]
    wire.clear()  # COMMIT meets a reservation that has been dropped
    wire.append(drop_of(commit))
    wire.extend([commit, commit])
    cluster.deliver((-1, DESTINATION))
    cluster.deliver((-1, DESTINATION))
    assert not cluster.engines[DESTINATION].schedules("r")
    cluster.quiesce()
    assert stream.route == SOURCE


def drop_of(commit: object) -> Drop:
    assert isinstance(commit, Commit)
    return Drop(migration_id=commit.migration_id, request_id=commit.request_id)


def test_a_late_release_does_not_free_a_request_that_has_come_back() -> None:
    """Its answer was lost, so the owner says RELEASE again, when the request is back already."""
    cluster, stream, _ = start(LIVE, spec=LONG, num_blocks=64, stage_blocks=8)
    cluster.losing = [(SOURCE, Op.RELEASE)]
    cluster.run_until(lambda: stream.ended)
    back = cluster.migrate(stream, SOURCE)
    cluster.run_until(lambda: stream.ended)
    assert back.committed
    assert sent(cluster, Op.RELEASE) == [SOURCE, DESTINATION]
    cluster.advance(cluster.config.retry_s)
    assert sent(cluster, Op.RELEASE).count(SOURCE) == 2, "the repeated one is on the wire"
    cluster.deliver((-1, SOURCE))
    assert cluster.engines[SOURCE].schedules("r")
    cluster.quiesce()


def test_even_a_release_older_than_its_tombstone_frees_nothing_else() -> None:
    config = MigrationConfig(tombstone_s=0.01)
    cluster, stream, _ = start(LIVE, config=config, spec=LONG, num_blocks=64, stage_blocks=8)
    cluster.run_until(lambda: stream.ended)
    release = next(m for _, m in cluster.sent if isinstance(m, Release))
    cluster.migrate(stream, SOURCE)
    cluster.run_until(lambda: stream.ended and stream.route == SOURCE)
    cluster.run_until(lambda: not cluster.llumlets[SOURCE]._source._outgoing)
    cluster.links[-1, SOURCE].append(release)
    cluster.deliver((-1, SOURCE))
    assert cluster.engines[SOURCE].schedules("r")
    cluster.quiesce()


# ---------------------------------------------------------------------- copies and their memory


def test_a_lease_that_runs_out_under_an_import_keeps_the_blocks() -> None:
    """The import would write into blocks that belong to somebody else by then."""
    cluster, stream, _ = start(LIVE)
    cluster.run_until_sent(Op.LOAD)
    cluster.deliver((-1, DESTINATION))
    cluster.now += 2 * cluster.config.lease_s
    cluster.step(DESTINATION)
    cluster.submit(Spec("other", tuple(range(20)), 4), DESTINATION)
    cluster.quiesce()
    assert whole(stream)


def test_a_drop_under_an_import_waits_for_it() -> None:
    cluster, stream, migration = start(LIVE)
    cluster.run_until_sent(Op.LOAD)
    cluster.deliver((-1, DESTINATION))
    cluster.client_gone(stream)
    cluster.deliver((-1, DESTINATION))
    held = cluster.engines[DESTINATION].num_free_blocks
    assert held < cluster.engines[DESTINATION].num_blocks
    assert cluster.llumlets[DESTINATION].num_incoming == 1
    again = Load(migration_id="m0", request_id="r", first=0, end=2, ticket=None, known=0)
    answers: list[Answer] = []
    cluster.llumlets[DESTINATION].handle(again, answers.append, cluster.now)
    assert [(a.ok, a.reason) for a in answers] == [(False, "dropped")]
    cluster.quiesce()
    assert migration.is_closed


def test_a_resume_under_an_export_waits_for_it_before_it_frees_the_memory() -> None:
    cluster, stream, _ = start(LIVE)
    cluster.run_until_sent(Op.COPY)
    cluster.deliver((-1, SOURCE))
    assert cluster.engines[SOURCE].jobs
    cluster.crash(DESTINATION)
    cluster.deliver((DESTINATION, -1))
    cluster.deliver((-1, SOURCE))
    assert cluster.llumlets[SOURCE].open_migrations() == ["out m0 r ended"]
    cluster.now += 2 * cluster.config.tombstone_s  # nor is it forgotten before
    cluster.step(SOURCE)
    cluster.quiesce()
    assert whole(stream)


def test_a_repeated_copy_does_not_write_under_the_import() -> None:
    """COPY comes twice; the request has grown in between, so a second export would hold other blocks."""
    cluster, _, migration = start(LIVE, num_blocks=32)
    for engine in cluster.engines.values():
        engine.stage_blocks = 8
    copy = cluster.run_until_sent(Op.COPY)
    cluster.run_until_sent(Op.LOAD)
    for _ in range(12):
        cluster.step(SOURCE)
    cluster.links[-1, SOURCE].append(copy)
    cluster.deliver((-1, SOURCE))
    assert not cluster.engines[SOURCE].jobs
    cluster.quiesce()
    assert migration.committed


def test_a_late_answer_of_an_earlier_stage_is_ignored() -> None:
    cluster, _, migration = start(LIVE)
    cluster.run_until_sent(Op.LOAD)
    stale = Answer(migration_id="m0", op=Op.COPY, first=0, end=2, ticket=(0, "m0"))
    second = cluster.run_until_sent(Op.COPY)
    assert isinstance(second, Copy)
    assert second.first == 2
    assert migration.on_answer(stale, cluster.now) == []
    cluster.run_until_sent(Op.LOAD)
    assert migration.on_answer(Answer(migration_id="m0", op=Op.LOAD, first=0, end=2), cluster.now) == []
    cluster.quiesce()
    assert migration.committed
    assert [stage.num_blocks for stage in migration.transfer.stages][:2] == [2, 2]


# ---------------------------------------------------------------------- the owner alone


def owner(tokens: list[int], **kwargs: object) -> Migration:
    defaults = {"migration_id": "m", "request_id": "r", "source": 0, "destination": 1, "config": MigrationConfig()}
    return Migration(tokens=tokens, **{**defaults, **kwargs})  # type: ignore[arg-type]


def answer(op: Op, **kwargs: object) -> Answer:
    return Answer(migration_id="m", op=op, **kwargs)  # type: ignore[arg-type]


def to_detaching(migration: Migration) -> None:
    migration.start(0.0)
    migration.on_answer(answer(Op.LOCATE, phase=Phase.RUNNING, num_tokens=9, block_size=4, epoch=3), 0.0)
    migration.on_answer(answer(Op.RESERVE), 0.0)


def sends(commands: list[object]) -> list[tuple[int, str]]:
    return [(c.instance, type(c.message).__name__) for c in commands if isinstance(c, Send)]


def test_a_hand_over_that_disagrees_with_the_token_log_is_not_committed() -> None:
    """A token more or less than the client has: committing would repeat or skip one."""
    migration = owner([7, 8, 9], mode=STOP)
    to_detaching(migration)
    commands = migration.on_answer(answer(Op.DETACH, num_output_tokens=2, num_computed_tokens=8, end=2), 1.0)
    assert sends(commands) == [(0, "Resume"), (1, "Drop")]
    end = next(c for c in commands if isinstance(c, End))
    assert end == End(False, "the source handed over 2 output tokens, the client has received 3")


def test_without_a_full_block_the_owner_detaches_at_once() -> None:
    migration = owner([7])
    to_detaching(migration)
    assert migration.state is State.COPYING
    assert sends(migration.on_answer(answer(Op.COPY, first=0, end=0), 1.0)) == [(0, "Detach")]


def aligning(tokens: list[int], **kwargs: object) -> tuple[Migration, list[object]]:
    """An owner that has nothing left to copy, and what it did about it."""
    migration = owner(tokens, commit_due=lambda now: now + 0.5, **kwargs)
    to_detaching(migration)
    return migration, list(migration.on_answer(answer(Op.COPY, first=0, end=0), 1.0))


def test_detach_leaves_when_a_token_comes_with_the_announcement_ahead_of_it() -> None:
    """So it cannot miss the end of the source's step, and EXPECT has that step to arrive."""
    migration, commands = aligning([7])
    assert migration.state is State.ALIGNING
    assert commands == [WakeAt(1.0 + MigrationConfig().align_s)]
    assert migration.on_answer(answer(Op.COPY, first=0, end=0), 1.1) == []
    expect, detach, _ = migration.on_token(1.25)
    assert expect == Send(1, Expect(migration_id="m", request_id="r", due_s=1.75))
    assert sends([detach]) == [(0, "Detach")]
    assert migration.on_token(1.5) == []


def test_detach_leaves_without_a_token_that_does_not_come() -> None:
    migration, _ = aligning([7])
    assert migration.on_time(1.5) == [WakeAt(2.0)]
    assert sends(migration.on_time(2.0)) == [(1, "Expect"), (0, "Detach")]


def test_a_wait_for_a_token_ends_with_the_migrations_time() -> None:
    migration, (wake,) = aligning([7], config=MigrationConfig(timeout_s=1.5))
    assert wake == WakeAt(1.5)
    assert End(False, "timeout") in migration.on_time(1.5)


def test_a_request_without_a_token_detaches_at_once() -> None:
    """It is in its prefill: nobody sees a pause, and the first token may be far."""
    migration, commands = aligning([])
    assert migration.state is State.DETACHING
    assert sends(commands) == [(1, "Expect"), (0, "Detach")]


@pytest.mark.parametrize("disturb", ["client_gone", "finished", "instance_lost"])
def test_a_disturbance_while_waiting_for_a_token_ends_the_migration(disturb: str) -> None:
    migration, _ = aligning([7])
    happened = [SOURCE, 1.2] if disturb == "instance_lost" else [1.2]
    commands = getattr(migration, f"on_{disturb}")(*happened)
    assert (1, "Drop") in sends(commands)
    assert any(isinstance(c, End) and not c.ok for c in commands)
    assert migration.on_token(1.3) == []


def test_the_epoch_of_locate_guards_every_later_stage() -> None:
    migration = owner([7], mode=STOP)
    migration.start(0.0)
    migration.on_answer(answer(Op.LOCATE, phase=Phase.RUNNING, num_tokens=9, block_size=4, epoch=3), 0.0)
    (detach, _) = migration.on_answer(answer(Op.RESERVE), 0.0)
    assert detach == Send(0, Detach(migration_id="m", request_id="r", first=0, epoch=3))


def test_a_commit_names_what_was_handed_over() -> None:
    migration = owner([7, 8, 9], mode=STOP)
    to_detaching(migration)
    commands = migration.on_answer(
        answer(
            Op.DETACH, num_output_tokens=3, num_computed_tokens=8, end=2, ticket="t", sampler_state=b"s", untold=b"u"
        ),
        1.0,
    )
    assert commands[0] == Route(1)
    assert commands[1] == Send(
        1,
        Commit(
            migration_id="m", request_id="r", first=0, end=2, ticket="t", known=0, output_token_ids=(7, 8, 9),
            num_output_tokens=3, num_computed_tokens=8, sampler_state=b"s", untold=b"u",
        ),
    )  # fmt: skip


def test_an_early_timer_is_set_again_and_asks_nothing() -> None:
    """Timers of earlier stages fire too; clocks and event loops round."""
    migration = owner([7, 8, 9], mode=STOP)
    to_detaching(migration)
    migration.on_answer(answer(Op.DETACH, num_output_tokens=3), 5.0)
    assert migration.state is State.COMMITTING
    assert migration.on_time(6.999) == [WakeAt(7.0)]
    assert sends(migration.on_time(7.0)) == [(1, "Commit")]


def test_an_early_timer_does_not_cost_the_next_poll() -> None:
    migration = owner([7])
    migration.start(0.0)
    migration.on_answer(answer(Op.LOCATE, phase=Phase.RUNNING, num_tokens=9, block_size=4), 0.0)
    (wake,) = migration.on_answer(answer(Op.RESERVE, ready=False), 1.0)
    assert isinstance(wake, WakeAt)
    assert migration.on_time(wake.time_s - 1e-9) == [wake]
    assert sends(migration.on_time(wake.time_s)) == [(1, "Reserve")]


def test_a_destination_that_is_not_ready_in_time_is_given_up() -> None:
    migration = owner([7])
    migration.start(0.0)
    migration.on_answer(answer(Op.LOCATE, phase=Phase.RUNNING, num_tokens=9, block_size=4), 0.0)
    commands = migration.on_answer(answer(Op.RESERVE, ready=False), MigrationConfig().timeout_s)
    assert End(False, "timeout") in commands


@pytest.mark.parametrize("asked_s", [6.104, 0.1, 1e9 / 3])
def test_a_deadline_is_due_at_the_very_time_that_was_asked_for(asked_s: float) -> None:
    """``asked + wait - asked`` may be less than ``wait``: a virtual clock would stand still for ever."""
    migration = owner([7])
    migration.start(0.0)
    migration.on_client_gone(asked_s)
    assert sends(migration.on_time(asked_s + MigrationConfig().retry_s)) == [(0, "Resume")]


def test_a_closed_migration_wants_nothing_more() -> None:
    migration = owner([7])
    migration.start(0.0)
    migration.on_instance_lost(0, 1.0)
    assert migration.is_closed
    assert migration.on_time(99.0) == []
    assert migration.on_answer(answer(Op.LOCATE), 99.0) == []
    assert migration.on_finished(99.0) == []
    assert migration.on_instance_lost(1, 99.0) == []
    assert migration.on_client_gone(99.0) == [], "its source is dead: whoever replays it must hear of the abort"


def test_the_loss_of_a_bystander_does_not_matter() -> None:
    migration = owner([7])
    migration.start(0.0)
    assert migration.on_instance_lost(5, 1.0) == []
    assert migration.state is State.LOCATING


def test_an_abort_during_the_clean_up_goes_to_where_the_request_runs() -> None:
    stayed, moved = owner([7]), owner([7, 8, 9], mode=STOP)
    stayed.start(0.0)
    stayed.on_answer(answer(Op.LOCATE, ok=False, reason="already moving"), 1.0)
    assert stayed.on_client_gone(1.0) == [Abort(0)]
    to_detaching(moved)
    moved.on_answer(answer(Op.DETACH, num_output_tokens=3), 1.0)
    moved.on_answer(answer(Op.COMMIT), 1.0)
    assert moved.state is State.CLOSING
    assert moved.on_client_gone(1.0) == [Abort(1)]


def test_a_replay_that_is_refused_is_wanted_again() -> None:
    replay = owner([7, 8], source=None)
    commands = replay.start(0.0)
    assert sends(commands) == [(1, "Reserve")]
    commands = replay.on_answer(answer(Op.RESERVE, ok=False, reason="no seat"), 1.0)
    assert sends(commands) == [(1, "Drop")]
    assert commands[-1] == Replay()
    assert replay.mode is RECOMPUTE


def test_a_replay_continues_from_the_token_log_alone() -> None:
    replay = owner([7, 8], source=None)
    replay.start(0.0)
    commands = replay.on_answer(answer(Op.RESERVE), 1.0)
    assert commands[1] == Send(
        1,
        Commit(
            migration_id="m", request_id="r", first=0, end=0, ticket=None, known=0, output_token_ids=(7, 8),
            num_output_tokens=2, num_computed_tokens=0,
        ),
    )  # fmt: skip
    assert replay.on_answer(answer(Op.COMMIT), 2.0) == [End(True, "")]
    assert replay.is_closed
