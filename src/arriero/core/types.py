"""The vocabulary: values that the layers exchange. Immutable, plain, free of I/O."""

from __future__ import annotations

from collections.abc import Iterable
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
    demand_blocks: int = 0  #: KV blocks that its (re)prefill needs in all; 0 once it decodes
    prefill_tokens: int = 0  #: tokens to compute until its next token; 0 while it decodes

    @classmethod
    def of(
        cls,
        *,
        request_id: RequestId,
        phase: Phase,
        priority: int,
        num_tokens: int,
        num_computed: int,
        num_blocks: int,
        block_size: int,
    ) -> RequestSnapshot:
        """With what is yet to compute of ``num_tokens``, and the blocks that it and the next token take in all."""
        missing = num_tokens - num_computed
        prefills = missing > 1 or phase is Phase.WAITING
        return cls(
            request_id=request_id,
            phase=phase,
            priority=priority,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            demand_blocks=-(-(num_tokens + 1) // block_size) if prefills else 0,
            prefill_tokens=missing if prefills else 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSnapshot:
    """What an instance pushes after a step, at most every ``snapshot_interval_s``.

    ``requests`` lists waiting requests in queue order. ``num_free_blocks`` already excludes
    blocks of frozen and incoming requests. Make it with :meth:`of`: the aggregates, which are all that
    dispatch looks at, are sums over ``requests``.
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
    step_s: float = 0.0  #: how long the last step took; 0: not known
    num_running: int = 0
    num_waiting: int = 0
    head_demand_blocks: int = 0  #: of the first waiting request
    waiting_demand_blocks: int = 0  #: of all waiting requests
    prefill_demand_blocks: int = 0  #: that the prompts of running requests will take beyond what they hold
    prefill_tokens: int = 0  #: of running and waiting requests
    running_by_priority: tuple[tuple[int, int], ...] = ()  #: (priority, running requests), most urgent first

    @classmethod
    def of(
        cls,
        requests: Iterable[RequestSnapshot],
        *,
        instance: InstanceId,
        time_s: float,
        num_blocks: int,
        num_free_blocks: int,
        block_size: int,
        max_num_seqs: int,
        num_preemptions: int = 0,
        num_steps: int = 0,
        step_s: float = 0.0,
    ) -> InstanceSnapshot:
        """A snapshot with its aggregates, in one pass over ``requests``."""
        listed = tuple(requests)
        num_waiting = head = demand = prefill = claimed = 0
        running: dict[int, int] = {}
        for request in listed:
            if request.phase is Phase.RUNNING:
                running[request.priority] = running.get(request.priority, 0) + 1
                prefill += request.prefill_tokens
                if request.demand_blocks > request.num_blocks:
                    claimed += request.demand_blocks - request.num_blocks
            elif request.phase is Phase.WAITING:
                if not num_waiting:
                    head = request.demand_blocks
                num_waiting += 1
                demand += request.demand_blocks
                prefill += request.prefill_tokens
        return cls(
            instance=instance,
            time_s=time_s,
            num_blocks=num_blocks,
            num_free_blocks=num_free_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            requests=listed,
            num_preemptions=num_preemptions,
            num_steps=num_steps,
            step_s=step_s,
            num_running=sum(running.values()),
            num_waiting=num_waiting,
            head_demand_blocks=head,
            waiting_demand_blocks=demand,
            prefill_demand_blocks=claimed,
            prefill_tokens=prefill,
            running_by_priority=tuple(sorted(running.items())),
        )

    @property
    def num_unclaimed_blocks(self) -> int:
        """Free blocks that no running request's prompt will take: a prompt that is computed over several steps is given
        its blocks bit by bit. Negative if they will not suffice.
        """
        return self.num_free_blocks - self.prefill_demand_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatchable:
    """What the scheduler knows of a request before an instance has seen it."""

    request_id: RequestId
    num_prompt_tokens: int  #: to prefill; for a replay with what was generated before
    max_tokens: int
    priority: int = 0
    ttft_target_s: float | None = None  #: its client wants the first token so soon after its arrival
    unmovable: str | None = None  #: why it can never be migrated, if so
    is_replay: bool = False  #: its stream has begun and its KV cache is lost: it goes before those that have not begun
    block_hashes: tuple[int, ...] = ()  #: of the prompt's full blocks, each over its whole prefix; empty: not known
    num_hashed_tokens: int = 0  #: of the prompt, that block_hashes cover, in equal parts but for the last
