"""The vocabulary: values that the layers exchange. Immutable, plain, free of I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

InstanceId = int
"""Number of an instance; never reused while the front end lives."""

RequestId = str
"""vLLM's internal request id: unique even if a client repeats its own ids."""

MigrationId = str


class InstanceState(StrEnum):
    """Life of an instance as the front end sees it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Phase(StrEnum):
    """Where a request stands inside its instance."""

    WAITING = "waiting"  #: queued, holds no KV blocks (also after a preemption)
    RUNNING = "running"  #: in the batch: prefilling or decoding
    FROZEN = "frozen"  #: detached for a migration: keeps its blocks, is not scheduled
    INCOMING = "incoming"  #: reserved for a migration that has not committed yet


class MigrationMode(StrEnum):
    """How the KV cache reaches the destination."""

    LIVE = "live"  #: copied in stages while the request decodes
    STOP_AND_COPY = "stop_and_copy"  #: detached first, then copied whole
    RECOMPUTE = "recompute"  #: not copied: the destination prefills prompt and output again


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSnapshot:
    """One request inside an instance snapshot."""

    request_id: RequestId
    phase: Phase
    priority: int = 0  #: vLLM's sign: lower number = sooner
    num_tokens: int = 0  #: prompt + output so far
    num_blocks: int = 0  #: KV blocks held now
    demand_blocks: int = 0  #: KV blocks that its (re)prefill needs; for a waiting request


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSnapshot:
    """What an instance pushes after a step, at most every ``snapshot_interval_s``.

    ``requests`` lists waiting requests in queue order. ``num_free_blocks`` already excludes
    blocks of frozen and incoming requests.
    """

    instance: InstanceId
    time_s: float  #: the instance's monotonic clock
    num_blocks: int
    num_free_blocks: int
    block_size: int  #: tokens a block
    max_num_seqs: int
    requests: tuple[RequestSnapshot, ...] = ()
    num_preemptions: int = 0  #: since start
    num_steps: int = 0  #: since start

    @property
    def num_running(self) -> int:
        return sum(r.phase is Phase.RUNNING for r in self.requests)

    @property
    def num_waiting(self) -> int:
        return sum(r.phase is Phase.WAITING for r in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatchable:
    """What the scheduler knows of a request before an instance has seen it."""

    request_id: RequestId
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    unmovable: str | None = None  #: why it can never be migrated, if so
