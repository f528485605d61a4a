"""The table of live requests: by id, by instance, and by the name that the client knows."""

from __future__ import annotations

import pytest

from arriero.core.errors import ConflictError, NotFoundError, ProtocolError
from arriero.core.types import Dispatchable
from arriero.frontend.requests import LiveRequest, RequestTable


def live(request_id: str, external_id: str | None = None, route: int = 0) -> LiveRequest:
    facts = Dispatchable(request_id=request_id, num_prompt_tokens=1, max_tokens=1)
    return LiveRequest(facts, object(), route, external_id or request_id, 0.0)


def table(*requests: LiveRequest) -> RequestTable:
    made = RequestTable()
    for request in requests:
        made.add(request)
    return made


def test_a_request_is_in_care_from_add_to_pop() -> None:
    request = live("a")
    requests = table(request)
    assert requests.get("a") is request
    assert list(requests) == [request]
    assert len(requests) == 1
    assert requests.pop("a") is request
    assert requests.get("a") is None
    assert requests.pop("a") is None
    assert len(requests) == 0


def test_an_id_that_is_live_cannot_be_added_again() -> None:
    request = live("a")
    requests = table(request)
    with pytest.raises(ProtocolError, match="request a is live already"):
        requests.add(live("a"))
    assert requests.get("a") is request


def test_requests_may_end_while_one_walks_over_them() -> None:
    requests = table(live("a"), live("b"))
    for request in requests:
        requests.pop(request.request_id)
    assert len(requests) == 0


def test_a_route_says_whose_tokens_count_and_follows_a_move() -> None:
    moving = live("a", route=0)
    requests = table(moving, live("b", route=1))
    moving.route = 1
    assert requests.routed_to(0) == []
    assert [r.request_id for r in requests.routed_to(1)] == ["a", "b"]


def test_every_request_has_a_token_log_of_its_own() -> None:
    one, other = live("a"), live("b")
    one.tokens.append(7)
    assert other.tokens == []


@pytest.mark.parametrize("name", ["internal-1", "cmpl-7", "cmpl-7-0"])
def test_a_request_is_found_by_the_internal_id_and_by_what_the_client_knows(name: str) -> None:
    requests = table(live("internal-1", "cmpl-7-0"), live("internal-2", "cmpl-77-0"))
    assert [r.request_id for r in requests.find(name)] == ["internal-1"]


def test_all_sequences_and_prompts_of_a_client_s_request_are_found_by_its_name() -> None:
    """With n = 2 and two prompts; others with similar names are not."""
    mine = [f"{sequence}_cmpl-7-{prompt}" for prompt in (0, 1) for sequence in (0, 1)]
    others = ["0_cmpl-70-0", "cmpl-7-x", "x_cmpl-7", "chat_cmpl-7-0"]
    requests = table(*[live(f"internal-{name}", name) for name in mine + others])
    assert [r.external_id for r in requests.find("cmpl-7")] == mine


@pytest.mark.parametrize("name", ["cmpl-7ab", "cmpl-7a…", "cmpl-7"])
def test_the_beginning_of_an_id_is_enough_for_all_sequences_of_one_request(name: str) -> None:
    requests = table(live("i1", "0_cmpl-7abc-0"), live("i2", "1_cmpl-7abc-0"), live("i3", "cmpl-8abc-0"))
    assert [r.request_id for r in requests.find(name)] == ["i1", "i2"]


def test_a_beginning_that_several_requests_share_is_refused() -> None:
    requests = table(live("i1", "cmpl-7abc-0"), live("i2", "cmpl-7abd-0"))
    with pytest.raises(ConflictError, match="2 requests begin with 'cmpl-7ab': give more of the id"):
        requests.find("cmpl-7ab")


def test_the_internal_id_wins_over_a_client_s_name() -> None:
    requests = table(live("a", "b"), live("b", "c"))
    assert [r.request_id for r in requests.find("b")] == ["b"]


def test_a_name_is_no_pattern() -> None:
    requests = table(live("internal", "cmpl-7"))
    for name in (".*", "cmpl-.", "", "cmpl-7|x", "("):
        with pytest.raises(NotFoundError):
            requests.find(name)


def test_an_unknown_name_is_said_with_what_to_do() -> None:
    with pytest.raises(NotFoundError, match=r"'cmpl-8' is not running: .* GET /requests"):
        table(live("internal", "cmpl-7")).find("cmpl-8")
