"""What every BlockTransport does, and what only shared memory does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from arriero.core.errors import TransportError
from arriero.transport import shm
from arriero.transport.port import BlockTransport
from arriero.transport.shm import SharedMemoryTransport, sweep

PREFIX = f"arriero-test.{os.getpid()}"
SHM = Path("/dev/shm")

Make = Callable[[], BlockTransport]

IMPLEMENTATIONS: dict[str, Make] = {"shm": lambda: SharedMemoryTransport(PREFIX)}


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """A factory of transports of one kind; what it made is closed at the end."""
    made: list[BlockTransport] = []

    def make_one() -> BlockTransport:
        made.append(IMPLEMENTATIONS[request.param]())
        return made[-1]

    yield make_one
    for transport in made:
        transport.close()
        transport.close()  # idempotent


def pattern(num_bytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def put(transport: BlockTransport, key: str, data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    np.frombuffer(transport.stage(key, data.nbytes), dtype=np.uint8)[:] = data
    return transport.ticket(key)


@pytest.mark.parametrize("num_bytes", [1, 4096, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_a_peer_fetches_exactly_what_was_staged(make: Make, num_bytes: int) -> None:
    exporter, importer = make(), make()
    data = pattern(num_bytes)
    ticket = put(exporter, "m1", data)
    assert ticket["num_bytes"] == num_bytes
    fetched = importer.fetch(ticket)
    assert fetched.nbytes == num_bytes
    assert np.array_equal(np.frombuffer(fetched, dtype=np.uint8), data)


def test_a_ticket_survives_msgpack(make: Make) -> None:
    """Tickets travel inside control messages."""
    exporter, importer = make(), make()
    data = pattern(1000)
    ticket = msgspec.msgpack.decode(msgspec.msgpack.encode(put(exporter, "m1", data)))
    assert bytes(importer.fetch(ticket)) == data.tobytes()


def test_staging_is_writable_and_fetching_is_not(make: Make) -> None:
    exporter, importer = make(), make()
    assert not exporter.stage("m1", 100).readonly
    assert importer.fetch(exporter.ticket("m1")).readonly


def test_keys_do_not_share_memory(make: Make) -> None:
    exporter, importer = make(), make()
    first, second = pattern(3_000_000, 1), pattern(3_000_000, 2)
    tickets = put(exporter, "m1", first), put(exporter, "m2", second)
    assert exporter.num_open == 2
    assert bytes(importer.fetch(tickets[0])) == first.tobytes()
    assert bytes(importer.fetch(tickets[1])) == second.tobytes()


@pytest.mark.parametrize("num_bytes", [10, 100_000, 9_000_000])
def test_staging_a_key_again_replaces_it_and_voids_its_ticket(make: Make, num_bytes: int) -> None:
    exporter, importer = make(), make()
    old = put(exporter, "m1", pattern(1_000_000, 1))
    data = pattern(num_bytes, 2)
    new = put(exporter, "m1", data)
    assert exporter.num_open == 1
    assert bytes(importer.fetch(new)) == data.tobytes()
    with pytest.raises(TransportError, match=r"void|gone"):
        importer.fetch(old)


def test_a_ticket_may_be_fetched_twice(make: Make) -> None:
    """A repeated operation must find the same bytes."""
    exporter, importer = make(), make()
    ticket = put(exporter, "m1", pattern(1000))
    assert bytes(importer.fetch(ticket)) == bytes(importer.fetch(ticket))


def test_release_voids_the_ticket_and_is_idempotent(make: Make) -> None:
    exporter, importer = make(), make()
    ticket = put(exporter, "m1", pattern(1000))
    importer.fetch(ticket)
    exporter.release("m1")
    exporter.release("m1")
    exporter.release("never staged")
    assert exporter.num_open == 0
    with pytest.raises(TransportError, match=r"void|gone"):
        importer.fetch(ticket)
    with pytest.raises(TransportError, match="m1"):
        exporter.ticket("m1")


def test_a_fetched_view_outlives_the_importers_interest_in_it(make: Make) -> None:
    """Views stay readable memory (if not the same bytes) whatever happens to the transports."""
    exporter, importer = make(), make()
    view = importer.fetch(put(exporter, "m1", pattern(1000)))
    exporter.close()
    importer.close()
    assert len(bytes(view)) == 1000


def test_a_closed_exporter_has_nothing_to_fetch(make: Make) -> None:
    exporter, importer = make(), make()
    ticket = put(exporter, "m1", pattern(1000))
    exporter.close()
    with pytest.raises(TransportError, match=r"void|gone"):
        importer.fetch(ticket)
    with pytest.raises(TransportError, match="closed"):
        exporter.stage("m1", 10)
    with pytest.raises(TransportError, match="closed"):
        exporter.fetch(ticket)


@pytest.mark.parametrize("ticket", [None, {}, {"kind": "carrier pigeon"}, {"kind": "shm", "name": "x"}])
def test_a_malformed_ticket_is_refused(make: Make, ticket: Any) -> None:
    with pytest.raises(TransportError, match="ticket"):
        make().fetch(ticket)


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_nothing_cannot_be_staged(make: Make, num_bytes: int) -> None:
    with pytest.raises(TransportError, match="1 or more"):
        make().stage("m1", num_bytes)


def test_the_books_agree_after_many_random_exports(make: Make) -> None:
    exporter, importer = make(), make()
    rng = np.random.default_rng(7)
    tickets: dict[str, tuple[Any, int]] = {}
    for step in range(200):
        key = f"m{rng.integers(6)}"
        if rng.random() < 0.3:
            exporter.release(key)
            tickets.pop(key, None)
        else:
            data = np.full(int(rng.integers(1, 3_000_000)), step % 251, dtype=np.uint8)
            tickets[key] = put(exporter, key, data), step % 251
        exporter.check_integrity()
        assert exporter.num_open == len(tickets)
    for ticket, value in tickets.values():
        assert np.unique(np.frombuffer(importer.fetch(ticket), dtype=np.uint8)).tolist() == [value]


# ---------------------------------------------------------------------- shared memory only


@pytest.fixture
def transport() -> Iterator[SharedMemoryTransport]:
    transport = SharedMemoryTransport(PREFIX, keep_bytes=4 << 20)
    yield transport
    transport.close()
    assert segments() == []


def segments() -> list[str]:
    return sorted(p.name for p in SHM.iterdir() if p.name.startswith(PREFIX))


def test_shm_another_process_fetches(transport: SharedMemoryTransport) -> None:
    data = pattern(2_500_000)
    ticket = put(transport, "m1", data)
    code = (
        "import sys, json; from arriero.transport.shm import SharedMemoryTransport as T\n"
        "t = T('arriero-reader'); sys.stdout.buffer.write(t.fetch(json.load(sys.stdin)))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(ticket).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data.tobytes()


def test_shm_segments_are_private_to_the_user(transport: SharedMemoryTransport) -> None:
    transport.stage("m1", 10)
    (name,) = segments()
    assert (SHM / name).stat().st_mode & 0o777 == 0o600


def test_shm_released_memory_is_reused(transport: SharedMemoryTransport) -> None:
    transport.stage("m1", 1_500_000)
    before = segments()
    transport.release("m1")
    transport.stage("m2", 2_000_000)
    assert segments() == before


def test_shm_idle_memory_beyond_keep_bytes_is_unlinked(transport: SharedMemoryTransport) -> None:
    for key in ("m1", "m2", "m3"):
        transport.stage(key, 2 << 20)
    for key in ("m1", "m2", "m3"):
        transport.release(key)
        transport.check_integrity()
    assert len(segments()) == 2


def test_shm_a_reader_keeps_few_mappings_and_none_of_what_is_gone(
    transport: SharedMemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "MAX_MAPPINGS", 3)
    reader = SharedMemoryTransport(PREFIX)
    for i in range(5):
        reader.fetch(put(transport, f"m{i}", pattern(10, i)))
    assert len(reader._mappings) == 3
    transport.close()
    other = SharedMemoryTransport(PREFIX)
    reader.fetch(put(other, "m0", pattern(10)))
    assert len(reader._mappings) == 1
    other.close()


def test_shm_no_room_says_how_much_and_what_to_do(transport: SharedMemoryTransport) -> None:
    state = os.statvfs(SHM)
    with pytest.raises(TransportError, match=r"no room for \d+ MiB .*stage_bytes"):
        transport.stage("m1", 2 * state.f_blocks * state.f_frsize)
    assert segments() == []
    assert transport.num_open == 0
    transport.stage("m1", 10)


def test_shm_idle_segments_are_given_up_before_room_is_denied(
    transport: SharedMemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.stage("m1", 1 << 20)
    transport.release("m1")
    allocate = os.posix_fallocate

    def allocate_if_alone(fd: int, offset: int, num_bytes: int) -> None:
        if len(segments()) > 1:
            raise OSError(28, "No space left on device")
        allocate(fd, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate_if_alone)
    assert transport.stage("m2", 2 << 20).nbytes == 2 << 20


@pytest.mark.parametrize("name", ["../etc/passwd", "", ".hidden", "a/b"])
def test_shm_a_ticket_cannot_name_another_file(transport: SharedMemoryTransport, name: str) -> None:
    with pytest.raises(TransportError, match="not a shared memory ticket"):
        transport.fetch({"kind": "shm", "name": name, "num_bytes": 1, "staging": 1})


def test_shm_a_bad_prefix_is_refused() -> None:
    with pytest.raises(TransportError, match="prefix"):
        SharedMemoryTransport("../x")


def test_shm_sweep_removes_what_dead_processes_left() -> None:
    code = (
        f"import os; from arriero.transport.shm import SharedMemoryTransport as T\n"
        f"T({PREFIX!r}).stage('m1', 10); print(os.getpid(), flush=True); os._exit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    transport = SharedMemoryTransport(PREFIX)
    transport.stage("mine", 10)
    assert len(segments()) == 2
    (removed,) = sweep(PREFIX)
    assert removed.startswith(f"{PREFIX}-{pid}-")
    assert len(segments()) == 1
    transport.close()
    assert sweep(PREFIX) == []
