"""Why a request is where it is: `GET /requests/{id}/explain`."""

from __future__ import annotations

import math
from typing import Any

from arriero.core.commands import Dispatch
from arriero.core.errors import NotFoundError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import InstanceId, InstanceSnapshot, Phase, RequestId
from arriero.frontend.requests import RequestTable, find_ids
from arriero.observe.histories import Histories, History
from arriero.observe.telling import tell

FIELDS_OF_ALL = ("seq", "time_s", "event", "request", "request_id", "client_id")


def explain(
    name: str, histories: Histories, requests: RequestTable, scheduler: GlobalScheduler
) -> list[dict[str, Any]]:
    """Each sequence of the request called ``name``, live or ended: what happened to it and why, and what it does now.

    Raises NotFoundError if nothing is known of it (any more), ConflictError if ``name`` begins several ids.
    """
    client_ids = histories.client_ids()
    found = sorted(find_ids(name, client_ids), key=lambda request_id: (client_ids[request_id], request_id))
    if not found:
        raise NotFoundError(
            f"nothing is known of request {name!r}: it ended too long ago, or the id is wrong (see GET /requests)"
        )
    return [_explain(histories.get(request_id), requests, scheduler) for request_id in found]


def _explain(history: History, requests: RequestTable, scheduler: GlobalScheduler) -> dict[str, Any]:
    live = requests.get(history.request_id)
    start_s = history.events[0].get("arrival_s", history.events[0]["time_s"])
    steps = [
        {
            "at_s": round(event["time_s"] - start_s, 6),
            "event": event["event"],
            "what": tell(event),
            **{k: v for k, v in event.items() if k not in FIELDS_OF_ALL},
        }
        for event in history.events
    ]
    return {
        "id": history.request_id,
        "client_id": history.client_id,
        "instance": live.route if live is not None else None,
        "now": "ended" if live is None else _now(history.request_id, live.route, scheduler),
        "steps": steps,
        "num_left_out": history.num_left_out,
    }


def _now(request_id: RequestId, instance: InstanceId | None, scheduler: GlobalScheduler) -> str:
    if instance is None:
        return f"waits for an instance, in a line of {scheduler.num_queued}"
    if (ends := scheduler.moving.get(request_id)) is not None:
        return f"runs on instance {ends[0]} and moves to {ends[1]}"
    snapshot = scheduler.snapshot_of(instance)
    seen = None if snapshot is None else next((r for r in snapshot.requests if r.request_id == request_id), None)
    if snapshot is None or seen is None:
        return f"was sent to instance {instance}, which has not shown it yet"
    if seen.phase is Phase.WAITING:
        return (
            f"waits in instance {instance}, {_place(request_id, snapshot)} of {snapshot.num_waiting}: it needs "
            f"{seen.demand_blocks} KV blocks, {snapshot.num_free_blocks} are free"
        )
    what = "prefills" if seen.prefill_tokens else "decodes"
    return f"{what} on instance {instance}, beside {max(0, snapshot.num_running - 1)} others"


def _place(request_id: RequestId, snapshot: InstanceSnapshot) -> int:
    waiting = [r.request_id for r in snapshot.requests if r.phase is Phase.WAITING]
    return waiting.index(request_id) + 1


def alternatives_of(command: Dispatch) -> list[dict[str, Any]]:
    """As fields of an event. JSON has no infinity: before its first snapshot an instance has no freeness."""
    return [
        {"instance": i, "freeness": round(freeness, 3) if math.isfinite(freeness) else None, "num_outstanding": num}
        for i, freeness, num in command.alternatives
    ]
