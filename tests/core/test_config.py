"""Configuration: checked once, at construction, with the value and what it must be in the message."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from arriero.core.config import (
    AdmissionConfig,
    CopyConfig,
    EventLogConfig,
    HistoryConfig,
    HttpConfig,
    LoadConfig,
    MigrationConfig,
    QueueingConfig,
    RebalancingConfig,
    ScalingConfig,
    SchedulerConfig,
)
from arriero.core.errors import ConfigError

CONFIGS: tuple[type[Any], ...] = (
    MigrationConfig,
    CopyConfig,
    RebalancingConfig,
    SchedulerConfig,
    LoadConfig,
    AdmissionConfig,
    HttpConfig,
    QueueingConfig,
    ScalingConfig,
    EventLogConfig,
    HistoryConfig,
)

WRONG: list[tuple[type[Any], str, Any]] = [
    (MigrationConfig, "stop_blocks", -1),
    (MigrationConfig, "max_stages", 0),
    (MigrationConfig, "reserve_ahead_blocks", -1),
    (MigrationConfig, "max_incoming", 0),
    (MigrationConfig, "align_s", -0.1),
    (MigrationConfig, "hold_share", -0.1),
    (MigrationConfig, "hold_share", 1.1),
    (MigrationConfig, "stage_timeout_s", 0.0),
    (MigrationConfig, "timeout_s", -1.0),
    (MigrationConfig, "retry_s", 0.0),
    (MigrationConfig, "ready_poll_s", 0.0),
    (MigrationConfig, "lease_s", math.nan),
    (MigrationConfig, "lease_s", 20.0),
    (MigrationConfig, "tombstone_s", 0.0),
    (CopyConfig, "stage_bytes", 0),
    (CopyConfig, "slice_bytes", 0),
    (CopyConfig, "copy_share", 0.0),
    (CopyConfig, "copy_share", 1.01),
    (CopyConfig, "copy_share", math.nan),
    (AdmissionConfig, "max_queued_requests", 0),
    (AdmissionConfig, "min_retry_after_s", 0.0),
    (AdmissionConfig, "max_retry_after_s", 0.5),
    (HttpConfig, "client_timeout_s", 0.0),
    (HttpConfig, "max_admin_body_bytes", 0),
    (HttpConfig, "max_resume_s", 0.0),
    (HttpConfig, "stream_journal_bytes", 0),
    (HttpConfig, "journal_bytes", 1000),
    (RebalancingConfig, "interval_s", 0.0),
    (RebalancingConfig, "low_freeness", 4.5),
    (RebalancingConfig, "low_freeness", math.nan),
    (RebalancingConfig, "high_freeness", math.nan),
    (RebalancingConfig, "start_share", 1.0),
    (RebalancingConfig, "cooldown_s", -1.0),
    (RebalancingConfig, "max_migrations_per_instance", 0),
    (SchedulerConfig, "snapshot_interval_s", -0.01),
    (SchedulerConfig, "snapshot_interval_s", math.nan),
    (SchedulerConfig, "tick_s", 0.0),
    (RebalancingConfig, "max_moves_per_round", 0),
    (QueueingConfig, "reserve_tokens_per_running", -1),
    (QueueingConfig, "reserve_share", 1.0),
    (QueueingConfig, "prefill_backlog_tokens", 0),
    (QueueingConfig, "earmark_share", 1.5),
    (QueueingConfig, "ttft_target_s_per_token", -0.01),
    (QueueingConfig, "scan_depth", 0),
    (ScalingConfig, "low_freeness", 60.0),
    (ScalingConfig, "min_instances", 0),
    (ScalingConfig, "min_instances", 17),
    (ScalingConfig, "period_s", -1.0),
    (ScalingConfig, "cooldown_s", math.nan),
    (SchedulerConfig, "no_instance_timeout_s", -1.0),
    (LoadConfig, "load_targets", ((0, 0.5), (-1, 0.2))),
    (LoadConfig, "load_targets", ((0, 0.0),)),
    (EventLogConfig, "max_pending_bytes", 0),
    (HistoryConfig, "ended_requests", -1),
    (HistoryConfig, "events_per_request", 0),
]

EDGES: list[tuple[type[Any], str, float]] = [
    (MigrationConfig, "stop_blocks", 0),
    (MigrationConfig, "max_stages", 1),
    (MigrationConfig, "reserve_ahead_blocks", 0),
    (MigrationConfig, "max_incoming", 1),
    (MigrationConfig, "hold_share", 0.0),
    (MigrationConfig, "hold_share", 1.0),
    (MigrationConfig, "lease_s", 20.1),
    (CopyConfig, "stage_bytes", 1),
    (CopyConfig, "slice_bytes", 1),
    (CopyConfig, "copy_share", 1.0),
    (AdmissionConfig, "max_queued_requests", 1),
    (AdmissionConfig, "max_retry_after_s", 1.0),
    (RebalancingConfig, "low_freeness", 4.0),
    (RebalancingConfig, "cooldown_s", 0.0),
    (RebalancingConfig, "max_migrations_per_instance", 1),
    (SchedulerConfig, "snapshot_interval_s", 0.0),
]


@pytest.mark.parametrize(("config", "name", "value"), WRONG)
def test_a_wrong_value_is_refused_with_its_name_and_the_value(config: type[Any], name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{name: value})
    message = str(caught.value)
    assert repr(value) in message
    assert "must be" in message
    assert "\n" not in message
    # Two thresholds are checked against each other: the message may start with either, and names both.
    assert name in message


@pytest.mark.parametrize(("config", "name", "value"), EDGES)
def test_the_last_value_that_makes_sense_is_taken(config: type[Any], name: str, value: float) -> None:
    assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_has_a_default_and_the_defaults_are_valid(config: type[Any]) -> None:
    assert config() == config()
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_are_frozen_and_keyword_only(config: type[Any]) -> None:
    first = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), first, 1)
    with pytest.raises(TypeError):
        config(1)


def test_ticks_come_as_often_as_rebalancing_wants_and_only_where_something_depends_on_them() -> None:
    assert SchedulerConfig().interval_s is None
    assert SchedulerConfig(rebalancing=RebalancingConfig(interval_s=0.5)).interval_s == 0.5
    for other in ({"no_instance_timeout_s": 9}, {"queueing": QueueingConfig()}, {"scaling": ScalingConfig()}):
        assert SchedulerConfig(**other, tick_s=0.125).interval_s == 0.125  # type: ignore[arg-type]
