"""What people and programs see of a cluster: `GET /instances`, `GET /requests`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import InstanceId, Phase, RequestId
from arriero.frontend.instances import Instance
from arriero.frontend.migrations import MigrationReport, MigrationRunner
from arriero.frontend.requests import LiveRequest

LOAD_FIELDS = (
    "running",
    "waiting",
    "blocks_used",
    "blocks_total",
    "block_size",
    "preemptions",
    "incoming",
    "freeness",
)


def describe_instances(instances: Iterable[Instance], scheduler: GlobalScheduler) -> list[dict[str, Any]]:
    """One entry for each instance, the dead included."""
    return [
        {
            "id": i.instance_id,
            "pid": i.pid,
            "host": i.host,
            "state": i.state.value,
            "stage": i.stage,
            "place": i.place,
            "replaces": i.replaces,
            "replaced_by": i.replaced_by,
            **_load(i.instance_id, scheduler),
        }
        for i in instances
    ]


def _load(instance: InstanceId, scheduler: GlobalScheduler) -> dict[str, Any]:
    snapshot = scheduler.snapshot_of(instance)
    if snapshot is None:
        return dict.fromkeys(LOAD_FIELDS)
    return {
        "running": snapshot.num_running,
        "waiting": snapshot.num_waiting,
        "blocks_used": snapshot.num_blocks - snapshot.num_free_blocks,
        "blocks_total": snapshot.num_blocks,
        "block_size": snapshot.block_size,
        "preemptions": snapshot.num_preemptions,
        "incoming": sum(r.phase is Phase.INCOMING for r in snapshot.requests),
        "freeness": _finite(scheduler.freeness(instance)),
    }


def describe_requests(
    requests: Iterable[LiveRequest],
    instances: Iterable[Instance],
    scheduler: GlobalScheduler,
    migrations: MigrationRunner,
    now: float,
) -> list[dict[str, Any]]:
    """One entry for each request that has not ended."""
    phases = {
        (r.request_id, i.instance_id): r.phase
        for i in instances
        if (snapshot := scheduler.snapshot_of(i.instance_id)) is not None
        for r in snapshot.requests
    }
    return [
        {
            "id": r.request_id,
            "client_id": r.external_id,
            "instance": r.route,
            "state": "moving" if migrations.is_moving(r.request_id) else _phase(phases, r),
            "prompt_tokens": r.facts.num_prompt_tokens,
            "output_tokens": len(r.tokens),
            "priority": r.facts.priority,
            "moves": r.num_moves,
            "paused_ms": round(1e3 * r.paused_s, 3),
            "age_s": round(now - r.arrived_s, 3),
            "unmovable": r.facts.unmovable,
        }
        for r in requests
    ]


def event_of(report: MigrationReport) -> dict[str, Any]:
    """A migration's report as the fields of an event."""
    fields = report.as_dict()
    fields["num_stages"] = len(fields.pop("stages"))
    return {k: v for k, v in fields.items() if k != "pause_s"}


def _finite(freeness: float) -> float | None:
    """JSON has no infinity: a draining instance has no freeness."""
    return round(freeness, 3) if math.isfinite(freeness) else None


def _phase(phases: dict[tuple[RequestId, InstanceId], Phase], request: LiveRequest) -> str:
    if request.route is None:
        return "queued"
    phase = phases.get((request.request_id, request.route))
    return phase.value if phase is not None else ("running" if request.tokens else "waiting")
