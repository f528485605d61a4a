"""Admission: a bounded number of requests wait; the next one is refused at once and told when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.core.admission import Admission, Occupancy, Overload, num_queued
from arriero.core.commands import Dispatch, Reject, RejectKind
from arriero.core.config import AdmissionConfig, SchedulerConfig
from arriero.core.errors import OverloadedError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceSnapshot, Phase, RequestSnapshot

counts = st.integers(0, 50)
instances = st.lists(
    st.builds(Occupancy, num_running=counts, num_waiting=counts, num_pending=counts, max_num_seqs=counts), max_size=5
)


def busy(num_waiting: int, num_pending: int = 0) -> Occupancy:
    return Occupancy(num_running=8, num_waiting=num_waiting, num_pending=num_pending, max_num_seqs=8)


def idle(num_pending: int = 0) -> Occupancy:
    return Occupancy(num_running=0, num_waiting=0, num_pending=num_pending, max_num_seqs=8)


def ask(admission: Admission, *occupancies: Occupancy, num_unplaced: int = 0) -> Overload | None:
    """The refusal, if there is one."""
    num_live = num_unplaced + sum(i.num_running + i.num_waiting + i.num_pending for i in occupancies)
    return admission.refuse(occupancies, num_ready=len(occupancies), num_live=num_live, num_unplaced=num_unplaced)


# ---------------------------------------------------------------------- who waits


def test_a_request_that_finds_a_place_in_a_batch_does_not_wait() -> None:
    assert num_queued([idle(num_pending=8)]) == 0
    assert num_queued([idle(num_pending=9)]) == 1
    assert num_queued([busy(num_waiting=3, num_pending=2)]) == 5


@given(instances)
def test_those_that_wait_are_some_of_those_that_are_not_running(occupancies: list[Occupancy]) -> None:
    waiting, pending = (sum(getattr(i, f"num_{w}") for i in occupancies) for w in ("waiting", "pending"))
    assert waiting <= num_queued(occupancies) <= waiting + pending


@given(instances)
def test_the_shortcut_for_few_live_requests_changes_no_decision(occupancies: list[Occupancy]) -> None:
    admission = Admission(AdmissionConfig(max_queued_requests=20))
    refused = ask(admission, *occupancies) is not None
    assert refused is (num_queued(occupancies) >= 20 * max(1, len(occupancies)))


# ---------------------------------------------------------------------- the bound


def test_the_bound_counts_for_every_instance_together() -> None:
    """Rebalancing evens queues out; a client need not know which instance its request would have met."""
    admission = Admission(AdmissionConfig(max_queued_requests=2))
    assert ask(admission, busy(3), busy(0)) is None
    assert ask(admission, busy(4), busy(0)) is not None
    assert ask(admission, busy(2), busy(2), busy(0)) is None


def test_requests_that_no_instance_has_been_given_wait_too() -> None:
    admission = Admission(AdmissionConfig(max_queued_requests=2))
    assert ask(admission, busy(1), num_unplaced=0) is None
    assert ask(admission, busy(1), num_unplaced=1) is not None


def test_without_any_instance_as_many_may_wait_as_for_one() -> None:
    """Until there is one: a server whose instances all died does not collect requests without end."""
    admission = Admission(AdmissionConfig(max_queued_requests=2))
    assert ask(admission, num_unplaced=1) is None
    assert ask(admission, num_unplaced=2) is not None


def test_a_refusal_says_how_many_wait_and_which_flag_raises_the_bound() -> None:
    error = ask(Admission(AdmissionConfig(max_queued_requests=2)), busy(2), busy(3))
    assert error is not None
    assert "5 requests wait already, 4 may" in error.reason
    assert "--max-queued-requests" in error.reason


# ---------------------------------------------------------------------- when to come back


def test_nobody_is_told_to_come_back_at_once_or_never() -> None:
    config = AdmissionConfig(max_queued_requests=2, min_retry_after_s=2.0, max_retry_after_s=30.0)
    admission = Admission(config)
    error = ask(admission, busy(2))
    assert error is not None
    assert error.retry_after_s == 2.0
    for now in (0.0, 1e6, 2e6, 3e6, 1e9):
        admission.ended(now)
    error = ask(admission, busy(10_000))
    assert error is not None
    assert error.retry_after_s == 30.0


def test_the_faster_requests_end_the_sooner_a_client_may_come_back() -> None:
    told = []
    for between_s in (0.01, 0.1, 0.5):
        admission = Admission(AdmissionConfig(max_queued_requests=100, max_retry_after_s=1000.0))
        for number in range(100):
            admission.ended(number * between_s)
        error = ask(admission, busy(120))
        assert error is not None
        told.append(error.retry_after_s)
    assert told == [1.0, pytest.approx(3.1), pytest.approx(15.5)]  # 21 ends and a tenth of 100, or the minimum


# ---------------------------------------------------------------------- in the scheduler


def request(request_id: str, *, is_replay: bool = False) -> Dispatchable:
    return Dispatchable(request_id=request_id, num_prompt_tokens=15, max_tokens=10, is_replay=is_replay)


def reports(instance: int, num_running: int, num_waiting: int) -> InstanceSnapshot:
    phases = [Phase.RUNNING] * num_running + [Phase.WAITING] * num_waiting
    requests = [RequestSnapshot(request_id=f"{instance}-{n}", phase=p) for n, p in enumerate(phases)]
    return InstanceSnapshot.of(
        requests, instance=instance, time_s=0.0, num_blocks=100, num_free_blocks=50, block_size=16, max_num_seqs=2
    )


@pytest.fixture
def scheduler() -> GlobalScheduler:
    """Two instances with two places each, where two may wait; instance 1 has not reported yet."""
    made = GlobalScheduler(SchedulerConfig(admission=AdmissionConfig(max_queued_requests=2)))
    for instance in (0, 1):
        made.instance_joined(instance, 0.0)
    made.snapshot(reports(0, 0, 0), 0.0)
    return made


def test_a_burst_is_taken_up_to_the_places_and_the_bound(scheduler: GlobalScheduler) -> None:
    scheduler.snapshot(reports(1, 0, 0), 0.0)
    burst = [scheduler.arrived(request(f"r{n}"), 0.0) for n in range(10)]
    taken = [isinstance(c, Dispatch) for (c,) in burst]
    assert taken == [True] * 8 + [False] * 2
    (refused,) = burst[-1]
    assert isinstance(refused, Reject)
    assert (refused.kind, refused.retry_after_s) == (RejectKind.OVERLOADED, 1.0)
    scheduler.ended("r0", 1.0)
    scheduler.ended("r1", 2.0)
    (after,) = scheduler.arrived(request("late"), 2.0)
    assert isinstance(after, Dispatch)


def test_a_replay_is_never_refused(scheduler: GlobalScheduler) -> None:
    """Its client was promised an answer."""
    scheduler.snapshot(reports(1, 0, 0), 0.0)
    for n in range(8):
        scheduler.arrived(request(f"r{n}"), 0.0)
    (refused,) = scheduler.arrived(request("new"), 0.0)
    (replayed,) = scheduler.arrived(request("replay", is_replay=True), 0.0)
    assert isinstance(refused, Reject)
    assert isinstance(replayed, Dispatch)


def test_an_instance_that_has_not_reported_yet_has_room() -> None:
    made = GlobalScheduler(SchedulerConfig(admission=AdmissionConfig(max_queued_requests=2)))
    made.instance_joined(0, 0.0)
    assert all(isinstance(made.arrived(request(f"r{n}"), 0.0)[0], Dispatch) for n in range(20))


def test_the_error_that_a_client_gets_says_when_to_try_again() -> None:
    error = OverloadedError("too many", 7.5)
    assert (error.status, error.retry_after_s, str(error)) == (429, 7.5, "too many")


def test_without_a_bound_everything_is_taken() -> None:
    """The simulator's papers know no refusals."""
    made = GlobalScheduler(SchedulerConfig())
    made.instance_joined(0, 0.0)
    made.snapshot(reports(0, 2, 0), 0.0)
    assert all(isinstance(made.arrived(request(f"r{n}"), 0.0)[0], Dispatch) for n in range(2000))
