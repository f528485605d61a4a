"""The ledger: counts every request that was sent, until it is seen or has ended, and keeps nothing longer."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arriero.core.ledger import Ledger
from arriero.core.types import Dispatchable, InstanceSnapshot, Phase, RequestSnapshot

BLOCK_SIZE = 16

REQUESTS = st.integers(0, 5).map("request-{}".format)
INSTANCES = st.integers(0, 3)
TOKENS = st.integers(0, 100)


def facts(request_id: str = "request-0", num_prompt_tokens: int = 16) -> Dispatchable:
    return Dispatchable(request_id=request_id, num_prompt_tokens=num_prompt_tokens, max_tokens=1)


def showing(instance: int, *request_ids: str) -> InstanceSnapshot:
    shown = tuple(RequestSnapshot(request_id=r, phase=Phase.WAITING) for r in request_ids)
    return InstanceSnapshot.of(
        shown, instance=instance, time_s=0.0, num_blocks=10, num_free_blocks=10, block_size=BLOCK_SIZE, max_num_seqs=1
    )  # fmt: skip


def test_a_request_counts_as_pending_until_a_snapshot_shows_it() -> None:
    ledger = Ledger()
    ledger.sent(facts(num_prompt_tokens=16), 1)
    assert ledger.pending_blocks(1, BLOCK_SIZE) == 2
    ledger.reconcile(showing(1, "someone-else"))
    assert ledger.pending_blocks(1, BLOCK_SIZE) == 2
    ledger.reconcile(showing(2, "request-0"))
    assert ledger.pending_blocks(1, BLOCK_SIZE) == 2, "another instance's snapshot says nothing about this one"
    ledger.reconcile(showing(1, "request-0"))
    assert ledger.pending_blocks(1, BLOCK_SIZE) == 0
    assert ledger.num_outstanding(1) == 1, "seen, but still in the instance's care"


def test_a_request_that_moved_is_pending_at_its_destination_and_nowhere_else() -> None:
    ledger = Ledger()
    ledger.sent(facts(), 1)
    ledger.reconcile(showing(1, "request-0"))
    ledger.moved("request-0", 2)
    assert [ledger.num_outstanding(i) for i in (1, 2)] == [0, 1]
    assert [ledger.pending_blocks(i, BLOCK_SIZE) for i in (1, 2)] == [0, 2]
    assert [ledger.num_pending(i) for i in (1, 2)] == [0, 1]
    assert ledger.instance_of("request-0") == 2
    assert ledger.facts_of("request-0") == facts()
    assert ledger.facts_of("another") is None


def test_a_request_that_is_sent_again_is_only_where_it_was_sent_last() -> None:
    ledger = Ledger()
    ledger.sent(facts(), 1)
    ledger.sent(facts(), 2)
    assert [ledger.num_outstanding(i) for i in (1, 2)] == [0, 1]


def test_the_move_of_a_request_that_has_ended_is_ignored() -> None:
    ledger = Ledger()
    ledger.sent(facts(), 1)
    ledger.ended("request-0")
    ledger.moved("request-0", 2)
    assert not ledger.knows("request-0")
    assert ledger.num_outstanding(2) == 0


def test_a_request_may_end_twice_or_without_having_been_sent() -> None:
    ledger = Ledger()
    ledger.ended("request-0")
    ledger.sent(facts(), 1)
    ledger.ended("request-0")
    ledger.ended("request-0")
    assert not ledger.knows("request-0")


def test_a_lost_instance_takes_its_requests_out_of_the_ledger() -> None:
    ledger = Ledger()
    ledger.sent(facts("request-0"), 1)
    ledger.sent(facts("request-1"), 2)
    ledger.forget(1)
    ledger.forget(1)
    assert [ledger.knows(f"request-{n}") for n in (0, 1)] == [False, True]
    assert [ledger.num_outstanding(i) for i in (1, 2)] == [0, 1]


@given(TOKENS, st.integers(1, 64))
def test_a_prompt_and_its_first_token_are_counted_in_whole_blocks(num_prompt_tokens: int, block_size: int) -> None:
    ledger = Ledger()
    ledger.sent(facts(num_prompt_tokens=num_prompt_tokens), 1)
    assert ledger.pending_blocks(1, block_size) == math.ceil((num_prompt_tokens + 1) / block_size)


class LedgerAgainstModel(RuleBasedStateMachine):
    """Any sequence of events: the ledger says what a plain table of requests says, and holds no more."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.where: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.unseen: set[str] = set()

    @rule(request=REQUESTS, instance=INSTANCES, tokens=TOKENS)
    def sent(self, request: str, instance: int, tokens: int) -> None:
        self.ledger.sent(facts(request, tokens), instance)
        self.where[request], self.tokens[request] = instance, tokens
        self.unseen.add(request)

    @rule(request=REQUESTS, destination=INSTANCES)
    def moved(self, request: str, destination: int) -> None:
        self.ledger.moved(request, destination)
        if request in self.where:
            self.where[request] = destination
            self.unseen.add(request)

    @rule(request=REQUESTS)
    def ended(self, request: str) -> None:
        self.ledger.ended(request)
        self._drop(request)

    @rule(instance=INSTANCES, requests=st.sets(REQUESTS))
    def reconcile(self, instance: int, requests: set[str]) -> None:
        self.ledger.reconcile(showing(instance, *requests))
        self.unseen -= {r for r in requests if self.where.get(r) == instance}

    @rule(instance=INSTANCES)
    def forget(self, instance: int) -> None:
        self.ledger.forget(instance)
        for request in [r for r, i in self.where.items() if i == instance]:
            self._drop(request)

    def _drop(self, request: str) -> None:
        self.where.pop(request, None)
        self.tokens.pop(request, None)
        self.unseen.discard(request)

    @invariant()
    def agrees_with_the_table(self) -> None:
        for number in range(6):
            request = f"request-{number}"
            assert self.ledger.knows(request) == (request in self.where)
        for instance in range(4):
            there = [r for r, i in self.where.items() if i == instance]
            assert self.ledger.num_outstanding(instance) == len(there)
            blocks = [math.ceil((self.tokens[r] + 1) / BLOCK_SIZE) for r in there if r in self.unseen]
            assert self.ledger.pending_blocks(instance, BLOCK_SIZE) == sum(blocks)

    def teardown(self) -> None:
        """Once all requests have ended, no trace of any is left, in public or in private."""
        for request in list(self.where):
            self.ledger.ended(request)
        assert "request-" not in repr(vars(self.ledger))
        for instance in range(4):
            self.ledger.forget(instance)
        assert not any(vars(self.ledger).values())


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
