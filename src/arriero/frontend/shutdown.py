"""The end of a front end: what runs may finish within a time, the rest is cut and told so."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable

from arriero.frontend.instances import Progress
from arriero.frontend.requests import LiveRequest, RequestTable

POLL_S = 0.02
FLUSH_S = 0.2
"""For the last words to reach clients before anything else is closed."""


class Shutdown:
    """Waits for requests to end, then ends them."""

    def __init__(self, requests: RequestTable, lose: Callable[[LiveRequest, str], None], progress: Progress) -> None:
        self._requests = requests
        self._lose = lose
        self._progress = progress
        self._hurry = asyncio.Event()
        self.has_begun = False

    async def run(self, timeout_s: float) -> int:
        """Take nothing new, wait up to ``timeout_s`` for what runs, or until a second Ctrl-C or SIGTERM, and end the
        rest with an error. Returns how many were cut.
        """
        self.has_begun = True
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._hurry.set)
        if timeout_s and len(self._requests):
            self._progress(f"ending: {len(self._requests)} request(s) may finish within {timeout_s:.0f} s")
        deadline = loop.time() + timeout_s
        while len(self._requests) and loop.time() < deadline and not self._hurry.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), POLL_S)
        left = list(self._requests)
        for request in left:
            self._lose(request, f"the server ends: cut after {len(request.tokens)} tokens")
        if left:
            self._progress(f"ending: {len(left)} request(s) were cut")
            await asyncio.sleep(FLUSH_S)
        return len(left)
