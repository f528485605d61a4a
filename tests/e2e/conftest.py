"""A fleet of simulated instances for each module; a module says which with ``FLEET``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from .harness import Fleet, fleet_of
from .server import Server, serving


class ModuleFleet:
    """One fleet for all tests of a module; a fresh one after a test that left it dirty."""

    def __init__(self, make: Callable[[], contextlib.AbstractAsyncContextManager[Fleet]], num_instances: int) -> None:
        self._make = make
        self._num_instances = num_instances
        self._stack = contextlib.AsyncExitStack()
        self._fleet: Fleet | None = None

    async def start(self) -> Fleet:
        """The fleet, with all its instances ready."""
        if self._fleet is None:
            self._fleet = await self._stack.enter_async_context(self._make())
        await self._fleet.launch(self._num_instances - len(self._fleet.ready))
        self._fleet.forget()
        return self._fleet

    async def close(self) -> None:
        """End it."""
        self._fleet = None
        await self._stack.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_fleet(request: pytest.FixtureRequest) -> AsyncIterator[ModuleFleet]:
    """Started by the first test that wants it."""
    options: dict[str, Any] = {"num_instances": 2, **getattr(request.module, "FLEET", {})}
    fleet = ModuleFleet(lambda: fleet_of(**options), options["num_instances"])
    yield fleet
    await fleet.close()


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(module_fleet: ModuleFleet) -> AsyncIterator[Fleet]:
    """Ready instances. After the test every stream must have been exact, and nothing may be held anywhere."""
    started = await module_fleet.start()
    yield started
    try:
        await started.assert_clean()
    except BaseException:
        await module_fleet.close()
        raise


@pytest.fixture(scope="session")
def _strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("vllm")
    flags = "--max-num-seqs 4 --max-queued-requests 3 --client-timeout 1"
    with serving(tmp_path_factory.mktemp("strict") / "log", *flags.split()) as started:
        yield started


@pytest.fixture
def strict_server(_strict_server: Server) -> Iterator[Server]:
    """A server with narrow limits, one for all tests: 4 requests run and 3 wait at each of two instances. Clean after
    each test.
    """
    yield _strict_server
    _strict_server.assert_clean()
