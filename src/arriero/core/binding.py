"""Late binding: a request that no instance can start soon waits in the global queue, not in an instance's.

Wherever memory becomes free first, the first in line that fits gets it. Those at the head that fit nowhere get an
instance each earmarked: nothing else is sent there, and requests move away from there, until it has room. So large
requests do not starve, and small ones do not wait behind them (EASY backfilling; Lifka, 1995).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from arriero.core.config import QueueingConfig
from arriero.core.dispatch.ranking import Ranking
from arriero.core.types import Dispatchable, InstanceId, RequestId
from arriero.core.view import ClusterView


class LateBinding:
    """Who may go where now."""

    def __init__(self, config: QueueingConfig) -> None:
        self._config = config
        self._roomiest = Ranking(lambda view, i: (-self.room(view, i),))
        self._earmarked: dict[RequestId, InstanceId] = {}

    def candidates(
        self, line: Iterable[Dispatchable], view: ClusterView, *, may_earmark: bool
    ) -> Iterator[tuple[Dispatchable, InstanceId]]:
        """Of those in ``line`` the ones that can start, with the roomiest instance; the caller sends each at once,
        there or to another that :meth:`has_room`. ``may_earmark``: instances may be kept anew.
        """
        ahead: set[RequestId] = set()
        for request in line:
            own = self._own(request, ahead if may_earmark else None, view)
            ahead.add(request.request_id)
            if own is not None and self._fits(request, view, own, self._free(view, own)):
                instance, fits = own, True
            else:  # nobody waits for an instance of its own while others start elsewhere
                instance = self._roomiest.best(view)
                fits = self.has_room(request, view, instance)
            if fits:
                self.forget(request.request_id, view)
                yield request, instance
            elif may_earmark and own is None and instance not in view.earmarks and self._has_share_left(view):
                self._earmarked[request.request_id] = instance
                view.earmark(instance, self._demand(request, view, instance))

    def _own(self, request: Dispatchable, ahead: Set[RequestId] | None, view: ClusterView) -> InstanceId | None:
        """The instance that is kept for the request. Where no more may be kept, it takes over that of somebody behind
        it in the line, who came first but is less urgent.
        """
        own = self._earmarked.get(request.request_id)
        if own is not None and not view.is_candidate(own):
            self.forget(request.request_id, view)
            own = None
        if own is not None or ahead is None or self._has_share_left(view):
            return own
        behind = next((r for r in reversed(self._earmarked) if r not in ahead), None)
        if behind is None:
            return None
        own = self._earmarked.pop(behind)
        self._earmarked[request.request_id] = own
        view.earmark(own, self._demand(request, view, own))
        return own

    def _has_share_left(self, view: ClusterView) -> bool:
        return len(self._earmarked) < max(1, int(self._config.earmark_share * len(view.candidates)))

    def forget(self, request_id: RequestId, view: ClusterView) -> None:
        """The request waits no more."""
        instance = self._earmarked.pop(request_id, None)
        if instance is not None:
            view.earmark(instance, None)

    def has_room(self, request: Dispatchable, view: ClusterView, instance: InstanceId) -> bool:
        """Whether ``instance`` can start the request with its next step or so, as far as is known."""
        return self._fits(request, view, instance, self.room(view, instance))

    def room(self, view: ClusterView, instance: InstanceId) -> float:
        """Free blocks that nobody waits for, beyond what running requests will soon grow into; minus infinity if the
        instance is earmarked, if its batch is full or prefills are backed up.
        """
        return float("-inf") if instance in view.earmarks else self._free(view, instance)

    def _free(self, view: ClusterView, instance: InstanceId) -> float:
        snapshot = view.snapshots.get(instance)
        if snapshot is None:
            return -float(view.ledger.num_outstanding(instance))  # one request, to begin with
        pending, config = view.ledger.num_pending(instance), self._config
        batch = snapshot.num_running + snapshot.num_waiting + pending
        backlog = snapshot.prefill_tokens + view.ledger.pending_tokens(instance)
        if batch >= snapshot.max_num_seqs or (batch and backlog >= config.prefill_backlog_tokens):
            return float("-inf")
        free = snapshot.num_unclaimed_blocks - snapshot.waiting_demand_blocks
        free -= view.ledger.pending_blocks(instance, snapshot.block_size)
        return self._blocks_left(view, instance, free, batch)

    def _blocks_left(self, view: ClusterView, instance: InstanceId, free: float, batch: int) -> float:
        """What is left of the ``free`` blocks once the requests of the batch have grown: each of them grows, but those
        that end make up for it. The more there are, the less of it is needed.
        """
        config, snapshot = self._config, view.snapshots[instance]
        growth = config.reserve_tokens_per_running / snapshot.block_size * batch
        return free - min(growth, config.reserve_share * snapshot.num_blocks)

    def _fits(self, request: Dispatchable, view: ClusterView, instance: InstanceId, room: float) -> bool:
        """Whether the request may start in ``room``."""
        return room >= self._demand(request, view, instance)

    @staticmethod
    def _demand(request: Dispatchable, view: ClusterView, instance: InstanceId) -> int:
        snapshot = view.snapshots.get(instance)
        return 0 if snapshot is None else -(-(request.num_prompt_tokens + 1) // snapshot.block_size)
