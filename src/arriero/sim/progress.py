"""A progress bar for runs that are long enough to wonder, on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

_LONG = 20_000  # requests in all from which it is shown


@contextlib.contextmanager
def progress_bar(what: str, num_requests: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with the number of requests that have ended."""
    if not shown or num_requests < _LONG or not sys.stderr.isatty():
        yield lambda num_ended: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=num_requests)
        yield lambda num_ended: progress.update(task, completed=num_ended)
