"""The copy jobs of a worker: blocks arrive whole at a worker of the same kind, or the job fails and says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from arriero.transport.shm import HEADER_BYTES, SharedMemoryTransport  # noqa: E402
from arriero.vllm.blocks import KvBlocks  # noqa: E402
from arriero.vllm.worker import ArrieroWorkerExtension, CopyDone, CopyJob, RestOfImport  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

SHAPE = (8, 2, 16)
NUM_LAYERS = 3


class Worker(ArrieroWorkerExtension):
    """A worker without a model, whose copy jobs run here instead of on its thread."""

    def __init__(self, name: str, seed: int, shape: tuple[int, ...] = SHAPE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rank = 0
        self.model_runner = SimpleNamespace(requests={})
        self.kv = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(NUM_LAYERS)]
        self._arriero_blocks = KvBlocks(self.kv)
        self._arriero_slice_bytes = 1 << 20
        self._arriero_transport = SharedMemoryTransport(f"arriero-test.{os.getpid()}-{name}")

    def export(self, *block_ids: int) -> CopyDone:
        return self._arriero_run(CopyJob(migration_id="m", kind="export", block_ids=list(block_ids)))

    def load(self, ticket: Any, *block_ids: int) -> CopyDone:
        return self._arriero_run(CopyJob(migration_id="m", kind="import", block_ids=list(block_ids), ticket=ticket))


def test_a_request_whose_prompt_is_not_done_draws_nothing_from_its_generator() -> None:
    """On a CPU; vLLM would take the draw back by the generator's offset, which there is none of."""
    generators = {i: torch.Generator().manual_seed(i) for i in range(3)}
    states = [g.get_state() for g in generators.values()]
    worker = Worker("sampling", seed=3)

    def sample_tokens(grammar: Any) -> list[int]:
        for generator in runner.input_batch.generators.values():
            torch.randint(9, (1,), generator=generator)
        if grammar == "broken":
            raise ValueError(grammar)
        return sorted(runner.input_batch.generators)

    runner = SimpleNamespace(
        device=torch.device("cpu"),
        input_batch=SimpleNamespace(generators=generators),
        discard_request_mask=SimpleNamespace(np=[False, True, False]),
        sample_tokens=sample_tokens,
    )
    worker.model_runner = runner
    worker._arriero_spare_generators()
    assert runner.sample_tokens(None) == [0, 2]
    assert sorted(generators) == [0, 1, 2]
    assert torch.equal(generators[1].get_state(), states[1])
    assert not torch.equal(generators[0].get_state(), states[0])
    with pytest.raises(ValueError, match="broken"):
        runner.sample_tokens("broken")
    assert sorted(generators) == [0, 1, 2]


@pytest.fixture
def source() -> Iterator[Worker]:
    worker = Worker("source", seed=1)
    yield worker
    worker._arriero_transport.close()


@pytest.fixture
def destination() -> Iterator[Worker]:
    worker = Worker("destination", seed=2)
    yield worker
    worker._arriero_transport.close()


def travelled(ticket: Any) -> Any:
    """As it looks after the control messages have carried it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(ticket))


def damage(ticket: Any, offset: int, bit: int) -> None:
    """Flip a bit of the staged bytes."""
    path = Path("/dev/shm") / ticket["transport"]["name"]
    with path.open("r+b") as staged:
        staged.seek(HEADER_BYTES + offset)
        (byte,) = staged.read(1)
        staged.seek(HEADER_BYTES + offset)
        staged.write(bytes([byte ^ (1 << bit)]))


def test_blocks_arrive_at_a_worker_of_the_same_kind(source: Worker, destination: Worker) -> None:
    done = source.export(1, 5)
    assert done.error is None
    assert destination.load(travelled(done.ticket), 7, 0).error is None
    for ours, theirs in zip(source.kv, destination.kv, strict=True):
        assert torch.equal(ours[[1, 5]], theirs[[7, 0]])


@pytest.mark.parametrize("offset", [0, 100, 2 * NUM_LAYERS * 32 - 1])
def test_one_damaged_bit_fails_the_import(source: Worker, destination: Worker, offset: int) -> None:
    ticket = travelled(source.export(1, 5).ticket)
    damage(ticket, offset, bit=offset % 8)
    done = destination.load(ticket, 7, 0)
    assert done.error is not None
    assert done.error.startswith("the KV blocks arrived damaged: their checksum is 0x")


def test_a_request_whose_last_blocks_are_damaged_is_not_admitted(source: Worker, destination: Worker) -> None:
    done, _ = source.arriero_export_rest("m", "request", [3])
    assert done is not None
    ticket = travelled(done.ticket)
    damage(ticket, 10, bit=3)
    admitted = destination.arriero_admit(
        {"req_id": "request"}, None, RestOfImport(migration_id="m", block_ids=[4], tickets=[ticket])
    )
    assert admitted.error is not None
    assert "damaged" in admitted.error
    assert destination.model_runner.requests == {}


def test_blocks_in_another_order_fail_the_import(source: Worker, destination: Worker) -> None:
    """Not damaged at all, but another staging than the one that the checksum is of."""
    earlier = source.export(1, 5).ticket
    later = travelled(source.export(5, 1).ticket)
    done = destination.load({**later, "checksum": earlier["checksum"]}, 7, 0)
    assert done.error is not None
    assert "damaged" in done.error


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checksum": None}, "damaged"),
        ({"num_blocks": 3}, "3 blocks were exported, 2 are to be imported"),
        ({"transport": None}, "not a shared memory ticket"),
        ({"transport": {"kind": "shm", "name": "../../etc/passwd", "num_bytes": 1, "staging": 1}}, "not a shared"),
        ({"layout": {"num_layers": 9}}, "ValidationError"),
        ({"layout": None}, "ValidationError"),
    ],
)
def test_a_malformed_ticket_fails_the_import_and_says_why(
    source: Worker, destination: Worker, changes: dict[str, Any], says: str
) -> None:
    before = [t.clone() for t in destination.kv]
    done = destination.load({**travelled(source.export(1, 5).ticket), **changes}, 7, 0)
    assert done.error is not None
    assert says in done.error
    if says != "damaged":
        assert all(torch.equal(t, b) for t, b in zip(destination.kv, before, strict=True))


@pytest.mark.parametrize("ticket", [None, 7, "ticket", [], {}, b"\x80"])
def test_what_is_no_ticket_at_all_fails_the_import(destination: Worker, ticket: Any) -> None:
    assert destination.load(ticket, 7, 0).error is not None


def test_workers_of_different_layouts_refuse_each_other(source: Worker) -> None:
    other = Worker("other", seed=3, shape=(8, 2, 32))
    try:
        done = other.load(travelled(source.export(1).ticket), 1)
        assert done.error is not None
        assert done.error.startswith("incompatible KV layouts")
    finally:
        other._arriero_transport.close()


def test_staging_memory_is_nobody_else_s_to_read(source: Worker) -> None:
    ticket = source.export(1).ticket
    status = (Path("/dev/shm") / ticket["transport"]["name"]).stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_uid == os.getuid()
