"""The soak: its requests, what counts as whole, equal and left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from arriero.bench.client import Choice, Reply
from arriero.bench.soak import leaks_in, percent, reason_of, summarise, targets_of
from arriero.bench.soak_requests import KINDS, Case, difference, fault, make_cases

# ---------------------------------------------------------------------- the requests


def test_the_same_seed_makes_the_same_requests() -> None:
    assert make_cases(40, 1) == make_cases(40, 1)
    assert make_cases(40, 1) != make_cases(40, 2)


def test_every_kind_is_there_streamed_and_not() -> None:
    cases = make_cases(10 * len(KINDS), 0)
    assert {(c.kind, c.body["stream"]) for c in cases} == {(kind, stream) for kind in KINDS for stream in (True, False)}


def test_every_request_can_be_repeated_and_counted() -> None:
    for case in make_cases(3 * len(KINDS), 0):
        assert case.body["temperature"] == 0.0 or "seed" in case.body
        assert case.body["return_token_ids"]
        assert 40 <= case.body["max_tokens"] <= 120
        assert ("stream_options" in case.body) == case.body["stream"]
        assert (case.hang_up_after is not None) == (case.kind == "hang_up")


# ---------------------------------------------------------------------- whole


def reply(**fields: Any) -> Reply:
    answer = Reply()
    answer.choices = {0: Choice("abc", [1, 2, 3], [-0.1, -0.2, -0.3], "length")}
    answer.num_tokens = answer.usage_tokens = 3
    answer.is_complete = True
    for name, value in fields.items():
        setattr(answer, name, value)
    return answer


CASE = Case(kind="greedy", path="/v1/completions", body={})


def test_a_whole_answer() -> None:
    assert fault(CASE, reply()) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"error": "status 500"},
        {"is_complete": False},
        {"choices": {}},
        {"choices": {0: Choice("abc", [1, 2, 3], [], None)}},
        {"choices": {0: Choice("abc", [1, 2, 3], [], "abort")}},
        {"usage_tokens": 4},
        {"usage_tokens": None},
    ],
    ids=str,
)
def test_an_answer_that_is_not_whole(fields: dict[str, Any]) -> None:
    assert fault(CASE, reply(**fields)) is not None


def test_all_sequences_must_have_come() -> None:
    case = Case(kind="parallel", path="/v1/completions", body={"n": 2})
    assert fault(case, reply()) == "it ended after 3 tokens in 1 sequences"


# ---------------------------------------------------------------------- equal


def change(**fields: Any) -> Reply:
    choice = Choice("abc", [1, 2, 3], [-0.1, -0.2, -0.3], "length")
    for name, value in fields.items():
        setattr(choice, name, value)
    return reply(choices={0: choice})


def test_equal_answers_and_logprobs_within_tolerance() -> None:
    assert difference(reply(), reply()) is None
    assert difference(change(logprobs=[-0.1, -0.2, -0.30005]), reply()) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change(token_ids=[1, 9, 3]), "1 tokens are equal"),
        (change(token_ids=[1, 2]), "2 came"),
        (change(token_ids=[1, 2, 3, 4]), "4 came"),
        (change(text="abd"), "text"),
        (change(finish_reason="stop"), "finish reason"),
        (change(logprobs=[-0.1, -0.2]), "2 logprobs"),
        (change(logprobs=[-0.1, -0.2, -0.31]), "1 logprobs differ, the first is -0.31 for -0.3"),
        (change(logprobs=[-0.1, -0.2, float("nan")]), "nan for -0.3"),
        (reply(choices={}), "missing"),
    ],
)
def test_a_difference_is_named(changed: Reply, words: str) -> None:
    found = difference(changed, reply())
    assert found is not None
    assert words in found


def test_of_a_stream_that_the_client_left_the_beginning_counts() -> None:
    cut = reply(choices={0: Choice("a", [1], [-0.1], None)})
    assert difference(cut, reply(), is_cut=True) is None
    assert difference(reply(choices={}), reply(), is_cut=True) is None
    assert difference(reply(choices={0: Choice("x", [9], [], None)}), reply(), is_cut=True) is not None
    assert difference(reply(choices={0: Choice("b", [1], [], None)}), reply(), is_cut=True) is not None
    assert difference(cut, reply()) is not None


# ---------------------------------------------------------------------- nothing left


def books(**held: Any) -> dict[str, Any]:
    clean = {"requests": [], "frozen": [], "parked": [], "reserved": [], "open": [], "free_blocks": 10}
    return {"requests": 0, "migrations": [], "instances": {"0": {**clean, "num_blocks": 10, **held}}}


def test_clean_books_have_no_leak() -> None:
    assert leaks_in(books()) == []


@pytest.mark.parametrize(
    ("check", "leak"),
    [
        ({**books(), "requests": 2}, "2 requests"),
        ({**books(), "migrations": ["m r closing"]}, "migration m r closing"),
        (books(requests=["r"]), "instance 0: requests r"),
        (books(frozen=["r"]), "instance 0: frozen r"),
        (books(parked=["r"]), "instance 0: parked r"),
        (books(reserved=["r"]), "instance 0: reserved r"),
        (books(open=["m"]), "instance 0: open m"),
        (books(free_blocks=7), "instance 0: 3 blocks"),
        (books(free_blocks=11), "instance 0: -1 blocks"),
    ],
)
def test_whatever_is_held_is_a_leak(check: dict[str, Any], leak: str) -> None:
    assert leaks_in(check) == [leak]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("destination refused: 3 more KV blocks are needed, 1 are free", "destination refused: N more KV blocks"),
        ("request 'cmpl-soak1x-0-ab12' is not running: it has ended", "request ... is not running: it has ended"),
        ("the source handed over 5 output tokens", "the source handed over N output tokens"),
    ],
)
def test_refusals_are_counted_without_names_and_numbers(text: str, reason: str) -> None:
    assert reason_of(text).startswith(reason)


# ---------------------------------------------------------------------- the verdict


def record(case: int = 0, **fields: Any) -> dict[str, Any]:
    return {"kind": "greedy", "case": case, "is_cut": False, "fault": None, "difference": None, "moves": 5} | fields


def found(*samples: dict[str, Any], moved: int = 100, **fields: Any) -> dict[str, Any]:
    references = [{"case": 0, "fault": None, "disagreement": None}, {"case": 1, "fault": None, "disagreement": "..."}]
    return {"samples": samples, "references": references, "outcomes": {"moved": moved}, "leaks": []} | fields


def verdicts(result: dict[str, Any]) -> list[bool]:
    return [target.met for target in targets_of(summarise(result), result)]


def test_all_is_well() -> None:
    assert verdicts(found(record(), record(is_cut=True))) == [True, True, True, True]


@pytest.mark.parametrize(
    ("result", "place"),
    [
        (lambda: found(record(), record(fault="it ended")), 0),
        (lambda: found(record(), record(difference="token")), 1),
        (lambda: found(record(), record(is_cut=True, difference="token")), 1),
        (lambda: found(record(), leaks=["instance 0: 1 blocks"]), 2),
        (lambda: found(record(), moved=99), 3),
    ],
)
def test_each_failure_misses_its_target(result: Callable[[], dict[str, Any]], place: int) -> None:
    assert verdicts(result()) == [number != place for number in range(4)]


def test_a_request_whose_references_disagree_is_counted_apart() -> None:
    result = found(record(), record(case=1, difference="token"))
    (row,) = summarise(result)
    assert (row["compared"], row["equal"], row["reference_disagrees"], row["moves"]) == (1, 1, 1, 10)
    assert all(verdicts(result))


def test_nothing_compared_proves_nothing() -> None:
    assert verdicts(found(record(case=1)))[1] is False
    assert percent(0, 0) == 0.0
