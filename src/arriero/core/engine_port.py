"""What a llumlet needs of its engine. Implemented by the vLLM engine, by the simulated one and by the tests' fake."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from arriero.core.messages import Answer
from arriero.core.types import MigrationId, Phase, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """What the engine knows of a request right now."""

    phase: Phase
    num_tokens: int  #: prompt + output
    num_output_tokens: int
    num_computed_tokens: int  #: KV entries that are settled (steps in flight not counted)
    in_flight: bool  #: a step whose output has not been processed holds the request
    epoch: int  #: preemption count
    unmovable: str | None = None  #: why it cannot move


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Blocks that were exported: what the destination's transport needs, and what it cost."""

    ticket: Any
    num_bytes: int = 0
    copy_s: float = 0.0
    sampler_state: bytes | None = None  #: with the last export only
    untold: bytes = b""  #: with the last export only: what the client's statistics are still to be told


class EnginePort(Protocol):
    """What a llumlet needs of its engine; complete, since a migration is only these moves.

    Every method is called on the engine's own thread, between two steps. ``start_*`` return at
    once; the engine reports with :meth:`arriero.core.llumlet.Llumlet.copied` later, on the same thread. Methods raise
    :class:`ArrieroError` with the reason if they can't.
    """

    block_size: int

    def find(self, request_id: RequestId) -> RequestStatus | None:
        """The request as this engine runs it; None if it is not here (or only parked)."""

    def start_export(self, migration_id: MigrationId, request_id: RequestId, first: int, max_end: int) -> int:
        """Begin to export blocks ``[first, end)`` with ``end <= max_end``; returns ``end``."""

    def export_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, with_blocks: bool
    ) -> Export:
        """Export ``[first, end)`` now, of a frozen request, with the sampler's state and what is untold."""

    def close_export(self, migration_id: MigrationId) -> None:
        """Free what the exports of this migration hold (staging memory). Idempotent."""

    def freeze(self, request_id: RequestId) -> None:
        """Take the request out of scheduling; it keeps its blocks."""

    def unfreeze(self, request_id: RequestId) -> None:
        """Put a frozen request back where it was."""

    def release(self, request_id: RequestId) -> None:
        """Free the request without telling its client. Idempotent."""

    def reserve(self, request_id: RequestId, num_tokens: int) -> None:
        """Take the parked request and allocate blocks for ``num_tokens``."""

    def is_ready(self, request_id: RequestId) -> bool:
        """Whether the reserved request could be scheduled at once (grammar compiled)."""

    def grow(self, request_id: RequestId, num_tokens: int) -> None:
        """Extend the reservation to ``num_tokens``."""

    def extend(self, request_id: RequestId, output_token_ids: tuple[int, ...]) -> None:
        """Tell the reserved request output tokens that its client has received."""

    def start_import(self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any) -> None:
        """Begin to import blocks ``[first, end)`` of the reservation."""

    def import_rest(
        self, migration_id: MigrationId, request_id: RequestId, first: int, end: int, ticket: Any
    ) -> Export:
        """Import ``[first, end)`` by the time :meth:`admit`, which follows at once, returns.

        The result says what it cost; its ``ticket`` is unused.
        """

    def admit(
        self, request_id: RequestId, num_computed_tokens: int, sampler_state: bytes | None, untold: bytes
    ) -> None:
        """Schedule the reserved request: it continues at the next token.

        ``untold`` is the engine's own, see Export; empty where no source could tell it: a replay.
        """

    def discard(self, request_id: RequestId) -> None:
        """Free a reservation or a parked request. Idempotent."""


def with_export(answer: Answer, export: Export) -> Answer:
    """``answer`` with what the copy cost and where it lies."""
    return replace(
        answer,
        ticket=export.ticket,
        num_bytes=export.num_bytes,
        copy_s=export.copy_s,
        sampler_state=export.sampler_state,
        untold=export.untold,
    )
