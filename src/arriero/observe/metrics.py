"""Prometheus metrics, `arriero_*`, beside vLLM's own `vllm:*` on the same page."""

from __future__ import annotations

import functools

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

_PAUSE_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """What a front end counts. ``registry`` None: a private one (tests, several in a process)."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry if registry is not None else CollectorRegistry()
        self.migrations = Counter(
            "arriero_migrations", "Migrations by outcome", ["outcome", "reason"], registry=registry
        )
        self.replays = Counter("arriero_replays", "Replays from the token log", ["outcome"], registry=registry)
        self.migration_bytes = Counter("arriero_migration_bytes", "KV bytes moved", registry=registry)
        self.migration_pause_seconds = Histogram(
            "arriero_migration_downtime_seconds",
            "Last token from the source to first token from the destination",
            buckets=_PAUSE_BUCKETS,
            registry=registry,
        )
        self.policy_failures = Counter(
            "arriero_policy_failures", "Decisions that a policy failed to make", ["policy"], registry=registry
        )
        self.drain_seconds = Histogram(
            "arriero_drain_seconds",
            "From the order to drain an instance until its process is gone",
            buckets=(0.5, 1, 2, 5, 10, 30, 60, 120, 300),
            registry=registry,
        )
        self.events_left_out = Counter(
            "arriero_events_left_out", "Lines of the event log that its disk did not take in time", registry=registry
        )
        self.ttft_targets = Counter(
            "arriero_ttft_targets", "Requests with a target for the first token", ["outcome"], registry=registry
        )
        self.dispatch_seconds = Histogram(
            "arriero_dispatch_seconds",
            "Time to choose an instance and send the request",
            buckets=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 0.1),
            registry=registry,
        )

    def first_token(self, ttft_s: float, target_s: float | None) -> None:
        """Count a request's first token, if it has a target."""
        if target_s is not None:
            self.ttft_targets.labels("met" if ttft_s <= target_s else "missed").inc()

    def migration_ended(self, ok: bool, reason: str, num_bytes: int, *, replay: bool) -> None:
        """Count one migration or replay. ``reason`` is cut to its kind, so that labels stay few."""
        outcome = "ok" if ok else "aborted"
        if replay:
            self.replays.labels(outcome).inc()
        else:
            self.migrations.labels(outcome, reason.partition(":")[0]).inc()
        self.migration_bytes.inc(num_bytes)


@functools.cache
def default_metrics() -> Metrics:
    """The one set of metrics in the process's default registry, which `/metrics` shows."""
    return Metrics(REGISTRY)
