"""Why a request is where it is: its dispatch, its moves, its preemptions and what it does now; also after its end."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.core.errors import ConflictError, NotFoundError
from arriero.sim.wire import SimRequest

from .harness import Fleet, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLEET = {"num_instances": 2, "engine": {"num_blocks": 60, "time_scale": 0.3}}


def only(fleet: Fleet, name: str) -> dict[str, Any]:
    (explained,) = fleet.cluster.explain(name)
    return explained


def steps(explained: dict[str, Any]) -> list[str]:
    return [step["event"] for step in explained["steps"]]


async def test_a_move_on_demand_is_told_from_dispatch_to_end(fleet: Fleet) -> None:
    stream = fleet.submit(40, 200, at=0)
    await fleet.at_least(5, stream)
    await fleet.move(stream, 1)
    await fleet.until(lambda: "resume" in steps(only(fleet, stream.id)))
    assert only(fleet, stream.id)["instance"] == 1
    await fleet.shown(1, lambda s: s.num_running)
    assert "on instance 1" in only(fleet, stream.id)["now"]
    await fleet.ended(stream)
    explained = only(fleet, stream.id)
    assert steps(explained) == ["dispatch", "first_token", "migration", "resume", "finish"]
    assert (explained["now"], explained["instance"]) == ("ended", None)
    dispatch, _, move, resume, finish = explained["steps"]
    assert [a["instance"] for a in dispatch["alternatives"]] == [0, 1]
    assert dispatch["what"].startswith("goes to instance 0 (")
    assert "not to 1 (freeness " in dispatch["what"]
    assert move["what"].startswith("moved from instance 0 to 1, live (on demand): ")
    assert resume["what"].startswith("goes on at instance 1: its stream was silent for ")
    assert finish["what"] == "ended (length) with 200 tokens"
    times = [step["at_s"] for step in explained["steps"]]
    assert times == sorted(times)


async def test_who_waits_and_who_is_preempted_is_told(fleet: Fleet) -> None:
    """Memory for sixty blocks of eight tokens, and three requests that grow to more."""
    streams = [fleet.submit(120, 60, at=0, seed=i) for i in range(3)]
    await fleet.at_least(1, *streams)
    late = fleet.submit(400, 5, at=0)
    await fleet.shown(0, lambda s: s.num_waiting)
    assert only(fleet, late.id)["now"].startswith("waits in instance 0, ")
    await fleet.until(lambda: any("preempt" in steps(only(fleet, s.id)) for s in streams))
    await fleet.ended(*streams, late)


async def test_a_crash_is_told(fleet: Fleet) -> None:
    stream = fleet.submit(40, 150, at=0)
    await fleet.at_least(5, stream)
    fleet.kill(0)
    await fleet.dead(0)
    fleet.expect_deaths()
    await fleet.ended(stream)
    explained = only(fleet, stream.id)
    assert steps(explained)[:3] == ["dispatch", "first_token", "dispatch"]
    assert any(s["what"].startswith("moved to instance 1, from its tokens (") for s in explained["steps"])


async def test_a_request_is_found_by_the_names_that_its_client_may_use(fleet: Fleet) -> None:
    for number in (0, 1):
        request = SimRequest(f"inner-{number}", prompt(20), 5)
        request.external_req_id = f"{number}_cmpl-7e2f-0"
        fleet.submit_request(request)
    await fleet.ended()
    for name in ("cmpl-7e2f", "cmpl-7e2f-0", "cmpl-7e", "cmpl-7e…"):
        assert [e["id"] for e in fleet.cluster.explain(name)] == ["inner-0", "inner-1"]
    assert only(fleet, "inner-1")["client_id"] == "1_cmpl-7e2f-0"
    with pytest.raises(NotFoundError, match="nothing is known of request 'cmpl-8'"):
        fleet.cluster.explain("cmpl-8")
    fleet.submit_request(SimRequest("cmpl-70-0", prompt(20), 5))
    with pytest.raises(ConflictError, match="requests begin with 'cmpl-7'"):
        fleet.cluster.explain("cmpl-7")
