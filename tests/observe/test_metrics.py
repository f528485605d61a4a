"""Metrics: what a page for Prometheus shows after what has happened."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from arriero.observe.metrics import Metrics, default_metrics


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_migrations_are_counted_by_outcome_and_reason_and_their_bytes_in_sum() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.migration_ended(True, "", 1000, replay=False)
    metrics.migration_ended(True, "", 24, replay=False)
    metrics.migration_ended(False, "timeout", 6, replay=False)
    assert value(registry, "arriero_migrations_total", outcome="ok", reason="") == 2
    assert value(registry, "arriero_migrations_total", outcome="aborted", reason="timeout") == 1
    assert value(registry, "arriero_migration_bytes_total") == 1030


def test_the_details_of_a_reason_do_not_become_labels() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for number in range(5):
        metrics.migration_ended(False, f"destination refused: {number} blocks: none free", 0, replay=False)
    assert value(registry, "arriero_migrations_total", outcome="aborted", reason="destination refused") == 5


def test_replays_are_counted_apart_from_migrations() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.migration_ended(True, "", 0, replay=True)
    metrics.migration_ended(False, "destination lost", 0, replay=True)
    assert value(registry, "arriero_replays_total", outcome="ok") == 1
    assert value(registry, "arriero_replays_total", outcome="aborted") == 1
    assert value(registry, "arriero_migrations_total", outcome="ok", reason="") is None


def test_pauses_are_told_apart_where_they_are_short() -> None:
    """A live migration pauses a stream for 10 to 20 ms: the buckets must show the difference."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for pause_s in (0.009, 0.012, 0.018, 0.025, 45.0):
        metrics.migration_pause_seconds.observe(pause_s)
    name = "arriero_migration_downtime_seconds"
    counts = [value(registry, f"{name}_bucket", le=le) for le in ("0.01", "0.015", "0.02", "0.03", "30.0", "+Inf")]
    assert counts == [1, 2, 3, 4, 4, 5]


def test_dispatch_times_are_told_apart_below_a_millisecond() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for seconds in (15e-6, 150e-6, 0.5):
        metrics.dispatch_seconds.observe(seconds)
    counts = [value(registry, "arriero_dispatch_seconds_bucket", le=le) for le in ("2e-05", "0.0002", "0.1", "+Inf")]
    assert counts == [1, 2, 2, 3]


def test_two_sets_of_metrics_in_one_process_do_not_mix() -> None:
    registries = [CollectorRegistry() for _ in range(2)]
    one, _ = [Metrics(registry) for registry in registries]
    Metrics()
    one.migration_ended(True, "", 7, replay=False)
    assert [value(r, "arriero_migration_bytes_total") for r in registries] == [7, 0]


def test_every_name_on_the_page_is_arriero_s_own() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    page = generate_latest(registry).decode()
    names = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert names
    assert all(name.startswith("arriero_") for name in names)


def test_the_metrics_of_the_process_are_on_the_page_that_vllm_shows_however_often_they_are_asked_for() -> None:
    assert default_metrics() is default_metrics()
    assert value(REGISTRY, "arriero_migration_bytes_total") is not None
