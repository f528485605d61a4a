"""One llumlet over the fake engine: each operation's answer, asked once, again, late and out of order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_engine import FakeEngine, Spec, Staging

from arriero.core.config import MigrationConfig
from arriero.core.errors import ProtocolError
from arriero.core.llumlet import Llumlet
from arriero.core.messages import (
    Answer,
    Commit,
    Copy,
    Detach,
    Drop,
    Expect,
    Load,
    Locate,
    Message,
    Op,
    Release,
    Reserve,
    Resume,
)
from arriero.core.types import Phase

CONFIG = MigrationConfig(max_incoming=2)
SPEC = Spec("r", tuple(range(10)), 40)
ID = {"migration_id": "m", "request_id": "r"}
OTHER = {"migration_id": "other", "request_id": "r"}

LOCATE, RESERVE = Locate(**ID), Reserve(**ID, num_tokens=16)
COPY = Copy(**ID, first=0, epoch=0)
DETACH = Detach(**ID, first=0, epoch=0)
RELEASE, RESUME, DROP = Release(**ID), Resume(**ID), Drop(**ID)
LOAD = Load(**ID, first=0, end=2, ticket=(9, "m"), known=0, output_token_ids=(1, 2))
COMMIT = Commit(
    **ID, first=2, end=3, ticket=(9, "m"), known=2, output_token_ids=(3,), num_output_tokens=3, num_computed_tokens=12,
    untold=b"by the source",
)  # fmt: skip
REPLAY = Commit(
    **ID, first=0, end=0, ticket=None, known=0, output_token_ids=(1,), num_output_tokens=1, num_computed_tokens=0
)


class Bench:
    """An engine, its llumlet, and somebody who asks."""

    def __init__(self, *, depth: int = 0) -> None:
        self.now = 0.0
        self.staging: Staging = {(9, "m"): [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]}
        self.finished: list[str] = []
        self.engine = FakeEngine(0, self.staging, self._emit, depth=depth)
        self.llumlet = self.engine.llumlet = Llumlet(self.engine, CONFIG)

    def _emit(self, request_id: str, tokens: list[int], finished: bool) -> None:
        self.finished.extend([request_id] * finished)

    def ask(self, message: Message) -> list[Answer]:
        """The answers so far; the list grows when the answer comes later."""
        answers: list[Answer] = []
        self.llumlet.handle(message, answers.append, self.now)
        self.check()
        return answers

    def says(self, message: Message) -> tuple[bool, str]:
        (answer,) = self.ask(message)
        return answer.ok, answer.reason

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.engine.step(self.now)
        self.check()

    def copy_ends(self) -> None:
        self.engine.finish_copy(self.now)
        self.check()

    def park(self, request_id: str = "r") -> None:
        self.engine.park(Spec(request_id, SPEC.prompt, SPEC.num_outputs))
        self.llumlet.parked(request_id, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.step()

    def check(self) -> None:
        self.engine.check_integrity()
        self.llumlet.check_integrity()


@pytest.fixture
def source() -> Bench:
    """An instance that decodes the request: 10 prompt tokens, 4 of the output, 13 computed."""
    bench = Bench()
    bench.engine.add(SPEC)
    bench.step(5)
    return bench


@pytest.fixture
def destination() -> Bench:
    """An instance where the request is parked."""
    bench = Bench()
    bench.park()
    return bench


OK = (True, "")


# ---------------------------------------------------------------------- source


def test_locate_tells_where_the_request_stands(source: Bench) -> None:
    (answer,) = source.ask(LOCATE)
    assert answer == Answer(migration_id="m", op=Op.LOCATE, phase=Phase.RUNNING, num_tokens=14, block_size=4, epoch=0)


def test_locate_refuses_what_cannot_move(source: Bench) -> None:
    assert source.says(Locate(migration_id="m", request_id="nobody")) == (False, "gone")
    source.engine.add(Spec("pooled", (1, 2), 3, unmovable="pooling"))
    assert source.says(Locate(migration_id="m", request_id="pooled")) == (False, "unmovable: pooling")
    source.ask(DETACH)
    assert source.says(Locate(**OTHER)) == (False, "already moving")


def test_copy_exports_full_settled_blocks_and_answers_when_they_are_out(source: Bench) -> None:
    answers = source.ask(COPY)
    assert answers == []
    source.copy_ends()
    (answer,) = answers
    assert (answer.first, answer.end, answer.settled_blocks, answer.num_bytes) == (0, 2, 3, 2)
    assert answer.ticket == (0, "m")


def test_copy_without_a_new_full_block_answers_at_once(source: Bench) -> None:
    (answer,) = source.ask(Copy(**ID, first=3, epoch=0))
    assert (answer.ok, answer.first, answer.end) == (True, 3, 3)


def test_copy_asked_again_while_it_runs_is_one_export(source: Bench) -> None:
    first, second = source.ask(COPY), source.ask(COPY)
    source.copy_ends()
    assert first == second
    assert len(first) == 1
    assert not source.engine.jobs


def test_copy_asked_again_later_gives_the_same_answer_without_an_export(source: Bench) -> None:
    """The destination may be importing from this memory now."""
    answers = source.ask(COPY)
    source.copy_ends()
    source.step(8)
    assert source.ask(COPY) == answers
    assert not source.engine.jobs


def test_copy_out_of_order_is_refused(source: Bench) -> None:
    source.ask(COPY)
    assert source.says(Copy(**ID, first=2, epoch=0)) == (False, "export running")
    source.copy_ends()
    assert source.says(Copy(**ID, first=1, epoch=0)) == (False, "out of order")
    source.ask(Copy(**ID, first=2, epoch=0))
    source.copy_ends()
    assert source.says(COPY) == (False, "out of order")


def test_a_failed_export_may_be_tried_again(source: Bench) -> None:
    source.engine.fail_next.add("export_copy")
    answers = source.ask(COPY)
    source.copy_ends()
    assert [(a.ok, a.reason) for a in answers] == [(False, "export failed: cut")]
    answers = source.ask(COPY)
    source.copy_ends()
    assert answers[0].ok


@pytest.mark.parametrize("message", [COPY, DETACH])
def test_a_preempted_request_is_refused(source: Bench, message: Message) -> None:
    source.engine.preempt("r")
    assert source.says(message) == (False, "preempted")
    source.step(3)
    assert source.engine.running, "it runs again, in other blocks"
    assert source.says(message) == (False, "preempted")


def test_a_waiting_request_has_nothing_to_copy(source: Bench) -> None:
    source.engine.preempt("r")
    assert source.says(Copy(**ID, first=0, epoch=-1)) == (False, "preempted")


@pytest.mark.parametrize("message", [COPY, DETACH])
def test_a_request_that_has_gone_is_refused(source: Bench, message: Message) -> None:
    source.engine.abort("r", 0.0)
    assert source.says(message) == (False, "gone")


def test_an_engine_that_cannot_export_refuses(source: Bench) -> None:
    source.engine.fail_next.add("start_export")
    assert source.says(COPY) == (False, "start_export was made to fail")


def test_detach_hands_over_all_that_the_destination_needs(source: Bench) -> None:
    (answer,) = source.ask(Detach(**ID, first=2, epoch=0))
    assert answer == Answer(
        migration_id="m", op=Op.DETACH, first=2, end=4, ticket=(0, "m"), num_bytes=2, copy_s=0.125,
        num_output_tokens=4, num_computed_tokens=13, sampler_state=b"4", untold=b"told by none",
    )  # fmt: skip


def test_detach_without_blocks_hands_over_tokens_and_sampler_state_only(source: Bench) -> None:
    (answer,) = source.ask(Detach(**ID, first=0, epoch=0, with_blocks=False))
    assert (answer.num_computed_tokens, answer.end, answer.ticket) == (0, 0, None)
    assert (answer.num_output_tokens, answer.sampler_state, answer.untold) == (4, b"4", b"told by none")


def test_detach_asked_again_gives_the_same_answer(source: Bench) -> None:
    assert source.ask(DETACH) == source.ask(DETACH)


def test_detach_waits_until_steps_in_flight_have_settled() -> None:
    bench = Bench(depth=2)
    bench.engine.add(SPEC)
    bench.step(6)
    first, second = bench.ask(DETACH), bench.ask(DETACH)
    bench.step()
    assert first == second == []
    bench.step()
    assert first == second
    assert first[0].num_computed_tokens == 10 + first[0].num_output_tokens - 1


def test_a_request_that_ends_while_it_detaches_is_gone() -> None:
    bench = Bench(depth=1)
    bench.engine.add(Spec("r", SPEC.prompt, 3))
    bench.step(4)
    answers = bench.ask(DETACH)
    bench.step()
    assert bench.finished == ["r"]
    assert [(a.ok, a.reason) for a in answers] == [(False, "gone")]


def test_a_client_abort_settles_a_detach() -> None:
    bench = Bench(depth=1)
    bench.engine.add(SPEC)
    bench.step(4)
    answers = bench.ask(DETACH)
    bench.engine.abort("r", 0.0)
    assert [a.reason for a in answers] == ["gone"]
    assert bench.llumlet.open_migrations() == []


def test_a_client_abort_of_a_detached_request_is_no_obstacle_to_what_closes(source: Bench) -> None:
    source.ask(DETACH)
    source.engine.abort("r", 0.0)
    assert source.says(RESUME) == OK
    assert source.engine.leaks() == []
    assert source.llumlet.is_idle


def test_a_failed_last_export_unfreezes_the_request(source: Bench) -> None:
    source.engine.fail_next.add("export_rest")
    assert source.says(DETACH) == (False, "export failed: export_rest was made to fail")
    assert source.engine.schedules("r")
    assert source.says(DETACH) == (False, "migration ended here")


def test_nothing_is_copied_or_detached_out_of_turn(source: Bench) -> None:
    source.ask(COPY)
    assert source.says(DETACH) == (False, "export running")
    source.copy_ends()
    source.ask(DETACH)
    assert source.says(Copy(**ID, first=2, epoch=0)) == (False, "detached")
    assert source.says(Detach(**OTHER, first=0, epoch=0)) == (False, "already moving")
    source.ask(RESUME)
    assert source.says(COPY) == (False, "migration ended here")


def test_release_frees_and_is_idempotent(source: Bench) -> None:
    source.ask(DETACH)
    assert source.says(RELEASE) == OK
    assert source.says(RELEASE) == OK
    assert source.says(RESUME) == (False, "released before")
    assert source.engine.num_free_blocks == source.engine.num_blocks
    assert source.llumlet.is_idle


def test_resume_unfreezes_and_is_idempotent(source: Bench) -> None:
    source.ask(DETACH)
    assert source.says(RESUME) == OK
    assert source.says(RESUME) == OK
    assert source.says(RELEASE) == (False, "resumed before")
    assert source.engine.schedules("r")


def test_release_frees_only_what_its_own_migration_detached(source: Bench) -> None:
    """Neither a request that runs, nor one that another migration holds."""
    assert source.says(Release(**OTHER)) == OK
    assert source.engine.schedules("r")
    source.ask(DETACH)
    assert source.says(Release(migration_id="third", request_id="r")) == OK
    assert source.ask(DETACH)[0].ok
    assert source.says(RELEASE) == OK


def test_resume_of_another_migration_does_not_unfreeze(source: Bench) -> None:
    source.ask(DETACH)
    assert source.says(Resume(**OTHER)) == OK
    assert not source.engine.schedules("r")


@pytest.mark.parametrize(("closing", "reason"), [(RESUME, "resume came first"), (RELEASE, "release came first")])
def test_who_waits_for_a_copy_or_a_detach_is_answered_when_the_migration_closes(closing: Message, reason: str) -> None:
    bench = Bench(depth=2)
    bench.engine.add(SPEC)
    bench.step(6)
    copying = bench.ask(COPY)
    bench.ask(closing)
    assert [(a.op, a.reason) for a in copying] == [(Op.COPY, reason)]
    bench.copy_ends()
    detaching = bench.ask(Detach(**OTHER, first=0, epoch=0))
    bench.ask(type(closing)(**OTHER))
    assert [(a.op, a.reason) for a in detaching] == [(Op.DETACH, reason)]
    assert bench.staging.keys() == {(9, "m")}


def test_a_copying_migration_that_falls_silent_ends_by_itself(source: Bench) -> None:
    source.ask(COPY)
    source.copy_ends()
    assert (0, "m") in source.staging
    source.wait(CONFIG.lease_s + 1)
    assert (0, "m") not in source.staging
    assert source.says(DETACH) == (False, "migration ended here")


def test_a_detached_request_never_resumes_by_itself(source: Bench) -> None:
    """Only the owner knows whether the destination runs it."""
    source.ask(DETACH)
    source.wait(100 * CONFIG.tombstone_s)
    assert not source.engine.schedules("r")
    assert source.ask(DETACH)[0].ok


# ---------------------------------------------------------------------- destination


def test_reserve_takes_the_parked_request(destination: Bench) -> None:
    assert destination.says(RESERVE) == OK
    assert destination.says(RESERVE) == OK
    assert destination.engine.parked == {}
    assert destination.engine.num_free_blocks == destination.engine.num_blocks - 4
    assert destination.llumlet.num_incoming == 1
    assert destination.llumlet.open_migrations() == ["in m r reserved"]


def test_reserve_without_room_leaves_nothing(destination: Bench) -> None:
    assert destination.says(Reserve(**ID, num_tokens=1000)) == (False, "no free blocks")
    assert destination.engine.leaks() == []
    assert destination.llumlet.is_idle


def test_reserve_of_what_never_arrived_is_refused() -> None:
    assert Bench().says(RESERVE) == (False, "not parked here")


def test_reserve_beyond_max_incoming_is_refused(destination: Bench) -> None:
    for name in ("a", "b", "c"):
        destination.park(name)
        ok, reason = destination.says(Reserve(migration_id=f"m{name}", request_id=name, num_tokens=0))
        assert ok is (name != "c")
    assert reason == "2 migrations are coming in already"
    assert destination.engine.parked.keys() == {"r"}


def test_a_request_comes_in_once_at_a_time(destination: Bench) -> None:
    """The second attempt's parked copy goes when the first reservation has gone, and not with it."""
    destination.ask(RESERVE)
    destination.park()
    assert destination.says(Reserve(**OTHER, num_tokens=4)) == (False, "already coming in")
    assert destination.says(Drop(**OTHER)) == OK
    destination.ask(REPLAY)
    assert destination.engine.schedules("r")
    destination.wait(CONFIG.lease_s + 1)
    assert destination.engine.parked == {}
    assert destination.engine.schedules("r")


def test_load_grows_the_reservation_and_answers_when_the_blocks_are_in(destination: Bench) -> None:
    destination.ask(Reserve(**ID, num_tokens=0))
    first, second = destination.ask(LOAD), destination.ask(LOAD)
    assert first == second == []
    destination.copy_ends()
    assert first == second
    (answer,) = first
    assert (answer.ok, answer.first, answer.end, answer.copy_s) == (True, 0, 2, 0.25)


def test_load_asked_again_later_repeats_its_answer(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.ask(LOAD)
    destination.copy_ends()
    (answer,) = destination.ask(LOAD)
    assert (answer.ok, answer.first, answer.end) == (True, 0, 2)
    destination.ask(COMMIT)
    assert destination.says(LOAD) == OK
    assert destination.engine.requests["r"].outputs == [1, 2, 3], "told once"


def test_tokens_that_were_told_before_count_once(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.ask(LOAD)
    destination.copy_ends()
    destination.ask(Load(**ID, first=2, end=3, ticket=(9, "m"), known=1, output_token_ids=(2, 3)))
    assert destination.engine.reserved["r"].outputs == [1, 2, 3]
    destination.copy_ends()


def test_load_of_what_is_not_next_is_refused(destination: Bench) -> None:
    destination.ask(RESERVE)
    gap = Load(**ID, first=1, end=2, ticket=None, known=0)
    assert destination.says(gap) == (False, "blocks 0..1 were never loaded")
    unheard = Load(**ID, first=0, end=2, ticket=None, known=3)
    assert destination.says(unheard) == (False, "output tokens 0..3 were never told")


def test_load_during_another_import_is_refused(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.ask(LOAD)
    assert destination.says(Load(**ID, first=2, end=3, ticket=None, known=2)) == (False, "an import is running")
    destination.copy_ends()


def test_load_without_room_ends_the_reservation(destination: Bench) -> None:
    destination.ask(RESERVE)
    assert destination.says(Load(**ID, first=0, end=99, ticket=None, known=0)) == (False, "no free blocks")
    assert destination.says(LOAD) == (False, "no free blocks")
    assert destination.engine.leaks() == []


def test_a_failed_import_ends_the_reservation(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.engine.fail_next.add("import_copy")
    answers = destination.ask(LOAD)
    destination.copy_ends()
    assert [a.reason for a in answers] == ["import failed: cut"]
    assert destination.engine.leaks() == []


def test_commit_admits_once(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.ask(LOAD)
    destination.copy_ends()
    assert destination.says(COMMIT) == OK
    assert destination.says(COMMIT) == OK
    assert destination.engine.requests["r"].outputs == [1, 2, 3]
    assert destination.engine.requests["r"].settled == 12
    assert destination.engine.requests["r"].untold == b"by the source"
    assert destination.says(DROP) == (False, "committed before")
    assert destination.says(RESERVE) == OK
    assert destination.llumlet.is_idle


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_output_tokens": 4}, "4 output tokens handed over, 3 told"),
        ({"known": 3}, "output tokens 2..3 were never told"),
        ({"first": 1}, "blocks 2..1 were never loaded"),
        ({"end": 99, "num_computed_tokens": 999}, "no free blocks"),
        ({"ticket": "nonsense"}, "the source's staging memory is gone"),
    ],
)
def test_a_commit_that_does_not_fit_is_refused_for_good(
    destination: Bench, changes: dict[str, object], reason: str
) -> None:
    """The owner resumes the source on this answer: the same COMMIT must never succeed later."""
    destination.ask(RESERVE)
    destination.ask(LOAD)
    destination.copy_ends()
    wrong = Commit(**{**{f: getattr(COMMIT, f) for f in COMMIT.__slots__}, **ID, **changes})  # type: ignore[arg-type]
    assert destination.says(wrong) == (False, reason)
    assert destination.says(COMMIT) == (False, reason)
    assert destination.engine.leaks() == []


def test_a_commit_under_an_import_is_refused_for_good(destination: Bench) -> None:
    destination.ask(RESERVE)
    answers = destination.ask(LOAD)
    assert destination.says(COMMIT) == (False, "an import is running")
    destination.copy_ends()
    assert [a.reason for a in answers] == ["an import is running"]
    assert destination.says(COMMIT) == (False, "an import is running")
    assert destination.engine.leaks() == []


def test_a_commit_without_reservation_is_refused_for_good(destination: Bench) -> None:
    assert destination.says(REPLAY) == (False, "no such reservation")
    assert destination.says(RESERVE) == (False, "no such reservation")
    assert destination.says(REPLAY) == (False, "no such reservation")
    assert destination.engine.leaks() == []


def test_an_engine_that_cannot_admit_ends_the_reservation(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.engine.fail_next.add("admit")
    assert destination.says(REPLAY) == (False, "admit was made to fail")
    assert destination.says(REPLAY) == (False, "admit was made to fail")
    assert destination.engine.leaks() == []


@pytest.mark.parametrize("first", [RESERVE, None])
def test_drop_frees_and_is_final(destination: Bench, first: Message | None) -> None:
    """Also when it overtakes RESERVE's refusal, or comes for a migration never heard of."""
    if first is not None:
        destination.ask(first)
    assert destination.says(DROP) == OK
    assert destination.says(DROP) == OK
    assert destination.says(RESERVE) == (False, "dropped")
    assert destination.says(REPLAY) == (False, "dropped")
    assert destination.says(LOAD) == (False, "dropped")
    assert destination.engine.leaks() == []


def test_drop_under_an_import_frees_when_it_has_ended(destination: Bench) -> None:
    destination.ask(RESERVE)
    loading = destination.ask(LOAD)
    assert destination.says(DROP) == OK
    assert destination.says(DROP) == OK
    assert destination.says(RESERVE) == (False, "dropped")
    assert destination.says(COMMIT) == (False, "dropped")
    assert destination.llumlet.num_incoming == 1
    destination.copy_ends()
    assert [(a.ok, a.reason) for a in loading] == [(False, "dropped")]
    assert destination.engine.leaks() == []


def test_a_late_drop_leaves_the_running_request_alone(destination: Bench) -> None:
    destination.ask(Drop(**OTHER))
    destination.park()
    destination.ask(RESERVE)
    destination.ask(REPLAY)
    assert destination.says(Drop(**OTHER)) == OK
    assert destination.engine.schedules("r")


@pytest.mark.parametrize("ending", [DROP, REPLAY])
def test_an_announced_commit_is_waited_for_until_it_or_drop_comes(destination: Bench, ending: Message) -> None:
    destination.ask(RESERVE)
    assert destination.says(Expect(**ID, due_s=0.01)) == OK
    assert destination.llumlet.door.hold_for(0.009, 0.1) > 0
    destination.ask(ending)
    assert destination.llumlet.door.hold_for(0.009, 0.1) == 0


# ---------------------------------------------------------------------- time


def test_a_silent_reservation_frees_itself_and_refuses_its_commit(destination: Bench) -> None:
    destination.ask(RESERVE)
    destination.wait(CONFIG.lease_s)
    assert destination.llumlet.num_incoming == 1
    destination.wait(1.0)
    assert destination.engine.leaks() == []
    assert destination.says(REPLAY) == (False, "lease expired")


def test_news_renew_the_lease(destination: Bench) -> None:
    for _ in range(4):
        destination.ask(RESERVE)
        destination.wait(0.9 * CONFIG.lease_s)
    destination.ask(LOAD)
    destination.wait(2 * CONFIG.lease_s)
    destination.copy_ends()
    destination.wait(0.9 * CONFIG.lease_s)
    assert destination.says(COMMIT) == OK


def test_a_parked_request_that_nobody_reserves_frees_itself(destination: Bench) -> None:
    assert destination.llumlet.open_migrations() == ["parked r"]
    assert not destination.llumlet.is_idle
    destination.wait(CONFIG.lease_s + 1)
    assert destination.engine.leaks() == []
    assert destination.llumlet.is_idle


def books(llumlet: Llumlet) -> int:
    """Entries in all dicts of both roles."""
    roles = (llumlet._source, llumlet._destination)
    return sum(len(book) for role in roles for book in vars(role).values() if isinstance(book, dict))


def test_ended_migrations_are_forgotten(source: Bench, destination: Bench) -> None:
    source.ask(DETACH)
    source.ask(RELEASE)
    destination.ask(DROP)
    for bench in (source, destination):
        bench.wait(CONFIG.tombstone_s)
        assert books(bench.llumlet) == 1
        bench.wait(1.0)
        assert books(bench.llumlet) == 0


def test_a_commit_is_remembered_for_as_long_as_the_request_is_here(destination: Bench) -> None:
    """Whoever still asks must not hear "no such reservation": the source would resume."""
    destination.ask(RESERVE)
    destination.ask(REPLAY)
    for _ in range(3):
        destination.wait(CONFIG.tombstone_s + 1)
        assert destination.says(REPLAY) == OK
    destination.engine.abort("r", destination.now)
    destination.wait(CONFIG.tombstone_s + 1)
    assert books(destination.llumlet) == 0


def test_a_migration_is_not_forgotten_under_its_export(source: Bench) -> None:
    source.ask(COPY)
    source.ask(RESUME)
    assert source.llumlet.open_migrations() == ["out m r ended"]
    source.wait(CONFIG.tombstone_s + 1)
    source.copy_ends()
    assert (0, "m") not in source.staging
    assert source.llumlet.is_idle


# ---------------------------------------------------------------------- the rest


def test_the_report_of_a_copy_that_nobody_waits_for_is_ignored(source: Bench) -> None:
    source.llumlet.copied("nobody", None, "late", 0.0)
    source.ask(COPY)
    source.copy_ends()
    source.llumlet.copied("m", None, "twice", 0.0)
    source.check()


def test_an_unknown_operation_is_an_error(source: Bench) -> None:
    class Strange(Message):
        pass

    with pytest.raises(ProtocolError, match="Strange is no operation"):
        source.ask(Strange(**ID))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda books: books._source._frozen.update(r="m"),
            "request r is frozen by migration m, which is not detached",
        ),
        (
            lambda books: books._destination._arriving.update(r="m"),
            "request r is reserved by migration m, which has ended",
        ),
    ],
)
def test_contradicting_books_are_noticed(spoil: Callable[[Llumlet], None], message: str) -> None:
    bench = Bench()
    bench.check()
    spoil(bench.llumlet)
    with pytest.raises(ProtocolError, match=message):
        bench.llumlet.check_integrity()
