"""How requests get in: taken, refused before anything is begun, or kept until an instance has room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from arriero.core.commands import Reject, RejectKind
from arriero.core.errors import ArrieroError, ConfigError, OverloadedError, UnavailableError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import Dispatchable, InstanceId, RequestId
from arriero.frontend.orders import Orders
from arriero.frontend.requests import LiveRequest, RequestTable
from arriero.frontend.shutdown import Shutdown
from arriero.observe.events import EventLog
from arriero.observe.metrics import Metrics


class Intake:
    """The cluster's door."""

    def __init__(
        self,
        *,
        requests: RequestTable,
        scheduler: GlobalScheduler,
        orders: Orders,
        shutdown: Shutdown,
        events: EventLog,
        metrics: Metrics,
        clock: Callable[[], float],
        end: Callable[[RequestId, str], LiveRequest | None],
        abort: Callable[[Sequence[RequestId]], None],
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._orders = orders
        self._shutdown = shutdown
        self._events = events
        self._metrics = metrics
        self._clock = clock
        self._end = end
        self._abort = abort

    def submit(self, message: Any, facts: Dispatchable, external_id: str) -> None:
        """Take a new request; it is dispatched now or later. Raises UnavailableError if no instance is ready,
        OverloadedError if too many wait already, and ConfigError if none could ever run it.
        """
        if self._shutdown.has_begun:
            raise UnavailableError("the server ends: it takes no more requests")
        started = self._clock()
        self._requests.add(LiveRequest(facts, message, None, external_id, started))
        commands = self._scheduler.arrived(facts, started)
        refused = next((c for c in commands if isinstance(c, Reject) and c.request_id == facts.request_id), None)
        if refused is not None:
            commands.remove(refused)
            self._events.emit(
                "reject",
                request=facts.request_id,
                client_id=external_id,
                kind=refused.kind.value,
                reason=refused.reason,
            )
            self._end(facts.request_id, refused.kind.value)
        self._orders.carry_out(commands)
        self._metrics.dispatch_seconds.observe(self._clock() - started)
        if refused is not None:
            raise _error_of(refused)
        if self._route_of(facts.request_id) is None:
            self._events.emit(
                "queue", request=facts.request_id, client_id=external_id, num_queued=self._scheduler.num_queued
            )

    async def admit(
        self,
        message: Any,
        facts: Dispatchable,
        external_id: str,
        taken: Callable[[InstanceId | None], None] = lambda instance: None,
    ) -> None:
        """As :meth:`submit`, but wait until the request has an instance. Raises UnavailableError also if none came.

        ``taken`` is told before, as soon as it was not refused: its instance, or None while it waits for one.
        """
        self.submit(message, facts, external_id)
        taken(self._route_of(facts.request_id))
        request = self._requests.get(facts.request_id)
        if request is None or request.route is not None:
            return
        try:
            await self._orders.placed(facts.request_id)
        except asyncio.CancelledError:
            self._abort([facts.request_id])
            raise

    def _route_of(self, request_id: RequestId) -> InstanceId | None:
        """The instance that a live request runs on; None: it waits for one."""
        request = self._requests.get(request_id)
        return request.route if request is not None else None


def _error_of(refused: Reject) -> ArrieroError:
    if refused.retry_after_s is not None:
        return OverloadedError(refused.reason, refused.retry_after_s)
    return (ConfigError if refused.kind is RejectKind.IMPOSSIBLE else UnavailableError)(refused.reason)
