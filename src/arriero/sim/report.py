"""What a simulation comes to, in the figures of Llumnix (OSDI'24), section 6."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from arriero.sim.records import Record
from arriero.sim.simulator import SimulationResult

LATENCIES = ("ttft_s", "tpot_s", "e2e_s")
"""Prefill latency (arrival to first token), decode latency (the rest, a token after the first), request latency."""


def latencies(record: Record) -> dict[str, float]:
    """The latencies of a finished request, in seconds; ``tpot_s`` only with two tokens or more."""
    arrival_s = record.arrival.arrival_s
    found = {"ttft_s": record.first_token_s - arrival_s, "e2e_s": record.finish_s - arrival_s}
    if record.num_output > 1:
        found["tpot_s"] = (record.finish_s - record.first_token_s) / (record.num_output - 1)
    return found


def summarize(result: SimulationResult) -> dict[str, Any]:
    """Plain values for JSON, by priority as well if there are several.

    ``preemption_loss_s`` and ``paused_s`` are means over all finished requests; ``fragmentation`` and ``memory`` are
    shares of the cluster's KV memory, means over the samples (None without any). ``ttft_targets_met`` is the share of
    the requests with a target for the first token that got it in time; None without any. ``downtime_s`` is from DETACH
    until COMMIT was acknowledged, over the migrations that carried KV blocks.
    """
    finished = [r for r in result.records if not r.rejected]
    priorities = sorted({r.arrival.priority for r in finished})
    summary: dict[str, Any] = {
        "num_requests": len(result.records),
        "num_rejected": len(result.records) - len(finished),
        "num_instances": result.config.num_instances,
        "duration_s": result.end_s,
        "instance_hours": result.instance_s / 3600,
        "tokens_per_s": sum(r.num_output for r in finished) / result.end_s if result.end_s else 0.0,
        "num_steps": result.num_steps,
        "num_lost_instances": result.num_lost_instances,
        "num_replays": sum(r.num_replays for r in result.records),
        "prefix_hit": result.prefix_hit,
        "ttft_targets_met": _targets_met(finished),
        **_of_requests(finished),
        **_of_moves(result),
        **_of_samples(result),
    }
    if len(priorities) > 1:
        summary["by_priority"] = {
            str(p): _of_requests([r for r in finished if r.arrival.priority == p]) for p in priorities
        }
    return summary


def _of_requests(records: list[Record]) -> dict[str, Any]:
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for record in records:
        for name, value in latencies(record).items():
            values[name].append(value)
    return {
        **{name: _spread(found) for name, found in values.items()},
        "num_preemptions": sum(r.num_preemptions for r in records),
        "preemption_loss_s": _mean(r.preemption_loss_s for r in records),
        "paused_s": _mean(r.paused_s for r in records),
    }


def _targets_met(records: list[Record]) -> float | None:
    met = [
        record.first_token_s - record.arrival.arrival_s <= target_s
        for record in records
        if (target_s := record.arrival.ttft_target_s) is not None
    ]
    return sum(met) / len(met) if met else None


def _of_moves(result: SimulationResult) -> dict[str, Any]:
    moves = [m for m in result.moves if m.source is not None]  # without replays
    done = [m for m in moves if m.ok]
    downtimes = [m.detach_to_commit_s for m in done if m.num_bytes and m.detach_to_commit_s is not None]
    return {
        "num_migrations": len(done),
        "num_migrations_given_up": len(moves) - len(done),
        "migrated_bytes": sum(m.num_bytes for m in result.moves),
        "downtime_s": _spread(downtimes),
    }


def _of_samples(result: SimulationResult) -> dict[str, Any]:
    if not result.samples:
        return {"fragmentation": None, "memory": None}
    num_blocks = result.config.engine.num_blocks
    return {
        "fragmentation": _mean(s.fragmented / (num_blocks * max(1, len(s.used))) for s in result.samples),
        "memory": _mean(sum(s.used) / (num_blocks * max(1, len(s.used))) for s in result.samples),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else 0.0


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p99": float(p99)}
