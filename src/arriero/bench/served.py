"""What a served cluster adds to its engines' own steps, measured at a client: the front end in the loop.

Front end, client and engines share the cores of a small machine. Every token costs the front end and the client some
time, and while they have a core, no engine has it. Seen from an engine, its steps grow by a constant and by a share for
each sequence, since other instances are loaded alike: ``host_ms + d_served * B``. Each token of a prompt takes longer
while other engines compute, which share caches and memory. What a request costs the front end before its first step
(HTTP, tokenising, dispatch) is ``request_ms``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from arriero.bench.client import COMPLETIONS, Call, Client
from arriero.bench.replay import Prompts, completion
from arriero.core.errors import ArrieroError
from arriero.sim.fit import StepPoint
from arriero.sim.network import NetworkConfig
from arriero.sim.step_time import StepTimeModel

DECODES = ((1, 128), (4, 128), (4, 512), (8, 256), (12, 160))  #: (sequences, context) of each instance
DECODE_TOKENS = 40
PREFILLS = (32, 256, 900)
REPEATS = 4
MOVES = 6
MOVED_CONTEXT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One calibration of a running server."""

    decodes: Sequence[StepPoint]  #: one for each instance and load
    prefills: Sequence[StepPoint]  #: times to the first token, each instance having one request

    def slowness(self, model: StepTimeModel) -> float:
        """The times over those of ``model``, as a median over the points: 1 if it tells them."""
        points = [*self.decodes, *self.prefills]
        return median(p.ms / model.step_ms(p.prefills, p.num_decodes, p.context_tokens) for p in points)

    def drift(self, other: Served, model: StepTimeModel) -> float:
        """By which share two calibrations differ. Their points may: a policy need not split a load alike twice."""
        return abs(other.slowness(model) / self.slowness(model) - 1)


async def measure(client: Client, model: str, prompts: Prompts, num_engines: int) -> Served:
    """Load all instances alike, then send each one prompt at a time. Raises ArrieroError if an answer ends early."""
    decodes = [
        point
        for num_seqs, context in DECODES
        for point in await _decode(client, model, prompts, num_engines, num_seqs, context)
    ]
    prefills = []
    for length in PREFILLS:
        replies = [
            reply
            for _ in range(REPEATS)
            for reply in await asyncio.gather(
                *(client.send(COMPLETIONS, completion(model, prompts.text(length), 1)) for _ in range(num_engines))
            )
        ]
        prefills.append(StepPoint(((length, 0),), 0, 0, 1e3 * median(reply.ttft_s for reply in replies)))
    return Served(decodes=decodes, prefills=prefills)


async def _decode(
    client: Client, model: str, prompts: Prompts, num_engines: int, num_seqs: int, context: int
) -> list[StepPoint]:
    count = num_engines * num_seqs
    bodies = [completion(model, prompts.text(context), 4 * DECODE_TOKENS + 8 * count) for _ in range(count)]
    calls = [client.start(COMPLETIONS, body) for body in bodies]
    try:
        for call in calls:
            await _wait(call, 2)
        begun = {call: call.reply.num_tokens for call in calls}
        for call in calls:
            await _wait(call, begun[call] + DECODE_TOKENS)
        rows = await client.get("/requests")
    finally:
        await asyncio.gather(*(call.cancel() for call in calls))
    by_instance: dict[int, list[tuple[float, float]]] = {}
    for call in calls:
        window = call.reply.chunks[begun[call] - 1 : begun[call] + DECODE_TOKENS]
        itl_ms = 1e3 * (window[-1].time_s - window[0].time_s) / sum(chunk.num_tokens for chunk in window[1:])
        by_instance.setdefault(_row(rows, call)["instance"], []).append((itl_ms, context + begun[call]))
    return [
        StepPoint(
            (),
            len(found),
            int(sum(tokens + DECODE_TOKENS / 2 for _, tokens in found)),
            sum(itl_ms for itl_ms, _ in found) / len(found),
        )
        for _, found in sorted(by_instance.items())
    ]


def _row(rows: Sequence[dict[str, Any]], call: Call) -> dict[str, Any]:
    """The request as the admin API shows it, whose id goes on behind the client's."""
    row = next((row for row in rows if row["client_id"].startswith(call.reply.request_id)), None)
    if row is None:
        raise ArrieroError(f"{call.reply.request_id} ended before the others had begun: do all fit into the KV memory?")
    return row


async def _wait(call: Call, num_tokens: int) -> None:
    if not await call.wait_for_tokens(num_tokens):
        raise ArrieroError(f"an answer ended after {call.reply.num_tokens} tokens: {call.reply.error}")


async def copy_costs(client: Client, model: str, prompts: Prompts) -> NetworkConfig:
    """What a move's copies cost, from moving one request to and fro: bytes over the time that stages took."""
    call = client.start(COMPLETIONS, completion(model, prompts.text(MOVED_CONTEXT), 20 * MOVES + 200))
    stages: list[dict[str, Any]] = []
    try:
        for _ in range(MOVES):
            await _wait(call, call.reply.num_tokens + 10)
            row = _row(await client.get("/requests"), call)
            _, answer = await client.migrate(call.reply.request_id, 1 - row["instance"])
            stages += [s for m in answer.get("migrations", ()) if m["ok"] for s in m["stages"]]
    finally:
        await call.cancel()
    large = [s for s in stages if s["num_bytes"] > 1 << 20]
    if not large:
        raise ArrieroError("no move copied a mebibyte: nothing tells what copies cost")
    return replace(
        NetworkConfig(),
        staging_bytes_per_s=median(s["num_bytes"] / s["export_s"] for s in large),
        bytes_per_s=median(s["num_bytes"] / s["import_s"] for s in large),
    )


def in_service(model: StepTimeModel, served: Sequence[Served]) -> tuple[StepTimeModel, float]:
    """``model`` as ``served`` shows it, and ``request_ms``; all that is added is 0 or more.

    From the prefills, what each of their tokens takes longer beside busy neighbours and what a request costs before its
    first step; then from the decodes ``host_ms`` and the share of each sequence.
    """
    prefills = [point for one in served for point in one.prefills]
    token_ms, request_ms = _beyond(model, prefills, [sum(n for n, _ in p.prefills) for p in prefills])
    slowed = replace(model, b=model.b + token_ms)
    decodes = [point for one in served for point in one.decodes]
    each_ms, host_ms = _beyond(slowed, decodes, [p.num_decodes for p in decodes])
    # A request's time to its first token holds the step's own share of the front end, too.
    return replace(slowed, host_ms=slowed.host_ms + host_ms, d=slowed.d + each_ms), max(0.0, request_ms - host_ms)


def _beyond(model: StepTimeModel, points: Sequence[StepPoint], amounts: Sequence[int]) -> tuple[float, float]:
    """Milliseconds for each of ``amounts``, and of each point, that explain best what it takes beyond ``model``."""
    from scipy.optimize import nnls

    beyond = [p.ms - model.step_ms(p.prefills, p.num_decodes, p.context_tokens) for p in points]
    rows = [[amount / p.ms, 1.0 / p.ms] for p, amount in zip(points, amounts, strict=True)]
    (each, constant), _ = nnls(rows, [b / p.ms for b, p in zip(beyond, points, strict=True)])
    return float(each), float(constant)
