"""The admin API over HTTP: who may call it, what it answers, and that every error looks the same."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from arriero.core.errors import (
    ArrieroError,
    ConfigError,
    ConflictError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
    UnmovableError,
)
from arriero.core.types import InstanceId, MigrationMode
from arriero.frontend.admin import attach_admin
from arriero.frontend.cluster import Cluster
from arriero.frontend.drains import DrainReport
from arriero.frontend.migrations import MigrationReport
from arriero.frontend.rolling import RolloutReport
from arriero.observe.events import EventLog

INSTANCES = [{"id": 0, "state": "ready", "running": 2, "freeness": 1.5}]
REQUESTS = [{"id": "r", "instance": 0, "unmovable": None}]


def report(request_id: str = "r", *, ok: bool = True, reason: str = "") -> MigrationReport:
    return MigrationReport(
        migration_id="m",
        request_id=request_id,
        source=0,
        destination=1,
        mode=MigrationMode.LIVE,
        cause="on demand",
        ok=ok,
        reason=reason,
    )


@dataclass
class StubCluster:
    """Answers what the test has put there; raises ``error`` if there is one."""

    error: ArrieroError | None = None
    reports: list[MigrationReport] = field(default_factory=lambda: [report()])
    instance_rows: list[dict[str, Any]] = field(default_factory=lambda: INSTANCES)
    asked: list[tuple[str, InstanceId, MigrationMode]] = field(default_factory=list)
    events: EventLog = field(default_factory=lambda: EventLog(lambda: 1.0))
    requests: list[str] = field(default_factory=lambda: ["r"])
    migrations: Any = field(default_factory=lambda: SimpleNamespace(open_migrations=lambda: ["m r copying"]))
    instances: Any = field(default_factory=lambda: SimpleNamespace(ready_ids=lambda: [0, 2]))

    restarted: list[tuple[Any, ...]] = field(default_factory=list)
    drained: list[tuple[InstanceId, bool]] = field(default_factory=list)

    @property
    def drains(self) -> Any:
        async def start(instance: InstanceId, *, cause: str, force: bool) -> DrainReport:
            self.drained.append((instance, force))
            if self.error is not None:
                raise self.error
            return DrainReport(instance=instance, cause=cause, num_requests=3, ok=True)

        return SimpleNamespace(start=start)

    @property
    def rollout(self) -> Any:
        async def run(ids: Any, *, max_surge: Any, make_spec: Any, flags: Any) -> RolloutReport:
            self.restarted.append((ids, max_surge, make_spec, flags))
            if self.error is not None:
                raise self.error
            return RolloutReport(max_surge=1, ok=self.reports[0].ok, reason=self.reports[0].reason)

        return SimpleNamespace(run=run)

    def respec(self, flags: list[str]) -> str:
        if "--bad" in flags:
            raise ConfigError("--bad: no such flag")
        return f"with {' '.join(flags)}"

    @property
    def links(self) -> Any:
        async def utility(instance: InstanceId, method: str) -> Any:
            return {"instance": instance, "method": method}

        return SimpleNamespace(utility=utility)

    def describe_instances(self) -> list[dict[str, Any]]:
        return self.instance_rows

    def describe_requests(self) -> list[dict[str, Any]]:
        return REQUESTS

    def check_integrity(self) -> None:
        if self.error is not None:
            raise self.error

    async def migrate_all(self, name: str, destination: InstanceId, mode: MigrationMode) -> list[MigrationReport]:
        self.asked.append((name, destination, mode))
        if self.error is not None:
            raise self.error
        return self.reports


Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def serving(
    cluster: StubCluster | None = None,
    *,
    keys: tuple[str, ...] = (),
    prepare: Callable[[FastAPI], None] = lambda app: None,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that has the admin endpoints."""
    app = FastAPI()
    prepare(app)
    attach_admin(app, cast(Cluster, cluster or StubCluster()), list(keys))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://arriero", headers=headers) as client:
        yield client


# ---------------------------------------------------------------------- who may call

ENDPOINTS = [
    ("GET", "/instances"),
    ("GET", "/requests"),
    ("GET", "/events"),
    ("GET", "/arriero/check"),
    ("POST", "/requests/r/migrate"),
]


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_without_keys_everybody_may_call(method: str, path: str) -> None:
    async with serving() as client:
        response = await client.request(method, path, json={"to": 1} if method == "POST" else None)
    assert response.status_code == 200


@pytest.mark.parametrize("key", ["first", "second"])
@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_each_of_several_keys_opens_every_endpoint(method: str, path: str, key: str) -> None:
    async with serving(keys=("first", "second"), headers={"Authorization": f"Bearer {key}"}) as client:
        response = await client.request(method, path, json={"to": 1} if method == "POST" else None)
    assert response.status_code == 200


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
async def test_the_scheme_may_be_written_in_any_case(scheme: str) -> None:
    async with serving(keys=("key",), headers={"Authorization": f"{scheme} key"}) as client:
        assert (await client.get("/instances")).status_code == 200


WRONG_HEADERS = {
    "none": {},
    "empty": {"Authorization": ""},
    "no scheme": {"Authorization": "first"},
    "another scheme": {"Authorization": "Basic first"},
    "no key": {"Authorization": "Bearer "},
    "an unknown key": {"Authorization": "Bearer third"},
    "the start of a key": {"Authorization": "Bearer firs"},
    "more than a key": {"Authorization": "Bearer first second"},
    "two spaces": {"Authorization": "Bearer  first"},
    "not ASCII": {"Authorization": b"Bearer \xff"},
}


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_without_a_key_every_endpoint_refuses_in_the_same_words_whatever_was_wrong(
    method: str, path: str
) -> None:
    """And does nothing: not even the body is looked at."""
    cluster = StubCluster()
    answers = set()
    async with serving(cluster, keys=("first", "second")) as client:
        for wrong in WRONG_HEADERS.values():
            body = {"to": "nonsense"} if method == "POST" else None
            response = await client.request(method, path, headers=wrong, json=body)
            answers.add((response.status_code, response.text))
    ((status, text),) = answers
    assert status == 401
    assert "Authorization: Bearer KEY" in text
    assert "first" not in text
    assert cluster.asked == []


# ---------------------------------------------------------------------- what is there


async def test_instances_and_requests_are_listed_as_the_cluster_describes_them() -> None:
    async with serving() as client:
        assert (await client.get("/instances")).json() == INSTANCES
        assert (await client.get("/requests")).json() == REQUESTS


async def test_a_draining_instance_whose_freeness_is_minus_infinity_can_be_shown() -> None:
    """JSON has no infinity."""
    cluster = StubCluster(instance_rows=[{"id": 0, "freeness": -math.inf}])
    async with serving(cluster) as client:
        response = await client.get("/instances")
    assert (response.status_code, response.json()) == (200, [{"id": 0, "freeness": None}])


async def test_events_are_cut_from_the_front_and_by_number() -> None:
    cluster = StubCluster()
    for number in range(5):
        cluster.events.emit("dispatch", instance=number)
    async with serving(cluster) as client:

        async def seen(query: str) -> list[int]:
            return [e["seq"] for e in (await client.get(f"/events{query}")).json()]

        assert await seen("") == [1, 2, 3, 4, 5]
        assert await seen("?after=3") == [4, 5]
        assert await seen("?limit=2") == [4, 5]
        assert await seen("?after=5") == []
        assert await seen("?limit=0") == await seen("?limit=-7") == [5], "at least one"
        assert await seen("?limit=1000000") == [1, 2, 3, 4, 5]


async def test_the_check_reports_what_is_held_here_and_in_every_ready_instance() -> None:
    async with serving() as client:
        body = (await client.get("/arriero/check")).json()
    assert body["requests"] == 1
    assert body["migrations"] == ["m r copying"]
    assert body["instances"] == {str(i): {"instance": i, "method": "arriero_check"} for i in (0, 2)}


async def test_a_broken_book_is_an_error_of_the_server() -> None:
    async with serving(StubCluster(error=ProtocolError("request r is nowhere"))) as client:
        response = await client.get("/arriero/check")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "request r is nowhere"


# ---------------------------------------------------------------------- moving


async def test_a_move_that_worked_is_reported_sequence_by_sequence() -> None:
    cluster = StubCluster(reports=[report("0_r"), report("1_r")])
    async with serving(cluster) as client:
        response = await client.post("/requests/r/migrate", json={"to": 1})
    assert response.status_code == 200
    body = response.json()
    assert body["ok"] is True
    assert [m["request_id"] for m in body["migrations"]] == ["0_r", "1_r"]
    assert body["migrations"][0]["mode"] == "live"
    assert cluster.asked == [("r", 1, MigrationMode.LIVE)]


@pytest.mark.parametrize("mode", MigrationMode)
async def test_the_mode_may_be_chosen(mode: MigrationMode) -> None:
    cluster = StubCluster()
    async with serving(cluster) as client:
        await client.post("/requests/r/migrate", json={"to": 1, "mode": mode.value})
    assert cluster.asked == [("r", 1, mode)]


async def test_a_move_that_was_given_up_is_a_conflict_with_its_report() -> None:
    cluster = StubCluster(reports=[report("0_r"), report("1_r", ok=False, reason="destination refused: full")])
    async with serving(cluster) as client:
        response = await client.post("/requests/r/migrate", json={"to": 1})
    assert response.status_code == 409
    body = response.json()
    assert body["ok"] is False
    assert [(m["ok"], m["reason"]) for m in body["migrations"]] == [(True, ""), (False, "destination refused: full")]


@pytest.mark.parametrize("name", ["cmpl-7", "a/b", "a b", "ä", "a%2Fb", "a?b#c", "x/migrate"])
async def test_any_id_that_a_client_may_have_chosen_can_be_named_in_the_path(name: str) -> None:
    """It comes from the X-Request-Id header, so it may hold anything."""
    cluster = StubCluster()
    async with serving(cluster) as client:
        path = "/requests/" + "".join(f"%{byte:02X}" for byte in name.encode()) + "/migrate"
        response = await client.post(path, json={"to": 1})
    assert response.status_code == 200
    assert cluster.asked == [(name, 1, MigrationMode.LIVE)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFoundError("no such request"), 404),
        (ConflictError("moving already"), 409),
        (UnmovableError("pooling"), 409),
        (UnavailableError("nobody is ready"), 503),
        (ProtocolError("a bug"), 500),
    ],
)
async def test_an_error_has_its_status_and_the_shape_of_openai_s(error: ArrieroError, status: int) -> None:
    async with serving(StubCluster(error=error)) as client:
        response = await client.post("/requests/r/migrate", json={"to": 1})
    assert response.status_code == status
    assert response.json() == {
        "error": {"message": str(error), "type": type(error).__name__, "param": None, "code": status}
    }


BAD_BODIES = {
    "no body": None,
    "no destination": {},
    "a negative destination": {"to": -1},
    "a destination that is no number": {"to": "here"},
    "an unknown mode": {"to": 1, "mode": "teleport"},
    "an unknown field": {"to": 1, "force": True},
    "a list": [1],
}


@pytest.mark.parametrize("case", BAD_BODIES)
async def test_a_body_that_makes_no_sense_is_refused_and_nothing_moves(case: str) -> None:
    cluster = StubCluster()
    async with serving(cluster) as client:
        response = await client.post("/requests/r/migrate", json=BAD_BODIES[case])
    assert response.status_code == 422
    assert cluster.asked == []


async def test_a_query_that_makes_no_sense_is_refused() -> None:
    async with serving() as client:
        assert (await client.get("/events?after=yesterday")).status_code == 422


# ---------------------------------------------------------------------- as part of vLLM's app


async def test_behind_vllm_s_own_handlers_every_error_has_the_same_shape() -> None:
    """vLLM turns validation errors into 400, and would turn errors that it does not know into 500."""
    register = pytest.importorskip("vllm.entrypoints.serve.exception_handling.register")
    cases = [
        (401, {"keys": ("key",)}, {"to": 1}),
        (400, {}, {"to": 1, "force": True}),
        (404, {"cluster": StubCluster(error=NotFoundError("no such request"))}, {"to": 1}),
        (409, {"cluster": StubCluster(error=UnmovableError("pooling"))}, {"to": 1}),
    ]

    def prepare(app: FastAPI) -> None:
        app.state.args = SimpleNamespace(log_error_stack=False)
        register.init_exception_handler(app)

    for status, options, body in cases:
        async with serving(**options, prepare=prepare) as client:  # type: ignore[arg-type]
            response = await client.post("/requests/r/migrate", json=body)
        assert response.status_code == status
        assert response.json().keys() == {"error"}
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == status


# ---------------------------------------------------------------------- draining and restarting


async def test_a_drain_answers_with_its_report_and_is_forced_only_if_asked() -> None:
    cluster = StubCluster()
    async with serving(cluster) as client:
        answer = await client.post("/instances/3/drain")
        assert (answer.status_code, answer.json()["num_requests"], answer.json()["cause"]) == (200, 3, "on demand")
        await client.post("/instances/3/drain", json={"force": True})
    assert cluster.drained == [(3, False), (3, True)]


async def test_a_restart_passes_on_what_was_asked_and_new_flags_make_new_specifications() -> None:
    cluster = StubCluster()
    async with serving(cluster) as client:
        assert (await client.post("/restart")).json()["ok"]
        body = {"instances": [1, 2], "max_surge": 2, "flags": ["--max-num-seqs", "8"]}
        assert (await client.post("/restart", json=body)).status_code == 200
    assert cluster.restarted == [
        (None, None, None, []),
        ([1, 2], 2, "with --max-num-seqs 8", ["--max-num-seqs", "8"]),
    ]


async def test_a_restart_that_had_to_end_is_a_conflict_with_its_report() -> None:
    async with serving(StubCluster(reports=[report(ok=False, reason="instance 3 ended")])) as client:
        answer = await client.post("/restart")
    assert (answer.status_code, answer.json()["reason"]) == (409, "instance 3 ended")


async def test_flags_that_cannot_be_used_are_refused_before_anything_is_touched() -> None:
    cluster = StubCluster()
    async with serving(cluster) as client:
        answer = await client.post("/restart", json={"flags": ["--bad"]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "--bad: no such flag")
    assert cluster.restarted == []


@pytest.mark.parametrize("path", ["/instances/3/drain", "/restart"])
async def test_what_cannot_be_drained_or_restarted_is_said_in_openais_shape(path: str) -> None:
    async with serving(StubCluster(error=ConflictError("instance 3 is the last one"))) as client:
        answer = await client.post(path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "instance 3 is the last one")
