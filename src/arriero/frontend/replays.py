"""Replays: requests whose instance died go on elsewhere, from the token log.

The scheduler says where (a replay arrives there like a new request, and before those), the migration protocol puts the
request there (a migration without a source), and `core/suspects.py` says who may not be replayed yet, or ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from arriero.core.config import RecoveryConfig
from arriero.core.errors import ArrieroError, ConflictError
from arriero.core.suspects import Suspects, may_have_run
from arriero.core.types import Dispatchable, InstanceId, InstanceSnapshot, MigrationMode, RequestId
from arriero.frontend.instances import Instances
from arriero.frontend.links import InstanceLinks
from arriero.frontend.migrations import MigrationRunner
from arriero.frontend.requests import LiveRequest

logger = logging.getLogger(__name__)


class Replays:
    """Each request is in one replay at a time, however many of its attempts fail: two would run it twice."""

    def __init__(
        self,
        config: RecoveryConfig,
        *,
        instances: Instances,
        links: InstanceLinks,
        migrations: MigrationRunner,
        arrive: Callable[[Dispatchable], None],
        withdraw: Callable[[RequestId], None],
        lose: Callable[[LiveRequest, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._config = config
        self._instances = instances
        self._links = links
        self._migrations = migrations
        self._arrive = arrive
        self._withdraw = withdraw
        self._lose = lose
        self._spawn = spawn
        self._suspects = Suspects(config)
        self._open: dict[RequestId, LiveRequest] = {}  # nobody runs them
        self._held: list[LiveRequest] = []  # those of them that may not be replayed yet

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._open

    # ------------------------------------------------------------------ what happens

    def instance_lost(
        self, requests: Sequence[LiveRequest], last_seen: InstanceSnapshot | None, *, from_outside: bool
    ) -> list[LiveRequest]:
        """An instance died with these requests in its care; ``from_outside``: somebody killed it. Returns those that it
        is not to be tried with again.
        """
        running = may_have_run([r.request_id for r in requests], last_seen)
        given_up = self._suspects.died(running, from_outside=from_outside)
        return [r for r in requests if r.request_id in given_up]

    def produced(self, request_id: RequestId, num_tokens: int) -> None:
        """The request delivered tokens."""
        if self._suspects.produced(request_id, num_tokens):
            self._release()

    def ended(self, request_id: RequestId) -> None:
        """The request is no more."""
        self._open.pop(request_id, None)
        if self._suspects.ended(request_id):
            self._release()

    # ------------------------------------------------------------------ replaying

    def replay(self, request: LiveRequest) -> None:
        """See to it that the request goes on: its KV cache is lost, and nobody runs it."""
        if request.request_id not in self._open:
            self._open[request.request_id] = request
            self._begin(request)

    def _begin(self, request: LiveRequest) -> None:
        facts, done = request.facts, len(request.tokens)
        if facts.unmovable is not None and (done or not self._links.codec.is_self_contained(request.message)):
            self._lose(request, f"its instance died, and it cannot go on elsewhere: {facts.unmovable}")
        elif self._suspects.begin_replay(request.request_id):
            arrives = replace(
                facts,
                num_prompt_tokens=facts.num_prompt_tokens + done,
                max_tokens=max(1, facts.max_tokens - done),
                is_replay=True,
            )
            self._arrive(arrives)
        else:
            self._held.append(request)

    def _release(self) -> None:
        """A trial is over: the next one."""
        held, self._held = self._held, []
        for request in held:
            if self._open.get(request.request_id) is request:
                self._begin(request)

    def place(self, request: LiveRequest, destination: InstanceId) -> None:
        """The scheduler has chosen an instance for a replay."""
        if request.facts.unmovable is None:
            self._spawn(self._place(request, destination))
        else:  # nothing of it was delivered: it starts anew
            del self._open[request.request_id]
            request.route = destination
            self._links.add(destination, request.message)

    async def _place(self, request: LiveRequest, destination: InstanceId) -> None:
        """See the request through to running again."""
        with contextlib.suppress(ArrieroError):
            if self._instances.is_dead(
                destination
            ):  # since it was chosen: nobody will tell a migration that begins now
                raise ConflictError(f"instance {destination} died before the replay of {request.request_id} began")
            report = await self._migrations.start(
                request, destination, mode=MigrationMode.RECOMPUTE, cause="instance lost", source=None
            )
            # Its new instance may have died in the same turn of the loop.
            if report.ok and not self._instances.is_dead(destination):
                self._open.pop(request.request_id, None)
                return
            logger.warning("replay of %s at instance %d: %s", request.request_id, destination, report.reason)
        if self._open.get(request.request_id) is request:
            self._withdraw(request.request_id)
            await asyncio.sleep(self._config.retry_s)
            if self._open.get(request.request_id) is request:
                self._begin(request)
