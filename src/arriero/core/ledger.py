"""The dispatcher's ledger: requests sent to an instance that its snapshots do not show yet.

Without it a burst between two snapshots would pile up on one instance.
"""

from __future__ import annotations

from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, RequestId


class Ledger:
    """Where each request was sent, and which of them no snapshot has shown."""

    def __init__(self) -> None:
        self.unmovable: set[RequestId] = set()  #: of the requests in somebody's care
        self._where: dict[RequestId, InstanceId] = {}
        self._assigned: dict[InstanceId, dict[RequestId, Dispatchable]] = {}
        self._unseen: dict[InstanceId, dict[RequestId, Dispatchable]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def sent(self, request: Dispatchable, instance: InstanceId) -> None:
        """``request`` was sent to ``instance``, and is nowhere else."""
        self.ended(request.request_id)
        self._where[request.request_id] = instance
        if request.unmovable is not None:
            self.unmovable.add(request.request_id)
        self._assigned.setdefault(instance, {})[request.request_id] = request
        self._unseen.setdefault(instance, {})[request.request_id] = request

    def moved(self, request_id: RequestId, destination: InstanceId) -> None:
        """``request_id`` runs on ``destination`` now; nothing happens if it has ended."""
        source = self._where.get(request_id)
        if source is not None:
            self.sent(self._assigned[source][request_id], destination)

    def ended(self, request_id: RequestId) -> None:
        """The request finished or was aborted. Idempotent."""
        instance = self._where.pop(request_id, None)
        if instance is not None:
            self.unmovable.discard(request_id)
            self._assigned[instance].pop(request_id)
            self._unseen[instance].pop(request_id, None)

    def knows(self, request_id: RequestId) -> bool:
        """Whether the request is in some instance's care."""
        return request_id in self._where

    def instance_of(self, request_id: RequestId) -> InstanceId | None:
        """Whose care the request is in."""
        return self._where.get(request_id)

    def facts_of(self, request_id: RequestId) -> Dispatchable | None:
        """The request, if it is in some instance's care."""
        instance = self._where.get(request_id)
        return None if instance is None else self._assigned[instance][request_id]

    def requests_of(self, instance: InstanceId) -> list[Dispatchable]:
        """All requests in the instance's care, in the order in which they came into it."""
        return list(self._assigned.get(instance, {}).values())

    def reconcile(self, snapshot: InstanceSnapshot) -> None:
        """Forget what the snapshot shows."""
        unseen = self._unseen.get(snapshot.instance)
        if unseen:
            for request in snapshot.requests:
                unseen.pop(request.request_id, None)

    def forget(self, instance: InstanceId) -> None:
        """The instance is gone."""
        for request_id in self._assigned.pop(instance, {}):
            del self._where[request_id]
            self.unmovable.discard(request_id)
        self._unseen.pop(instance, None)

    def num_outstanding(self, instance: InstanceId) -> int:
        """Requests in the instance's care, seen or not."""
        return len(self._assigned.get(instance, {}))

    def num_pending(self, instance: InstanceId) -> int:
        """Requests that were sent to the instance and that it has not shown yet."""
        return len(self._unseen.get(instance, ()))

    def pending(self, instance: InstanceId) -> list[Dispatchable]:
        """Requests that were sent to the instance and that it has not shown yet."""
        return list(self._unseen.get(instance, {}).values())

    def pending_tokens(self, instance: InstanceId) -> int:
        """Tokens of the prompts of unseen requests."""
        return sum(r.num_prompt_tokens for r in self._unseen.get(instance, {}).values())

    def pending_blocks(self, instance: InstanceId, block_size: int) -> int:
        """KV blocks that the prompts of unseen requests will need."""
        unseen = self._unseen.get(instance)
        if not unseen:
            return 0
        return sum(-(-(r.num_prompt_tokens + 1) // block_size) for r in unseen.values())
