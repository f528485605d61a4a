"""What of a moving request is at its destination already, and the operations that bring the rest.

Blocks that are full never change, so they go ahead of the request, stage by stage; what is left goes
with DETACH and COMMIT. Of the token log, each LOAD and COMMIT carries what the ones before did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.core.messages import Answer, Commit, Copy, Detach, Load
from arriero.core.types import MigrationId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One copy stage, for reports."""

    num_blocks: int
    num_bytes: int
    export_s: float
    import_s: float


class Transfer:
    """Blocks [0, ``first``) of the request and ``known`` of its output tokens are there.

    ``tokens`` is the live token log.
    """

    def __init__(
        self, migration_id: MigrationId, request_id: RequestId, tokens: Sequence[int], *, with_blocks: bool
    ) -> None:
        self.stages: list[Stage] = []
        self.num_bytes = 0
        self.epoch = -1  #: of the request at its source: a preemption there makes the next COPY or DETACH fail
        self.with_blocks = with_blocks  #: False: the destination computes the KV cache anew
        self._migration_id = migration_id
        self._request_id = request_id
        self._tokens = tokens
        self._first = 0
        self._known = 0
        self._export_s = 0.0
        self._settled = 0  # full blocks at the source, at its last COPY

    @property
    def num_behind(self) -> int:
        """Full blocks that had not been copied when the last stage began."""
        return self._settled - self._first

    def copy(self) -> Copy:
        """Export what is full and not there yet."""
        return Copy(migration_id=self._migration_id, request_id=self._request_id, first=self._first, epoch=self.epoch)

    def load(self, copied: Answer) -> Load | None:
        """Import what a COPY has exported; None if that was nothing."""
        if copied.end <= self._first:
            return None
        self.num_bytes += copied.num_bytes
        self._export_s, self._settled = copied.copy_s, copied.settled_blocks
        known, news = self._tell()
        return Load(
            migration_id=self._migration_id,
            request_id=self._request_id,
            first=self._first,
            end=copied.end,
            ticket=copied.ticket,
            known=known,
            output_token_ids=news,
        )

    def loaded(self, answer: Answer) -> None:
        """A stage ends: the blocks are there."""
        self.stages.append(
            Stage(
                num_blocks=answer.end - self._first,
                num_bytes=answer.num_bytes,
                export_s=self._export_s,
                import_s=answer.copy_s,
            )
        )
        self._first = answer.end

    def detach(self) -> Detach:
        """Stop the request at its source and export the rest."""
        return Detach(
            migration_id=self._migration_id,
            request_id=self._request_id,
            first=self._first,
            epoch=self.epoch,
            with_blocks=self.with_blocks,
        )

    def commit(self, handover: Answer) -> Commit:
        """Import what DETACH has exported, and go on with the request."""
        self.num_bytes += handover.num_bytes
        known, news = self._tell()
        return Commit(
            migration_id=self._migration_id,
            request_id=self._request_id,
            first=handover.first,
            end=handover.end,
            ticket=handover.ticket,
            known=known,
            output_token_ids=news,
            num_output_tokens=handover.num_output_tokens,
            num_computed_tokens=handover.num_computed_tokens,
            sampler_state=handover.sampler_state,
            untold=handover.untold,
        )

    def _tell(self) -> tuple[int, tuple[int, ...]]:
        """How many tokens the destination knows, and those that it does not."""
        known, news = self._known, tuple(self._tokens[self._known :])
        self._known += len(news)
        return known, news
