"""Rolling restart: every instance is replaced under load, so many at a time.

With a surge the replacement starts first, at the same place, and the old instance is drained once it serves; without
one, the old instance goes first. A replacement that does not start ends the rollout: nobody else is touched.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from arriero.core.errors import ConflictError, LaunchError
from arriero.core.restarts import RestartPolicy
from arriero.core.types import InstanceId, InstanceState
from arriero.frontend.drains import Drains
from arriero.frontend.instances import Instance, Instances, MakeSpec

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class RolloutReport:
    """What a rolling restart has done. Durations in seconds."""

    max_surge: int
    flags: Sequence[str] = ()
    ok: bool = False
    reason: str = ""
    replaced: dict[InstanceId, InstanceId] = field(default_factory=dict)  #: old -> new
    drain_s: list[float] = field(default_factory=list)
    total_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Rollout:
    """At most one at a time."""

    def __init__(
        self,
        *,
        instances: Instances,
        drains: Drains,
        restarts: RestartPolicy,
        max_surge: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._instances = instances
        self._drains = drains
        self._restarts = restarts
        self._max_surge = max_surge
        self._clock = clock
        self._running: RolloutReport | None = None

    def choose(self, ids: Sequence[InstanceId] | None) -> list[Instance]:
        """The instances that are to be replaced; None: all, also those that died and stayed down. By name also one that
        was drained: that starts it again.

        Raises NotFoundError, and ConflictError for one that is starting, leaving or replaced already.
        """
        if ids is None:
            return [i for i in self._instances if i.state is InstanceState.READY or _stayed_down(i)]
        chosen = [self._instances[i] for i in dict.fromkeys(ids)]
        for instance in chosen:
            is_down = instance.state is InstanceState.DEAD and instance.replaced_by is None
            if instance.state is not InstanceState.READY and not is_down:
                raise ConflictError(f"instance {instance.instance_id} is {instance.state}: it cannot be restarted now")
        return chosen

    async def run(
        self,
        ids: Sequence[InstanceId] | None,
        *,
        max_surge: int | None = None,
        make_spec: MakeSpec | None = None,
        flags: Sequence[str] = (),
    ) -> RolloutReport:
        """Replace instances, with ``make_spec`` from now on if there is one; ``max_surge`` None: as memory allows.

        Raises NotFoundError or ConflictError if it can't begin; what happens then is in the report.
        """
        if self._running is not None:
            raise ConflictError(
                f"a restart is under way: {len(self._running.replaced)} instance(s) are replaced so far"
            )
        chosen = self.choose(ids)
        surge = self._max_surge() if max_surge is None else max_surge
        if not surge and len(chosen) and len(self._instances.ready_ids()) < 2:
            raise ConflictError("one instance serves, and without a surge nothing would: restart with --max-surge 1")
        self._running = RolloutReport(max_surge=surge, flags=list(flags))
        self._task = asyncio.create_task(self._run(chosen, self._running, make_spec))
        return await asyncio.shield(self._task)  # who asked may go

    async def _run(
        self, chosen: Sequence[Instance], report: RolloutReport, make_spec: MakeSpec | None
    ) -> RolloutReport:
        started, before = self._clock(), self._instances.make_spec
        self._instances.make_spec = make_spec or before
        try:
            for batch in _batches(chosen, max(1, report.max_surge)):
                await self._replace(batch, report)
            report.ok = True
        except (LaunchError, ConflictError) as error:
            self._instances.make_spec = before
            report.reason = str(error)
            logger.error("the rolling restart ends: %s", error)
        finally:
            self._running = None
            report.total_s = self._clock() - started
        return report

    async def _replace(self, batch: Sequence[Instance], report: RolloutReport) -> None:
        live = [i for i in batch if i.state is InstanceState.READY]
        if not report.max_surge:
            await self._drain(live, report)
        await self._launch([i for i in batch if i.replaced_by is None], report)  # who died meanwhile may be replaced
        if report.max_surge:
            await self._drain([i for i in live if i.state is InstanceState.READY], report)

    async def _launch(self, batch: Sequence[Instance], report: RolloutReport) -> None:
        for old in batch:
            self._restarts.forgive(old.place)
        futures = [self._instances.launch(place=old.place, replaces=old.instance_id) for old in batch]
        started = await asyncio.gather(*futures, return_exceptions=True)
        for old, new in zip(batch, started, strict=True):
            if isinstance(new, Instance):
                report.replaced[old.instance_id] = new.instance_id
        for new in started:
            if isinstance(new, BaseException):
                raise new

    async def _drain(self, instances: Sequence[Instance], report: RolloutReport) -> None:
        drains = [self._drains.start(i.instance_id, cause="rolling restart") for i in instances]
        for done in await asyncio.gather(*drains):
            report.drain_s.append(done.total_s)


def _stayed_down(instance: Instance) -> bool:
    return instance.state is InstanceState.DEAD and instance.replaced_by is None and not instance.is_ending


def _batches(instances: Sequence[Instance], size: int) -> list[tuple[Instance, ...]]:
    iterator = iter(instances)
    return list(iter(lambda: tuple(itertools.islice(iterator, size)), ()))
