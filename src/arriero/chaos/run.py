"""One chaos run: learn the answers, load the server, carry out the script, judge."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp

from arriero.bench.client import Client
from arriero.chaos.backends import Backend, Backends, signal_tree
from arriero.chaos.load import Load
from arriero.chaos.scoreboard import Outcome, Struck, measure, row
from arriero.chaos.script import Action, Fault, Script

POLL_S = 0.02
UP_TIMEOUT_S = 30.0  #: a fault without anybody to strike is skipped after this long


@dataclass(frozen=True, slots=True)
class Result:
    """Of one run."""

    system: str
    faults: list[Struck]
    outcomes: list[Outcome]

    def row(self) -> dict[str, Any]:
        """Its line of the scoreboard."""
        return row(self.system, self.faults, self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "system": self.system,
            "faults": [f.as_dict() for f in self.faults],
            "streams": [o.as_dict() for o in self.outcomes],
        }


class Run:
    """Carries out a script against backends while a load runs."""

    def __init__(
        self, client: Client, load: Load, backends: Backends, rng: random.Random, say: Callable[[str], None]
    ) -> None:
        self._client = client
        self._load = load
        self._backends = backends
        self._rng = rng
        self._say = say
        self._struck: list[Struck] = []
        self._acting: set[asyncio.Task[None]] = set()

    async def carry_out(self, script: Script, system: str) -> Result:
        """Load for the script's time; every fault at its moment."""
        self._say(f"{system}: learning the answers, undisturbed")
        await self._load.learn()
        self._say(f"{system}: {script.duration_s:.0f} s of load, {len(script.faults)} faults")
        self._started_s = perf_counter()
        faults = [asyncio.create_task(self._wait_and_strike(fault)) for fault in script.faults]
        try:
            await self._load.run(script.duration_s)
        finally:
            for task in faults:
                task.cancel()
            ended = await asyncio.gather(*faults, return_exceptions=True)
            await asyncio.gather(*self._acting)
        for result in ended:
            if isinstance(result, Exception):
                raise result
        never = [f for f, result in zip(script.faults, ended, strict=True) if isinstance(result, BaseException)]
        now = perf_counter()
        self._struck += [Struck(action=f.action, target="-", at_s=now, skipped="its moment never came") for f in never]
        struck = sorted(self._struck, key=lambda s: s.at_s)
        measure([s for s in struck if s.skipped is None], self._load.outcomes)
        return Result(system, struck, self._load.outcomes)

    # ------------------------------------------------------------------ faults

    async def _wait_and_strike(self, fault: Fault) -> None:
        await self._moment(fault)
        backend, num_up = await self._choose(fault)
        if backend is None:
            self._note(fault, "-", 0, "no backend was up")
            return
        task = asyncio.create_task(
            self._strike(fault, backend, num_up)
        )  # not cut short by the end of the load: SIGCONT must come
        self._acting.add(task)
        task.add_done_callback(self._acting.discard)
        await asyncio.shield(task)

    async def _moment(self, fault: Fault) -> None:
        if fault.at_event is not None:
            await self._event(fault.at_event)
            return
        while True:  # counts are looked at, nobody announces them
            if self._has_come(fault):
                return
            await asyncio.sleep(POLL_S)

    def _has_come(self, fault: Fault) -> bool:
        if fault.at_tokens is not None:
            return self._load.num_tokens >= fault.at_tokens
        if fault.at_requests is not None:
            return len(self._load.outcomes) >= fault.at_requests
        return perf_counter() - self._started_s >= (fault.at_s or 0.0)

    async def _event(self, name: str) -> None:
        """The next event ``name`` of an arriero server; never, of another."""
        last = 0
        first = True
        while True:
            try:
                events = await self._client.get("/events", after=last, limit=1000)
            except (aiohttp.ClientError, ValueError):
                events = []
            last = max([last, *[e["seq"] for e in events]])
            if not first and any(e["event"] == name for e in events):
                return
            first = False
            await asyncio.sleep(POLL_S)

    async def _choose(self, fault: Fault) -> tuple[Backend | None, int]:
        """Whom to strike, of how many that are up."""
        deadline = perf_counter() + UP_TIMEOUT_S
        while perf_counter() < deadline:
            up = list(await self._backends.up())
            if fault.target is not None and fault.target < len(up):
                return up[fault.target], len(up)
            if fault.target is None and up:
                return self._rng.choice(up), len(up)
            await asyncio.sleep(POLL_S)
        return None, 0

    async def _strike(self, fault: Fault, backend: Backend, num_up: int) -> None:
        noted = self._note(fault, backend.name, num_up)
        match fault.action:
            case Action.KILL:
                signal_tree(backend.pid, signal.SIGKILL)
                self._backends.killed(backend)
                noted.detection_s = await self._backends.detection_s(backend, noted.at_s)
            case Action.STOP:
                signal_tree(backend.pid, signal.SIGSTOP)
                try:
                    await asyncio.sleep(fault.for_s)
                finally:
                    signal_tree(backend.pid, signal.SIGCONT)
            case action:
                noted.skipped = await self._backends.act(action, backend, fault.for_s)
        if noted.skipped is not None:
            self._say(f"  {fault.action} of {backend.name} skipped: {noted.skipped}")

    def _note(self, fault: Fault, target: str, num_up: int, skipped: str | None = None) -> Struck:
        struck = Struck(action=fault.action, target=target, at_s=perf_counter(), num_up=num_up, skipped=skipped)
        self._struck.append(struck)
        self._say(f"  {perf_counter() - self._started_s:6.1f} s: {fault.action} {target}")
        return struck
