"""Rebalancing: which running request moves where, from the fuller to the emptier instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from arriero.core.commands import Move
from arriero.core.config import RebalancingConfig, RebalancingRule
from arriero.core.rebalancing.context import Round
from arriero.core.rebalancing.copy_time import CopyTime
from arriero.core.rebalancing.pairing import pair
from arriero.core.rebalancing.paper import paper_moves
from arriero.core.rebalancing.relief import relief_moves
from arriero.core.types import InstanceId, InstanceSnapshot, RequestId
from arriero.core.view import ClusterView

__all__ = ["RULES", "Rebalancer", "Round", "pair", "paper_moves", "relief_moves"]

RULES: dict[RebalancingRule, Callable[[Round], list[Move]]] = {
    RebalancingRule.PAPER: paper_moves,
    RebalancingRule.RELIEF: relief_moves,
}


class Rebalancer:
    """One round after the other; remembers who has moved, and learns how long copies take."""

    def __init__(self, config: RebalancingConfig) -> None:
        self._config = config
        self._rested_at: dict[RequestId, float] = {}
        self._started: dict[RequestId, tuple[float, int]] = {}  # when, and its blocks
        self._copy_time = CopyTime()

    # ------------------------------------------------------------------ what it learns from

    def started(self, request_id: RequestId, source: InstanceSnapshot | None, now: float) -> None:
        """A move began."""
        listed = source.requests if source is not None else ()
        num_blocks = next((r.num_blocks for r in listed if r.request_id == request_id), 0)
        self._started[request_id] = (now, num_blocks)

    def moved(self, request_id: RequestId, now: float, *, ok: bool) -> None:
        """It ended; the request stays where it is for a while."""
        started_s, num_blocks = self._started.pop(request_id, (now, 0))
        if ok and num_blocks:
            self._copy_time.learn(num_blocks, now - started_s)
        self._rested_at[request_id] = now

    def ended(self, request_id: RequestId) -> None:
        """The request is no more."""
        self._rested_at.pop(request_id, None)

    # ------------------------------------------------------------------ what it wants

    def round(
        self,
        view: ClusterView,
        moving: Mapping[RequestId, tuple[InstanceId, InstanceId]],
        now: float,
        source: InstanceId | None = None,
    ) -> list[Move]:
        """The migrations to start now; those of one ``source`` alone as soon as a move from there has ended."""
        config = self._config
        busy: dict[InstanceId, int] = {}
        for ends in moving.values():
            for instance in ends:
                busy[instance] = busy.get(instance, 0) + 1
        return RULES[config.rule](
            Round(
                view=view,
                config=config,
                # What leaves a draining instance is the evacuation's business (core/draining.py).
                instances=tuple(
                    i
                    for i in view.snapshots
                    if view.is_candidate(i) and busy.get(i, 0) < config.max_migrations_per_instance
                ),
                moving=moving.keys(),
                resting={r for r, t in self._rested_at.items() if now - t < config.cooldown_s},
                now=now,
                copy_time=self._copy_time,
                source=source,
            )
        )
