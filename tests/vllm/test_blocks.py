"""KV blocks as bytes: every block arrives where it should, and no other byte is touched; and the pace of copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from arriero.core.errors import TransportError  # noqa: E402
from arriero.vllm import blocks as module  # noqa: E402
from arriero.vllm.blocks import BlockLayout, KvBlocks, Pacer  # noqa: E402

repeatable = settings(deadline=None, derandomize=True, database=None)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)

Tensors = list[Any]


def kv(shape: Sequence[int], num_layers: int, dtype: Any = torch.bfloat16, seed: int = 0) -> Tensors:
    """Layers of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    return [
        torch.randint(256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8).view(dtype)
        for _ in range(num_layers)
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int, Any]:
    """Shape of a layer, number of layers, dtype."""
    shape = (draw(st.integers(1, 12)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return shape, draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))


def some_blocks(draw: st.DataObject, num_blocks: int) -> list[int]:
    return draw.draw(st.lists(st.integers(0, num_blocks - 1), unique=True))


def no_pause(num_bytes: int) -> None:
    """Not paced."""


def as_bytes(tensor: Any) -> Any:
    """The same memory as ``[num_blocks, bytes]``."""
    return tensor.view(torch.uint8).view(tensor.shape[0], -1)


def staged(tensors: Tensors, block_ids: list[int]) -> bytearray:
    blocks = KvBlocks(tensors)
    stage = bytearray(len(block_ids) * blocks.layout.bytes_per_block)
    blocks.gather(block_ids, memoryview(stage), no_pause)
    return stage


# ---------------------------------------------------------------------- there and back


@repeatable
@given(layouts(), st.data())
def test_gathered_blocks_lie_layer_by_layer_in_the_order_in_which_they_were_named(
    layout: tuple[Any, ...], data: st.DataObject
) -> None:
    shape, num_layers, dtype = layout
    tensors = kv(shape, num_layers, dtype)
    block_ids = some_blocks(data, shape[0])
    expected = [bytes(as_bytes(t)[b].tolist()) for t in tensors for b in block_ids]
    assert bytes(staged(tensors, block_ids)) == b"".join(expected)


@repeatable
@given(layouts(), st.data())
def test_scattered_blocks_are_those_that_were_gathered_and_no_other_block_is_touched(
    layout: tuple[Any, ...], data: st.DataObject
) -> None:
    """Also into other block numbers, and into a cache of another size: as between two instances."""
    shape, num_layers, dtype = layout
    source = kv(shape, num_layers, dtype, seed=1)
    num_blocks = data.draw(st.integers(1, 12))
    destination = kv((num_blocks, *shape[1:]), num_layers, dtype, seed=2)
    before = [as_bytes(t).clone() for t in destination]
    there = some_blocks(data, num_blocks)
    here = data.draw(st.permutations(range(shape[0])))[: len(there)]
    there = there[: len(here)]

    KvBlocks(destination).scatter(there, memoryview(bytes(staged(source, here))), no_pause)

    for layer in range(num_layers):
        expected = before[layer].clone()
        for of, to in zip(here, there, strict=True):
            expected[to] = as_bytes(source[layer])[of]
        assert torch.equal(as_bytes(destination[layer]), expected)


@repeatable
@given(layouts(), st.data())
def test_blocks_scattered_back_to_where_they_came_from_leave_everything_as_it_was(
    layout: tuple[Any, ...], data: st.DataObject
) -> None:
    shape, num_layers, dtype = layout
    tensors = kv(shape, num_layers, dtype)
    before = [as_bytes(t).clone() for t in tensors]
    block_ids = some_blocks(data, shape[0])
    stage = staged(tensors, block_ids)
    for tensor in tensors:
        as_bytes(tensor)[block_ids] = 0
    KvBlocks(tensors).scatter(block_ids, memoryview(stage), no_pause)
    assert all(torch.equal(as_bytes(t), b) for t, b in zip(tensors, before, strict=True))


@repeatable
@given(layouts(), st.data())
def test_an_accelerator_s_layer_moves_the_same_bytes_as_the_host_s(
    layout: tuple[Any, ...], data: st.DataObject
) -> None:
    """Here with tensors in memory; on a GPU the same lines run on a stream."""
    import numpy as np

    shape, _, dtype = layout
    rows = as_bytes(kv(shape, 1, dtype)[0])
    index = np.asarray(some_blocks(data, shape[0]), dtype=np.int64)
    host, device = (np.zeros((len(index), rows.shape[1]), dtype=np.uint8) for _ in range(2))
    module._HostLayer(rows.numpy()).gather(index, host)
    module._DeviceLayer(rows).gather(index, device)
    assert (host == device).all()

    by_host, by_device = torch.zeros_like(rows), torch.zeros_like(rows)
    module._HostLayer(by_host.numpy()).scatter(index, host)
    module._DeviceLayer(by_device).scatter(index, host)
    assert torch.equal(by_host, by_device)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_staging_memory_of_a_peer_may_be_mapped_read_only() -> None:
    tensors = kv((4, 2), 1)
    stage = memoryview(bytes(staged(tensors, [2, 3])))
    index = module.np.asarray([0, 1])
    for layer_of in (lambda rows: module._HostLayer(rows.numpy()), module._DeviceLayer):
        rows = as_bytes(kv((4, 2), 1, seed=1)[0])
        layer_of(rows).scatter(index, module.np.frombuffer(stage, dtype="uint8").reshape(2, -1))
        assert torch.equal(rows[:2], as_bytes(tensors[0])[2:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_blocks_travel_between_two_caches_on_a_gpu() -> None:
    source = [t.cuda() for t in kv((8, 4, 16), 3, seed=1)]
    destination = [t.cuda() for t in kv((8, 4, 16), 3, seed=2)]
    KvBlocks(destination).scatter([5, 0], memoryview(staged(source, [1, 7])), no_pause)
    for of, to in ((1, 5), (7, 0)):
        assert all(torch.equal(as_bytes(s)[of], as_bytes(d)[to]) for s, d in zip(source, destination, strict=True))


def test_every_layer_is_reported_to_the_pacer_with_its_bytes_both_ways() -> None:
    blocks = KvBlocks(kv((8, 2, 4), 3))
    stage = bytearray(2 * blocks.layout.bytes_per_block)
    for move in (blocks.gather, blocks.scatter):
        copied: list[int] = []
        move([1, 2], memoryview(stage), copied.append)
        assert copied == [2 * blocks.layout.block_bytes] * 3


def test_no_blocks_at_all_are_nothing_to_do() -> None:
    blocks = KvBlocks(kv((4, 2), 2))
    for move in (blocks.gather, blocks.scatter):
        move([], memoryview(bytearray()), no_pause)


def test_staging_memory_may_be_larger_and_the_rest_of_it_is_left_alone() -> None:
    tensors = kv((4, 2), 2)
    exact = staged(tensors, [3, 1])
    larger = bytearray(b"\xaa" * (len(exact) + 5))
    KvBlocks(tensors).gather([3, 1], memoryview(larger), no_pause)
    assert larger == exact + b"\xaa" * 5


def test_staging_memory_that_is_too_small_is_refused_with_both_sizes() -> None:
    blocks = KvBlocks(kv((4, 2), 2, torch.float32))
    for move in (blocks.gather, blocks.scatter):
        with pytest.raises(TransportError, match="holds 31 bytes, 32 are needed"):
            move([0, 1], memoryview(bytearray(31)), no_pause)


@pytest.mark.parametrize("block_ids", [[4], [0, 99], [-1], [2, -4]])
def test_a_block_that_does_not_exist_is_refused_and_nothing_is_copied(block_ids: list[int]) -> None:
    """Clipped or wrapped numbers would read or overwrite the blocks of another request."""
    tensors = kv((4, 2), 2)
    before = [as_bytes(t).clone() for t in tensors]
    blocks = KvBlocks(tensors)
    stage = bytearray(b"\xaa" * 1000)
    for move in (blocks.gather, blocks.scatter):
        with pytest.raises(TransportError, match="4 blocks"):
            move(block_ids, memoryview(stage), no_pause)
    assert stage == b"\xaa" * 1000
    assert all(torch.equal(as_bytes(t), b) for t, b in zip(tensors, before, strict=True))


# ---------------------------------------------------------------------- layouts


@repeatable
@given(layouts())
def test_a_layout_says_what_two_workers_must_agree_on(layout: tuple[Any, ...]) -> None:
    shape, num_layers, dtype = layout
    tensors = kv(shape, num_layers, dtype)
    found = KvBlocks(tensors).layout
    assert found == BlockLayout(
        num_layers=num_layers,
        block_bytes=tensors[0][0].nbytes,
        dtype=str(dtype),
        shape=tuple(shape[1:]),
        axes=tuple(range(1, len(shape))),
    )
    assert found.bytes_per_block == sum(t[0].nbytes for t in tensors)


LAYOUTS = {"LBHNC": "lbhnc", "LBNHC": "lbnhc", "BLHNC": "blhnc", "BLNHC": "blnhc"}
"""vLLM's layouts whose blocks are in one piece, as axes in memory: layer, block, head, token, content."""
LOGICAL = "lbhnc"


def views(layout: str, num_layers: int, seed: int, num_blocks: int = 6) -> Tensors:
    """One view ``[block, head, token, content]`` for each layer, as vLLM makes them of one allocation."""
    sizes = dict(zip(LOGICAL, (num_layers, num_blocks, 3, 4, 8), strict=True))
    (memory,) = kv([sizes[axis] for axis in layout], 1, seed=seed)
    return list(memory.permute([layout.index(axis) for axis in LOGICAL]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_order_blocks_have_in_memory_they_arrive_and_nothing_else_is_touched(layout: str) -> None:
    source, destination = (views(LAYOUTS[layout], 3, seed) for seed in (1, 2))
    expected = [t.contiguous().view(torch.uint8).clone() for t in destination]
    for theirs, ours in zip(source, expected, strict=True):
        ours[[0, 5]] = theirs.contiguous().view(torch.uint8)[[4, 2]]
    KvBlocks(destination).scatter([0, 5], memoryview(staged(source, [4, 2])), no_pause)
    found = [t.contiguous().view(torch.uint8) for t in destination]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_caches_whose_blocks_have_another_order_of_axes_do_not_agree() -> None:
    square = [t[:, :3, :3] for t in kv((5, 3, 3, 8), 2)]
    turned = [t.transpose(1, 2) for t in square]
    assert KvBlocks(square).layout != KvBlocks(turned).layout


def test_blocks_of_the_pool_that_a_kernel_divides_are_moved_whole() -> None:
    tensors = kv((12, 2, 4), 2)
    stage = bytearray(4 * KvBlocks(tensors, num_blocks=4).layout.bytes_per_block)
    KvBlocks(tensors, num_blocks=4).gather([3], memoryview(stage), no_pause)
    whole = b"".join(as_bytes(t)[9:12].numpy().tobytes() for t in tensors)
    assert stage[: len(whole)] == whole
    for num_blocks, cut in ((5, tensors), (4, views("blhnc", 2, 1, num_blocks=12))):
        with pytest.raises(TransportError, match=f"12 rows for {num_blocks} blocks"):
            KvBlocks(cut, num_blocks)


def test_caches_of_different_sizes_have_the_same_layout() -> None:
    assert KvBlocks(kv((3, 2, 4), 2)).layout == KvBlocks(kv((300, 2, 4), 2)).layout


def test_a_layer_that_is_listed_twice_because_another_one_reads_it_travels_once() -> None:
    one, other = kv((4, 2), 2)
    assert KvBlocks([one, other, one]).layout.num_layers == 2


def overlapping() -> Tensors:
    (tensor,) = kv((4, 2), 1)
    return [tensor, tensor.view(4, 2)]


REFUSED = {
    "nothing": ([], "no KV tensors of a known kind"),
    "no tensors": ([["state", "of", "a", "recurrent", "layer"]], "no KV tensors of a known kind"),
    "also something else": ([*kv((4, 2), 1), kv((4, 2), 2)], "no KV tensors of a known kind"),
    "two views of one memory": (overlapping(), "layers share KV tensors"),
    "different block sizes": (kv((4, 2), 1) + kv((4, 3), 1), "different shapes (hybrid model)"),
    "different numbers of blocks": (kv((4, 2), 1) + kv((5, 2), 1), "different shapes (hybrid model)"),
    "different types": (kv((4, 2), 1) + kv((4, 2), 1, torch.float16), "different shapes (hybrid model)"),
    "block index not first": ([t.transpose(0, 1) for t in kv((4, 3), 2)], "not stored block by block"),
    "gaps in blocks": ([t[:, :, :2] for t in kv((4, 3, 3), 2)], "not stored block by block"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_be_moved_block_by_block_is_refused_with_the_reason(case: str) -> None:
    tensors, reason = REFUSED[case]
    with pytest.raises(TransportError) as caught:
        KvBlocks(tensors)
    assert reason in str(caught.value)


# ---------------------------------------------------------------------- pace


class Clock:
    """In the place of the module ``time``: copying takes what the test says, and so does sleeping."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_a_pacer_waits_after_each_slice_until_copying_had_its_share_of_the_time(clock: Clock) -> None:
    pacer = Pacer(share=0.25, slice_bytes=10)
    for copy_s in (2.0, 4.0):
        clock.now += copy_s
        pacer(10)
    assert clock.slept == pytest.approx([6.0, 12.0])
    assert pacer.finish() == pytest.approx(6.0), "seconds spent copying, waits not counted"


def test_copies_smaller_than_a_slice_are_added_up_before_it_waits(clock: Clock) -> None:
    pacer = Pacer(share=0.5, slice_bytes=10)
    for num_bytes in (4, 5, 1, 9):
        clock.now += 1.0
        pacer(num_bytes)
    assert clock.slept == pytest.approx([3.0])
    clock.now += 0.5
    assert pacer.finish() == pytest.approx(4.5)


def test_with_the_whole_of_the_time_it_never_waits(clock: Clock) -> None:
    pacer = Pacer(share=1.0, slice_bytes=1)
    for _ in range(3):
        clock.now += 1.0
        pacer(100)
    assert clock.slept == []
    assert pacer.finish() == pytest.approx(3.0)


def test_a_pacer_that_copied_nothing_has_spent_nothing(clock: Clock) -> None:
    assert Pacer(share=0.5, slice_bytes=10).finish() == 0.0


@repeatable
@given(
    st.floats(0.01, 1.0),
    st.integers(1, 100),
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.001, 10.0)), max_size=20),
)
def test_copying_never_takes_more_than_its_share_but_for_the_slice_that_is_not_full_yet(
    share: float, slice_bytes: int, copies: list[tuple[int, float]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(module, "time", clock)
        pacer = Pacer(share, slice_bytes)
        copied, open_s = 0, 0.0
        for num_bytes, copy_s in copies:
            clock.now += copy_s
            copied, open_s = copied + num_bytes, open_s + copy_s
            pacer(num_bytes)
            if copied >= slice_bytes:
                copied, open_s = 0, 0.0
        total_s = clock.now - 100.0
        busy_s = pacer.finish()
    assert busy_s == pytest.approx(sum(copy_s for _, copy_s in copies))
    assert busy_s - open_s == pytest.approx(share * (total_s - open_s))
