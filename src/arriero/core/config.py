"""The only place with defaults. Frozen, checked once at construction."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arriero.core.errors import ConfigError


def _require(ok: bool, name: str, value: object, want: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r} is invalid: it must be {want}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationConfig:
    """Limits of one migration and of an instance's part in migrations."""

    stop_blocks: int = 1  #: detach once at most this many full blocks are left to copy
    max_stages: int = 64  #: copy stages before the migration gives up converging and detaches
    reserve_ahead_blocks: int = 1  #: blocks reserved beyond what the request holds now
    stage_timeout_s: float = 20.0  #: one operation without an answer
    timeout_s: float = 120.0  #: the whole migration, up to DETACH
    retry_s: float = 2.0  #: asking again after DETACH, when only an answer can tell
    ready_poll_s: float = 0.005  #: asking again whether the destination's grammar is compiled
    align_s: float = 1.0  #: DETACH waits at most so long for the request's next token
    lease_s: float = 60.0  #: a reservation without news frees itself
    tombstone_s: float = 300.0  #: how long an ended migration is remembered
    max_incoming: int = 16  #: reservations an instance grants at a time
    hold_share: float = 1.0  #: a busy destination waits at most so much of a step for an announced COMMIT; 0: not

    def __post_init__(self) -> None:
        _require(self.stop_blocks >= 0, "stop_blocks", self.stop_blocks, "0 or more")
        _require(self.max_stages >= 1, "max_stages", self.max_stages, "1 or more")
        _require(self.reserve_ahead_blocks >= 0, "reserve_ahead_blocks", self.reserve_ahead_blocks, "0 or more")
        _require(self.max_incoming >= 1, "max_incoming", self.max_incoming, "1 or more")
        _require(self.align_s >= 0, "align_s", self.align_s, "0 or more seconds")
        _require(0 <= self.hold_share <= 1, "hold_share", self.hold_share, "in [0, 1]")
        for name in ("stage_timeout_s", "timeout_s", "retry_s", "ready_poll_s", "lease_s", "tombstone_s"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")
        _require(
            self.lease_s > self.stage_timeout_s,
            "lease_s",
            self.lease_s,
            f"longer than stage_timeout_s={self.stage_timeout_s}, or reservations die under live migrations",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyConfig:
    """How KV blocks travel."""

    stage_bytes: int = 32 << 20  #: at most this much in one copy stage
    slice_bytes: int = 1 << 20  #: copied in one go before the copier looks up
    copy_share: float = 0.05  #: share of an instance's time that copying may take while others decode

    def __post_init__(self) -> None:
        _require(self.stage_bytes > 0, "stage_bytes", self.stage_bytes, "more than 0 bytes")
        _require(self.slice_bytes > 0, "slice_bytes", self.slice_bytes, "more than 0 bytes")
        _require(0 < self.copy_share <= 1, "copy_share", self.copy_share, "in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """How an instance's prompts share its steps with its decodes."""

    itl_target_s: float = 0.2  #: between two tokens of a stream (five a second: as fast as people read); 0: none
    prompts_to_decodes: float = 3.0  #: time that prompts get of a step at least, as a multiple of what decodes take
    prompt_step_s: float = 1.0  #: of a step that nobody is known to wait for: who arrives in it waits for its end
    least_prompt_tokens: int = 32  #: of a step, whatever they take

    def __post_init__(self) -> None:
        _require(self.itl_target_s >= 0, "itl_target_s", self.itl_target_s, "0 or more seconds")
        _require(self.prompts_to_decodes > 0, "prompts_to_decodes", self.prompts_to_decodes, "more than 0")
        _require(self.prompt_step_s > 0, "prompt_step_s", self.prompt_step_s, "more than 0 seconds")
        _require(self.least_prompt_tokens >= 1, "least_prompt_tokens", self.least_prompt_tokens, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionConfig:
    """What an instance does when its KV memory has run out, see core/preemption.py."""

    restart_blocks_per_running: float = 1.0  #: stay free, for each running request, where one that has begun goes on

    def __post_init__(self) -> None:
        kept = self.restart_blocks_per_running
        _require(0 <= kept < float("inf"), "restart_blocks_per_running", kept, "0 or more")


class RebalancingRule(StrEnum):
    """How requests to move are chosen."""

    PAPER = "paper"  #: Llumnix, OSDI'24
    RELIEF = "relief"  #: the cheapest move that gives a full instance what it lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """What happens when instances die or hang."""

    restart: bool = True  #: replace an instance that died
    backoff_s: float = 1.0  #: before the second restart of a place in ``window_s`` (the first is at once), then doubled
    max_backoff_s: float = 60.0
    max_deaths: int = 5  #: so many deaths of a place in ``window_s``: it stays down
    window_s: float = 600.0
    hang_timeout_s: float = 60.0  #: silence after which an instance counts as hung and is killed; 0: never
    max_replays: int = 2  #: of a request that its instance died under
    max_outside_kills: int = 10  #: deaths by somebody's SIGKILL that a request is not blamed for
    probation_tokens: int = 8  #: a suspect that has produced so many since its replay is cleared
    retry_s: float = 0.25  #: between two tries to place a request
    no_instance_timeout_s: float = 120.0  #: a server's :attr:`SchedulerConfig.no_instance_timeout_s`

    def __post_init__(self) -> None:
        _require(self.max_deaths >= 1, "max_deaths", self.max_deaths, "1 or more")
        _require(self.max_replays >= 0, "max_replays", self.max_replays, "0 or more")
        _require(self.max_outside_kills >= 0, "max_outside_kills", self.max_outside_kills, "0 or more")
        _require(self.probation_tokens >= 1, "probation_tokens", self.probation_tokens, "1 or more")
        for name in ("backoff_s", "hang_timeout_s", "no_instance_timeout_s"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more seconds")
        for name in ("window_s", "retry_s"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")
        _require(
            self.max_backoff_s >= self.backoff_s,
            "max_backoff_s",
            self.max_backoff_s,
            f"at least backoff_s={self.backoff_s}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """How many new requests may wait."""

    max_queued_requests: int = 1024  #: for each ready instance; beyond them, new requests are refused
    min_retry_after_s: float = 1.0  #: what a refused client is told at least
    max_retry_after_s: float = 60.0  #: and at most

    def __post_init__(self) -> None:
        _require(self.max_queued_requests >= 1, "max_queued_requests", self.max_queued_requests, "1 or more")
        _require(self.min_retry_after_s > 0, "min_retry_after_s", self.min_retry_after_s, "more than 0 seconds")
        _require(
            self.max_retry_after_s >= self.min_retry_after_s,
            "max_retry_after_s",
            self.max_retry_after_s,
            f"at least min_retry_after_s={self.min_retry_after_s}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainConfig:
    """How an instance is emptied."""

    max_moves: int = 8  #: migrations away from it at a time
    copy_share: float = 0.5  #: share of the time that copying may take, there and where its requests go
    retry_s: float = 0.1  #: between two tries to move a request
    max_tries: int = 2  #: to move a request with its KV cache; then without
    patience_s: float = 2.0  #: a request that finds no room moves without its KV cache after that
    timeout_s: float = 300.0  #: what runs there after that is lost to it as if the instance had died
    end_s: float = 2.5  #: from the order to end until the process, which is empty, is killed

    def __post_init__(self) -> None:
        _require(self.max_moves >= 1, "max_moves", self.max_moves, "1 or more")
        _require(self.max_tries >= 0, "max_tries", self.max_tries, "0 or more")
        _require(0 < self.copy_share <= 1, "copy_share", self.copy_share, "in (0, 1]")
        _require(self.patience_s >= 0, "patience_s", self.patience_s, "0 or more seconds")
        for name in ("retry_s", "timeout_s", "end_s"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """What clients over HTTP may ask and cost."""

    client_timeout_s: float = 30.0  #: a client that takes nothing that long is dropped
    max_admin_body_bytes: int = 64 << 10  #: of a request to the admin API
    max_resume_s: float = 300.0  #: longest grace that a client may ask for
    stream_journal_bytes: int = 4 << 20  #: kept of one resumable stream
    journal_bytes: int = 256 << 20  #: kept of all of them

    def __post_init__(self) -> None:
        _require(self.client_timeout_s > 0, "client_timeout_s", self.client_timeout_s, "more than 0 seconds")
        _require(self.max_admin_body_bytes > 0, "max_admin_body_bytes", self.max_admin_body_bytes, "more than 0 bytes")
        _require(self.max_resume_s > 0, "max_resume_s", self.max_resume_s, "more than 0 seconds")
        _require(self.stream_journal_bytes > 0, "stream_journal_bytes", self.stream_journal_bytes, "more than 0 bytes")
        _require(
            self.journal_bytes >= self.stream_journal_bytes,
            "journal_bytes",
            self.journal_bytes,
            f"at least stream_journal_bytes={self.stream_journal_bytes}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancingConfig:
    """Two-sided thresholds on freeness (Llumnix, OSDI'24, section 6: 3 on both sides)."""

    rule: RebalancingRule = RebalancingRule.RELIEF
    interval_s: float = 0.25  #: between two rounds
    low_freeness: float = 3.0  #: below: a source
    high_freeness: float = 4.0  #: above: a destination
    start_share: float = 0.1  #: of an instance's blocks, that must stay free at most where a waiting request goes
    cooldown_s: float = 5.0  #: a request that moved stays at least this long
    max_migrations_per_instance: int = 2  #: concurrent moves an instance takes part in
    max_moves_per_round: int = 64  #: started in one round, over all instances

    def __post_init__(self) -> None:
        _require(self.interval_s > 0, "interval_s", self.interval_s, "more than 0 seconds")
        _require(
            self.low_freeness <= self.high_freeness,
            "low_freeness",
            self.low_freeness,
            f"at most high_freeness={self.high_freeness}",
        )
        _require(0 <= self.start_share < 1, "start_share", self.start_share, "in [0, 1)")
        _require(self.cooldown_s >= 0, "cooldown_s", self.cooldown_s, "0 or more seconds")
        _require(
            self.max_migrations_per_instance >= 1,
            "max_migrations_per_instance",
            self.max_migrations_per_instance,
            "1 or more",
        )
        _require(self.max_moves_per_round >= 1, "max_moves_per_round", self.max_moves_per_round, "1 or more")


class LogLevel(StrEnum):
    """How much of what happens is written into the event log's file."""

    EVENTS = "events"  #: what happened to requests and instances
    FULL = "full"  #: also what the scheduler was told and what it decided, from which its decisions can be repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogConfig:
    """What is written into an event log's file, and how far behind a server's disk may be."""

    level: LogLevel = LogLevel.EVENTS
    max_pending_bytes: int = 64 << 20  #: that the disk has not taken yet; beyond them lines are left out

    def __post_init__(self) -> None:
        _require(self.max_pending_bytes > 0, "max_pending_bytes", self.max_pending_bytes, "more than 0 bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryConfig:
    """How much a server remembers to explain what happened to requests."""

    ended_requests: int = 1000  #: the last so many
    events_per_request: int = 64

    def __post_init__(self) -> None:
        _require(self.ended_requests >= 0, "ended_requests", self.ended_requests, "0 or more")
        _require(self.events_per_request >= 1, "events_per_request", self.events_per_request, "1 or more")


class QueueTerm(StrEnum):
    """Which waiting requests count in an instance's load."""

    HEAD = "head"  #: the head of the line: the paper (Llumnix, OSDI'24)
    ALL = "all"  #: all of them: its artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What counts in freeness."""

    queue_term: QueueTerm = QueueTerm.HEAD
    load_targets: tuple[tuple[int, float], ...] = ()
    """(priority, share of the memory): where requests of this priority or a more urgent one run, the rest of the memory
    is headroom. By rising priority; the first that fits counts.
    """

    def __post_init__(self) -> None:
        priorities = [p for p, _ in self.load_targets]
        _require(sorted(set(priorities)) == priorities, "load_targets", self.load_targets, "by rising priority")
        _require(all(0 < s <= 1 for _, s in self.load_targets), "load_targets", self.load_targets, "shares in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueingConfig:
    """When a request is bound to an instance, and when it waits in the global queue."""

    reserve_tokens_per_running: int = 128  #: tokens that each running request is expected to grow by soon
    reserve_share: float = 0.1  #: of an instance's blocks, that this comes to at most
    prefill_backlog_tokens: int = 8192  #: an instance with so much to prefill starts nobody soon
    earmark_share: float = 0.0625  #: of the instances, that may be kept for requests which fit nowhere; one at least
    trusts_max_tokens: bool = False  #: each request is taken to end at its ``max_tokens``: the reserve is exact then
    horizon_s: float = 0.0  #: then memory must suffice for so long, with arrivals that are foretold; 0: to the end
    patience_s: float = 0.0  #: short prompts go before long ones that have waited less than this; 0: by arrival
    ttft_target_s: float = 5.0  #: where a request has none of its own: the queue is ordered by when targets fall due
    ttft_target_s_per_token: float = 0.01  #: then, for each token of the prompt: short prompts go before long ones
    scan_depth: int = 64  #: requests at the head of the queue that are looked at

    def __post_init__(self) -> None:
        reserve = self.reserve_tokens_per_running
        _require(reserve >= 0, "reserve_tokens_per_running", reserve, "0 or more")
        _require(0 <= self.reserve_share < 1, "reserve_share", self.reserve_share, "in [0, 1)")
        backlog = self.prefill_backlog_tokens
        _require(backlog >= 1, "prefill_backlog_tokens", backlog, "1 or more")
        _require(0 <= self.earmark_share <= 1, "earmark_share", self.earmark_share, "in [0, 1]")
        _require(self.scan_depth >= 1, "scan_depth", self.scan_depth, "1 or more")
        for name in ("horizon_s", "patience_s", "ttft_target_s", "ttft_target_s_per_token"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "0 or more seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """Range of the average freeness. That of Llumnix (OSDI'24, section 6.5) is [10, 60], and it does not look ahead."""

    low_freeness: float = 25.0
    high_freeness: float = 35.0
    min_instances: int = 1
    max_instances: int = 16
    period_s: float = 10.0  #: the average must be outside of the range for so long
    cooldown_s: float = 10.0  #: between two decisions
    looks_ahead: bool = True  #: the demand is taken to go on growing until an instance that is started now serves
    start_s: float = 30.0  #: until an instance that is started serves, as long as none has shown it

    def __post_init__(self) -> None:
        _require(
            self.low_freeness < self.high_freeness,
            "low_freeness",
            self.low_freeness,
            f"less than high_freeness={self.high_freeness}",
        )
        _require(
            1 <= self.min_instances <= self.max_instances,
            "min_instances",
            self.min_instances,
            f"in [1, max_instances={self.max_instances}]",
        )
        for name in ("period_s", "cooldown_s", "start_s"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the global scheduler does."""

    dispatch_policy: str = "freeness"
    load: LoadConfig = LoadConfig()
    queueing: QueueingConfig | None = None  #: None: a request is bound as it arrives
    rebalancing: RebalancingConfig | None = None  #: None: requests move only on demand
    preemption: PreemptionConfig | None = None  #: of the instances; None: vLLM's own
    drain: DrainConfig = DrainConfig()
    admission: AdmissionConfig | None = None  #: None: queues have no bound
    scaling: ScalingConfig | None = None  #: None: instances are started and drained on demand
    no_instance_timeout_s: float = 0.0  #: how long a request waits for any instance to be ready; 0: it is rejected
    policy_errors_stop: bool = False  #: a policy that fails raises PolicyError; otherwise the default takes its place
    snapshot_interval_s: float = 0.02  #: instances push at most this often
    tick_s: float = 0.25  #: between two ticks, unless rebalancing has its own interval
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.snapshot_interval_s >= 0, "snapshot_interval_s", self.snapshot_interval_s, "0 or more seconds")
        _require(self.tick_s > 0, "tick_s", self.tick_s, "more than 0 seconds")
        _require(
            self.no_instance_timeout_s >= 0, "no_instance_timeout_s", self.no_instance_timeout_s, "0 or more seconds"
        )

    @property
    def interval_s(self) -> float | None:
        """Seconds between two ticks; None: nothing depends on them."""
        if self.rebalancing is not None:
            return self.rebalancing.interval_s
        wanted = self.no_instance_timeout_s or self.queueing is not None or self.scaling is not None
        return self.tick_s if wanted else None
