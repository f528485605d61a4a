"""A dispatch policy of your own: the instance with the fewest prompt tokens still to compute.

    arriero simulate --workload M-M --rate 10 --num-requests 2000 \\
        --policy infaas,examples.shortest_prompt_queue.ShortestPromptQueue
    arriero serve MODEL --policy infaas --dispatch-policy examples.shortest_prompt_queue.ShortestPromptQueue
"""

from arriero.core.dispatch import ClusterView
from arriero.core.types import Dispatchable, InstanceId


class ShortestPromptQueue:
    """No clock, no I/O, and no randomness but ``view.rng``, so that simulations and replays repeat."""

    def choose(self, request: Dispatchable, view: ClusterView) -> InstanceId:
        """One of ``view.candidates``."""
        return min(view.candidates, key=lambda instance: (self.backlog(view, instance), instance))

    def backlog(self, view: ClusterView, instance: InstanceId) -> int:
        """Tokens that wait there, as the last snapshot shows them and as has been sent since."""
        snapshot = view.snapshots.get(instance)
        return (snapshot.prefill_tokens if snapshot else 0) + view.ledger.pending_tokens(instance)
