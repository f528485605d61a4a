"""A disk that can be made slow: a named pipe, written to by a server and read by us, or not."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path


class SlowPipe:
    """Creates ``path`` as a pipe and reads it to its end, but for the stalls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        os.mkfifo(path)
        self._fd = os.open(
            path, os.O_RDWR
        )  # ours to write to as well: no end of file, and whoever opens it need not wait
        self._may_read = threading.Event()
        self._may_read.set()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="slow pipe", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._closed:
            self._may_read.wait()
            self.num_bytes += len(os.read(self._fd, 65536))

    async def stall(self, for_s: float) -> None:
        """Read nothing for ``for_s`` seconds: once the pipe's 64 KiB are full, its writer waits."""
        self._may_read.clear()
        try:
            await asyncio.sleep(for_s)
        finally:
            self._may_read.set()

    def close(self) -> None:
        """End the reader and remove the pipe."""
        self._closed = True
        self._may_read.set()
        os.write(self._fd, b"\n")
        self._thread.join(1.0)
        os.close(self._fd)
        self.path.unlink(missing_ok=True)
