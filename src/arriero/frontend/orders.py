"""Carries out what the scheduler wants; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from arriero.core.commands import Command, Dispatch, Drain, Launch, Move, PolicyFailed, Reject, Stop
from arriero.core.errors import ArrieroError, LaunchError, UnavailableError
from arriero.core.scheduler import GlobalScheduler
from arriero.core.types import RequestId
from arriero.frontend.drains import Drains
from arriero.frontend.explain import alternatives_of
from arriero.frontend.instances import Instances
from arriero.frontend.links import InstanceLinks
from arriero.frontend.moves import Moves
from arriero.frontend.replays import Replays
from arriero.frontend.requests import LiveRequest, RequestTable
from arriero.observe.events import EventLog, known
from arriero.observe.metrics import Metrics

logger = logging.getLogger(__name__)


class ClusterParts(Protocol):
    """What commands are carried out with: the cluster, or what stands for it in a test."""

    scheduler: GlobalScheduler
    requests: RequestTable
    links: InstanceLinks
    instances: Instances
    moves: Moves
    replays: Replays
    drains: Drains
    events: EventLog
    metrics: Metrics

    def now(self) -> float:
        """The front end's clock."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it beside everything else."""

    def end(self, request_id: RequestId, how: str) -> LiveRequest | None:
        """The care for a request ends."""

    def lose(self, request: LiveRequest, reason: str) -> None:
        """Nothing more can be done for a request: its client gets an error."""


class Orders:
    """One method a command."""

    def __init__(self, parts: ClusterParts) -> None:
        self._own = parts
        self._failed_policies: set[str] = set()
        self._placing: dict[RequestId, asyncio.Future[None]] = {}  # who waits for an instance

    def carry_out(self, commands: Sequence[Command]) -> None:
        """All of them, in their order."""
        for command in commands:
            match command:
                case Dispatch():
                    self._place(command)
                case Move():
                    self._move(command)
                case Reject():
                    self._reject(command)
                case PolicyFailed():
                    self._blame(command)
                case Launch(num_instances=num):
                    for _ in range(num):
                        self._own.spawn(self._launch())
                case Drain(instance=instance, reason=reason):
                    with contextlib.suppress(ArrieroError):  # something has happened to it meanwhile
                        self._own.drains.start(instance, cause=reason)
                case Stop(instance=instance):
                    self._own.drains.emptied(instance)

    async def placed(self, request_id: RequestId) -> None:
        """Wait until the scheduler has given the request an instance. Raises UnavailableError if it gives it none."""
        placed = self._placing[request_id] = asyncio.get_running_loop().create_future()
        try:
            await placed
        finally:
            self._placing.pop(request_id, None)

    def _place(self, command: Dispatch) -> None:
        request = self._own.requests.get(command.request_id)
        if request is None:
            return
        self._own.events.emit(
            "dispatch",
            request=command.request_id,
            client_id=request.external_id,
            instance=command.instance,
            reason=command.reason,
            alternatives=alternatives_of(command),
            arrival_s=request.arrived_s,
            prompt_tokens=request.facts.num_prompt_tokens,
            max_tokens=request.facts.max_tokens,
            priority=request.facts.priority,
            **known(ttft_target_s=request.facts.ttft_target_s),
        )
        if command.request_id in self._own.replays:
            self._own.replays.place(request, command.instance)
            return
        request.route = command.instance
        self._own.links.add(command.instance, request.message)
        if (placing := self._placing.get(command.request_id)) is not None and not placing.done():
            placing.set_result(None)

    def _move(self, command: Move) -> None:
        request = self._own.requests.get(command.request_id)
        if request is not None and request.route == command.source:
            with contextlib.suppress(ArrieroError):  # something has happened to it meanwhile
                self._own.moves.start(request, command.destination, command.mode, command.reason)

    def _reject(self, command: Reject) -> None:
        """The request was taken, so its client hears of it as of any end."""
        request = self._own.requests.get(command.request_id)
        if request is None:
            return
        placing = self._placing.get(command.request_id)
        if placing is None:
            self._own.lose(request, command.reason)
        elif not placing.done():
            self._own.end(command.request_id, command.kind.value)
            placing.set_exception(UnavailableError(command.reason))

    def _blame(self, command: PolicyFailed) -> None:
        self._own.metrics.policy_failures.labels(command.policy).inc()
        if command.policy not in self._failed_policies:
            self._failed_policies.add(command.policy)
            failed = f"policy {command.policy} {command.error}"
            logger.warning("%s; the freest instance is taken instead (said once)", failed)

    async def _launch(self) -> None:
        try:
            await self._own.instances.launch()
        except LaunchError as error:
            logger.error("%s", error)
            self.carry_out(self._own.scheduler.launch_failed(self._own.now()))
