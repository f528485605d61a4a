"""What only arriero can tell of a run of the race: its moves, and the preemptions that a move could have avoided.

A preemption *could have been avoided by a move* if, in the last look before it, another instance had room for the
smallest request that ran beside the victim.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import httpx

from arriero.bench.client import Client

WATCH_S = 0.25


class Watch:
    """Looks at the instances and requests of arriero while it runs."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.looks: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            instances = await self._client.get("/instances")
            requests = await self._client.get("/requests")
            self.looks.append({"time_s": perf_counter(), "instances": instances, "requests": requests})
            await asyncio.sleep(WATCH_S)


def seen_inside(looks: Sequence[dict[str, Any]], started_s: float, url: str) -> dict[str, Any]:
    """What only arriero can tell: moves, and which preemptions another instance had room to avoid."""
    events = httpx.get(url + "/events", params={"limit": 1000}, timeout=30.0).json()
    moves = [e for e in events if e["event"] == "migration" and e["time_s"] >= started_s]
    return {
        "num_moves": sum(bool(m["ok"]) for m in moves),
        "moves": moves,
        "preemptions": [{**p, "time_s": p["time_s"] - started_s} for p in preemptions(looks)],
        "looks": [
            {"time_s": round(look["time_s"] - started_s, 3), "instances": [_brief(i) for i in look["instances"]]}
            for look in looks
        ],
    }


def _brief(instance: dict[str, Any]) -> dict[str, Any]:
    return {k: instance[k] for k in ("id", "running", "waiting", "blocks_used", "preemptions")}


def preemptions(looks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each rise of an instance's count of preemptions, and whether a move could have avoided it."""
    found = []
    for before, after in itertools.pairwise(looks):
        old = {i["id"]: i for i in before["instances"]}
        for instance in after["instances"]:
            rise = instance["preemptions"] - old.get(instance["id"], instance)["preemptions"]
            if rise > 0:
                found.append(
                    {
                        "time_s": before["time_s"],
                        "instance": instance["id"],
                        "count": rise,
                        "avoidable": _had_room(before, instance["id"]),
                    }
                )
    return found


def _had_room(look: dict[str, Any], instance: int) -> bool:
    sizes = [
        -(-(r["prompt_tokens"] + r["output_tokens"] + 1) // i["block_size"])
        for r in look["requests"]
        for i in look["instances"]
        if r["instance"] == i["id"] == instance and r["output_tokens"]
    ]
    free = [i["blocks_total"] - i["blocks_used"] for i in look["instances"] if i["id"] != instance]
    return bool(sizes) and max(free, default=0) > min(sizes)
