"""Dispatch by freeness, and by who holds the prompt's prefix already."""

from __future__ import annotations

from itertools import islice

from arriero.core.dispatch.max_freeness import MaxFreeness
from arriero.core.types import Dispatchable, InstanceId
from arriero.core.view import ClusterView


class PrefixFreeness:
    """The freest instance, or one that holds so much of the prompt that its load is made up for.

        cost(i) = tokens of the prompt to compute on i + tokens that i has yet to prefill + tokens in use on i

    This is the cost of NVIDIA Dynamo's KV router (``overlap_score_weight`` 1, its default), in tokens, not in blocks.
    A holder is chosen if it costs less than the freest instance: it may be fuller by what it holds of the prompt, no
    more, so a prefix that all prompts share crowds nobody. What is uneven afterwards is the rebalancer's.
    """

    MAX_HOLDERS = 16  #: that are looked at, of those who hold as much: a dispatch must not take longer with each

    def __init__(self) -> None:
        self._freest = MaxFreeness()

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """Argmin of the cost over the freest instance and the holders; ties go to the freest, then by number."""
        freest = self._freest.choose(request, view)
        holders, num_tokens = view.prefixes.find(request)
        if not num_tokens or freest in holders:
            return freest
        best, least = freest, self._load(view, freest)
        for instance in sorted(i for i in islice(holders, self.MAX_HOLDERS) if view.is_candidate(i)):
            load = self._load(view, instance) - num_tokens
            if load < least:
                best, least = instance, load
        return best

    @staticmethod
    def _load(view: ClusterView, instance: InstanceId) -> int:
        """Tokens in use and tokens to prefill; what is on its way counts as both."""
        pending, snapshot = view.ledger.pending_tokens(instance), view.snapshots.get(instance)
        if snapshot is None:
            return 2 * pending
        in_use = snapshot.num_blocks - snapshot.num_unclaimed_blocks + snapshot.waiting_demand_blocks
        return in_use * snapshot.block_size + snapshot.prefill_tokens + 2 * pending
