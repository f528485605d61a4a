"""Blocks between processes of one host: staged in POSIX shared memory, read in place by the peer.

A segment is a file `/dev/shm/<prefix>-<pid>-<n>`: one page of header, then the bytes. The header holds the
number of the staging it carries now (0: none), which is how a peer tells a void ticket. Touching fresh
memory costs more than copying into it, so segments are pooled and reused, and a reader keeps its mappings:
a name never stands for two segments.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
import secrets
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.core.errors import TransportError
from arriero.transport.port import Ticket

SHM = Path("/dev/shm")
MIN_SEGMENT_BYTES = 1 << 20
HEADER_BYTES = mmap.PAGESIZE
MAX_MAPPINGS = 16

_STAGING = struct.Struct("<Q")
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    name: str
    num_bytes: int  # without the header
    memory: mmap.mmap

    def mark(self, staging: int) -> None:
        _STAGING.pack_into(self.memory, 0, staging)


@dataclass(slots=True)
class _Staged:
    segment: _Segment
    num_bytes: int
    staging: int


class SharedMemoryTransport:
    """A :class:`~arriero.transport.port.BlockTransport` for one host.

    ``prefix`` starts the names of this process's segments; ``keep_bytes`` of idle memory stay in the pool.
    Peers must run as the same user and see the same ``/dev/shm``. Raises TransportError for a bad prefix.
    """

    def __init__(self, prefix: str, keep_bytes: int = 64 << 20) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise TransportError(f"shared memory prefix {prefix!r} is invalid: use letters, digits, '_', '.' and '-'")
        self._prefix = prefix
        self._keep_bytes = keep_bytes
        self._numbers = itertools.count(secrets.randbits(32))  # a recycled pid must not recycle names
        self._stagings = itertools.count(1)
        self._staged: dict[str, _Staged] = {}
        self._idle: list[_Segment] = []
        self._mappings: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._closed = False
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ exporter

    def stage(self, key: str, num_bytes: int) -> memoryview:
        """See :class:`~arriero.transport.port.BlockTransport`."""
        if num_bytes <= 0:
            raise TransportError(f"cannot stage {num_bytes} bytes: ask for 1 or more")
        with self._lock:
            self._require_open()
            old = self._staged.pop(key, None)
            if old is not None:
                self._put_back(old.segment)
            segment = self._take(num_bytes)
            staged = self._staged[key] = _Staged(segment, num_bytes, next(self._stagings))
            segment.mark(staged.staging)
            return memoryview(segment.memory)[HEADER_BYTES : HEADER_BYTES + num_bytes]

    def ticket(self, key: str) -> Ticket:
        """See :class:`~arriero.transport.port.BlockTransport`."""
        with self._lock:
            staged = self._staged.get(key)
            if staged is None:
                raise TransportError(f"nothing is staged under {key!r}")
            name, num_bytes, staging = staged.segment.name, staged.num_bytes, staged.staging
        return {"kind": "shm", "name": name, "num_bytes": num_bytes, "staging": staging}

    def release(self, key: str) -> None:
        """See :class:`~arriero.transport.port.BlockTransport`."""
        with self._lock:
            staged = self._staged.pop(key, None)
            if staged is not None:
                self._put_back(staged.segment)

    def close(self) -> None:
        """Unlink every segment of this process. Idempotent."""
        with self._lock:
            self._closed = True
            for staged in self._staged.values():
                self._discard(staged.segment)
            for segment in self._idle:
                self._discard(segment)
            self._staged, self._idle = {}, []
            self._mappings.clear()

    def check_integrity(self) -> None:
        """See :class:`~arriero.transport.port.BlockTransport`."""
        with self._lock:
            segments = [*self._idle, *(s.segment for s in self._staged.values())]
            if len({s.name for s in segments}) != len(segments):
                raise TransportError(f"a segment is used twice: {sorted(s.name for s in segments)}")
            if sum(s.num_bytes for s in self._idle) > self._keep_bytes:
                raise TransportError(f"more than {self._keep_bytes} bytes are idle in {len(self._idle)} segments")
            for segment in segments:
                size = (SHM / segment.name).stat().st_size
                if size != segment.num_bytes + HEADER_BYTES:
                    raise TransportError(f"segment {segment.name} has {size} bytes, not {segment.num_bytes} + header")

    @property
    def num_open(self) -> int:
        """Keys that are staged and not released."""
        return len(self._staged)

    # ------------------------------------------------------------------ importer

    def fetch(self, ticket: Ticket) -> memoryview:
        """See :class:`~arriero.transport.port.BlockTransport`."""
        name, num_bytes, staging = _read_ticket(ticket)
        with self._lock:
            self._require_open()
            mapping = self._map(name)
        if len(mapping) < HEADER_BYTES + num_bytes:
            raise TransportError(f"segment {name} holds {len(mapping) - HEADER_BYTES} bytes, the ticket {num_bytes}")
        if (current := _STAGING.unpack_from(mapping)[0]) != staging:
            state = f"staged anew as {current}" if current else "released"
            raise TransportError(f"staging {staging} in segment {name} is void: it was {state}")
        return memoryview(mapping)[HEADER_BYTES : HEADER_BYTES + num_bytes].toreadonly()

    def _map(self, name: str) -> mmap.mmap:
        mapping = self._mappings.get(name)
        if mapping is None:
            # Dropping a mapping is all it takes: it lives on while somebody holds a view of it.
            for gone in [n for n in self._mappings if not (SHM / n).exists()]:
                del self._mappings[gone]
            mapping = self._mappings[name] = _open_segment(name)
            while len(self._mappings) > MAX_MAPPINGS:
                self._mappings.popitem(last=False)
        self._mappings.move_to_end(name)
        return mapping

    # ------------------------------------------------------------------ pool

    def _require_open(self) -> None:
        if self._closed:
            raise TransportError(f"the transport {self._prefix!r} is closed")

    def _take(self, num_bytes: int) -> _Segment:
        fitting = [s for s in self._idle if s.num_bytes >= num_bytes]
        if fitting:
            segment = min(fitting, key=lambda s: s.num_bytes)
            self._idle.remove(segment)
            return segment
        size = max(MIN_SEGMENT_BYTES, 1 << (num_bytes - 1).bit_length())
        try:
            return self._create(size)
        except TransportError:
            if not self._idle:
                raise
        self._trim(0)  # what is idle may be what is missing
        return self._create(size)

    def _create(self, num_bytes: int) -> _Segment:
        name = f"{self._prefix}-{os.getpid()}-{next(self._numbers)}"
        fd = os.open(SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Not ftruncate: that promises memory which a later write may find missing, and dies of SIGBUS.
            os.posix_fallocate(fd, 0, HEADER_BYTES + num_bytes)
            return _Segment(name, num_bytes, mmap.mmap(fd, HEADER_BYTES + num_bytes))
        except OSError as error:
            (SHM / name).unlink(missing_ok=True)
            raise TransportError(_no_room(num_bytes, error)) from error
        finally:
            os.close(fd)

    def _put_back(self, segment: _Segment) -> None:
        segment.mark(0)
        self._idle.append(segment)
        self._trim(self._keep_bytes)

    def _trim(self, keep_bytes: int) -> None:
        """Unlink the segments that have been idle longest until at most ``keep_bytes`` are idle."""
        while sum(s.num_bytes for s in self._idle) > keep_bytes:
            self._discard(self._idle.pop(0))

    @staticmethod
    def _discard(segment: _Segment) -> None:
        segment.mark(0)
        (SHM / segment.name).unlink(missing_ok=True)


def sweep(prefix: str) -> list[str]:
    """Unlink the segments of dead processes whose prefix starts with ``prefix``; returns their names.

    Call it where the owners' process ids mean something: not from another pid namespace.
    """
    removed = []
    pattern = re.compile(rf"{re.escape(prefix)}-(?:.*-)?(\d+)-\d+")
    for path in sorted(SHM.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is not None and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """It has ended, and nobody collects it: so is everything whose parent died in a container without an init."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    return stat.rpartition(b")")[2].split()[0] in (b"Z", b"X")


def _read_ticket(ticket: Any) -> tuple[str, int, int]:
    match ticket:
        case {"kind": "shm", "name": str(name), "num_bytes": int(num_bytes), "staging": int(staging)}:
            if _PREFIX.fullmatch(name) and num_bytes > 0 and staging > 0:
                return name, num_bytes, staging
    raise TransportError(f"not a shared memory ticket: {ticket!r}")


def _open_segment(name: str) -> mmap.mmap:
    try:
        fd = os.open(SHM / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"segment {name} cannot be opened ({error.strerror}): its owner is gone") from error
    try:
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise TransportError(f"segment {name} cannot be mapped: {error}") from error
    finally:
        os.close(fd)


def _no_room(num_bytes: int, error: OSError) -> str:
    if error.errno != errno.ENOSPC:
        return f"{num_bytes} bytes of shared memory could not be allocated in {SHM}: {error.strerror}"
    state = os.statvfs(SHM)
    free, total = (n * state.f_frsize >> 20 for n in (state.f_bavail, state.f_blocks))
    return (
        f"no room for {num_bytes >> 20} MiB in {SHM} ({free} of {total} MiB are free): "
        f"enlarge it (docker run --shm-size=..., mount -o remount,size=...) or lower stage_bytes"
    )
