"""The admin API: what runs where, and moving it. A FastAPI router beside vLLM's own endpoints."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Message, Receive

from arriero.core.config import HttpConfig
from arriero.core.errors import ArrieroError
from arriero.core.types import MigrationMode
from arriero.frontend.cluster import Cluster
from arriero.frontend.openai_errors import answer_to

MAX_ADMIN_BODY_BYTES = HttpConfig().max_admin_body_bytes


class MigrateBody(BaseModel):
    """Body of ``POST /requests/{id}/migrate``."""

    model_config = ConfigDict(extra="forbid")

    to: Annotated[int, Field(ge=0, description="instance id")]
    mode: MigrationMode = MigrationMode.LIVE


class DrainBody(BaseModel):
    """Body of ``POST /instances/{id}/drain``; may be left out."""

    model_config = ConfigDict(extra="forbid")

    force: Annotated[bool, Field(description="also the last instance that takes requests")] = False


class RestartBody(BaseModel):
    """Body of ``POST /restart``; may be left out."""

    model_config = ConfigDict(extra="forbid")

    instances: Annotated[list[int] | None, Field(description="instance ids; null: all, one after the other")] = None
    max_surge: Annotated[
        int | None, Field(ge=0, le=64, description="so many start before others are drained; null: 1 if memory allows")
    ] = None
    flags: Annotated[list[str], Field(description="flags of `vllm serve` that instances get from now on")] = []


def attach_admin(app: FastAPI, cluster: Cluster, api_keys: list[str]) -> None:
    """Add the admin endpoints to ``app``. With API keys they want one, like vLLM's."""
    app.include_router(_router(cluster, api_keys))


def _router(cluster: Cluster, api_keys: list[str]) -> APIRouter:
    router = APIRouter(tags=["arriero"], dependencies=[Depends(authorize(api_keys))], route_class=ErrorRoute)

    @router.get("/instances")
    async def instances() -> list[dict[str, Any]]:
        """Every instance: process, state and load."""
        return cluster.describe_instances()

    @router.get("/requests")
    async def requests() -> list[dict[str, Any]]:
        """Every request that has not ended: where it runs, how far it is, how often it moved."""
        return cluster.describe_requests()

    @router.get("/requests/{request_id:path}/explain")
    async def explain(request_id: str) -> dict[str, Any]:
        """Why a request (each of its sequences) is where it is: dispatches, moves and preemptions with their reasons.

        Also of the last requests that ended. 404 if nothing is known of it.
        """
        return {"requests": cluster.explain(request_id)}

    @router.get("/events")
    async def events(after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """The latest dispatches, migrations and changes of instances."""
        return cluster.events.recent(max(1, min(limit, 1000)), after)

    @router.post("/requests/{request_id:path}/migrate")  # ids come from clients: they may hold slashes
    async def migrate(request_id: str, body: MigrateBody) -> Any:
        """Move a running or waiting request (all its sequences) to another instance.

        200 with a report for each sequence that moved; 409 if it could not move: it runs on where it was.
        """
        reports = await cluster.migrate_all(request_id, body.to, body.mode)
        content = {"ok": all(r.ok for r in reports), "migrations": [r.as_dict() for r in reports]}
        return JSONResponse(content, status_code=200 if content["ok"] else 409)

    @router.post("/instances/{instance}/drain")
    async def drain(instance: int, body: DrainBody | None = None) -> dict[str, Any]:
        """Empty an instance by live migration and end it; the answer comes when it has ended.

        404 if it is unknown; 409 if it does not serve, or is the last one that does (unless forced).
        """
        force = body is not None and body.force
        return (await cluster.drains.start(instance, cause="on demand", force=force)).as_dict()

    @router.post("/restart")
    async def restart(body: RestartBody | None = None) -> Any:
        """Replace instances under load, one after the other; the answer comes when all are replaced.

        200 if they were, 409 if the restart could not begin or had to end: ``reason`` says why.
        """
        wanted = body or RestartBody()
        make_spec = await asyncio.to_thread(cluster.respec, wanted.flags) if wanted.flags else None
        report = await cluster.rollout.run(
            wanted.instances, max_surge=wanted.max_surge, make_spec=make_spec, flags=wanted.flags
        )
        return JSONResponse(report.as_dict(), status_code=200 if report.ok else 409)

    @router.get("/arriero/check")
    async def check() -> dict[str, Any]:
        """Check every book, here and in the instances, and say what is held: for leak hunts."""
        cluster.check_integrity()
        ready = cluster.instances.ready_ids()
        return {
            "requests": len(cluster.requests),
            "migrations": cluster.migrations.open_migrations(),
            "instances": {i: await cluster.links.utility(i, "arriero_check") for i in ready},
        }

    return router


def authorize(api_keys: list[str]) -> Any:
    """A FastAPI dependency: 401 without one of the keys, if there are any. Compares in constant time."""

    def check(request: Request) -> None:
        if not api_keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not any(secrets.compare_digest(token.encode(), k.encode()) for k in api_keys):
            raise HTTPException(401, "this endpoint needs an API key: send 'Authorization: Bearer KEY'")

    return check


def _bounded(receive: Receive) -> Receive:
    """Reads a body of at most ``MAX_ADMIN_BODY_BYTES``; a longer one is refused before it is in memory."""
    read = 0

    async def bounded() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MAX_ADMIN_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_ADMIN_BODY_BYTES} bytes: send less")
        return message

    return bounded


class ErrorRoute(APIRoute):
    """Answers arriero's errors in the shape of OpenAI's (vLLM's handlers would make them a 500)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(Request(request.scope, _bounded(request.receive)))
            except ArrieroError as error:
                return answer_to(error)

        return answer
