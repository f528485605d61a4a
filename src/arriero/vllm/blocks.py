"""KV blocks of one worker as bytes: gather into staging memory, scatter out of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from arriero.core.errors import TransportError
from arriero.transport.checksum import Checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """What two workers must agree on before blocks may travel between them."""

    num_layers: int  #: distinct KV tensors
    block_bytes: int  #: bytes of one block in one of them
    dtype: str
    shape: tuple[int, ...]  #: of one block, as it lies in memory
    axes: tuple[int, ...] = ()  #: the axes of vLLM's view, from 1, in that order

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_bytes


class KvBlocks:
    """The worker's KV tensors, block index first, as byte matrices ``[num_blocks, block_bytes]``.

    vLLM's views name the axes ``[block, head, token, content]`` whatever their order in memory, and blocks of other
    layers may lie between those of one: only the bytes of one block of one layer have to lie together.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_blocks: int | None = None) -> None:
        """``num_blocks``: of vLLM's block pool, where an attention kernel may divide each into several rows.

        Raises TransportError if the layout can't be moved block by block.
        """
        if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
            raise TransportError("the model has no KV tensors of a known kind, or has other state beside them")
        distinct = list({t.data_ptr(): t for t in tensors}.values())
        if len(distinct) != len({id(t) for t in tensors}):
            raise TransportError("layers share KV tensors")
        first = distinct[0]
        if any(t.shape != first.shape or t.dtype != first.dtype for t in distinct):
            raise TransportError("layers have KV tensors of different shapes (hybrid model)")
        axes = _axes_in_memory(first)
        rows = [_rows(t, axes, num_blocks or len(t)) for t in distinct]
        self.layout = BlockLayout(
            num_layers=len(distinct),
            block_bytes=rows[0].shape[1],
            dtype=str(first.dtype),
            shape=tuple(first.shape[axis] for axis in axes),
            axes=axes,
        )
        self._num_blocks = len(rows[0])
        self._layers: Sequence[_HostLayer | _DeviceLayer]
        if first.device.type == "cpu":
            self._layers = [_HostLayer(row.numpy()) for row in rows]
        else:
            self._layers = [_DeviceLayer(row) for row in rows]

    def gather(self, block_ids: Sequence[int], stage: memoryview, pause: Callable[[int], None]) -> Checksum:
        """Copy blocks into ``stage``, laid out ``[layer][block][byte]``; ``pause(num_bytes)`` after each layer."""
        index, checksum = np.asarray(block_ids, dtype=np.int64), Checksum()
        for layer, part in zip(self._layers, self._parts(index, stage), strict=True):
            layer.gather(index, part)
            checksum.add(part)
            pause(part.nbytes)
        return checksum

    def scatter(self, block_ids: Sequence[int], stage: memoryview, pause: Callable[[int], None]) -> Checksum:
        """The way back. What it returns tells whether the blocks may be used."""
        index, checksum = np.asarray(block_ids, dtype=np.int64), Checksum()
        for layer, part in zip(self._layers, self._parts(index, stage), strict=True):
            checksum.add(part)
            layer.scatter(index, part)
            pause(part.nbytes)
        return checksum

    def _parts(self, index: NDArray[np.int64], stage: memoryview) -> NDArray[np.uint8]:
        shape = (len(self._layers), len(index), self.layout.block_bytes)
        need = math.prod(shape)
        if stage.nbytes < need:
            raise TransportError(f"staging memory holds {stage.nbytes} bytes, {need} are needed")
        if len(index) and not 0 <= index.min() <= index.max() < self._num_blocks:
            raise TransportError(f"blocks {index.min()}..{index.max()} are named, there are {self._num_blocks} blocks")
        return np.ndarray(shape, dtype=np.uint8, buffer=stage)


def _axes_in_memory(tensor: torch.Tensor) -> tuple[int, ...]:
    """All but the first, the one with the longest strides first."""
    return tuple(sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True))


def _rows(tensor: torch.Tensor, axes: tuple[int, ...], num_blocks: int) -> torch.Tensor:
    """The same memory as ``[num_blocks, block_bytes]``; rows need not follow each other closely."""
    blocks = tensor.permute(0, *axes)
    size = math.prod(blocks.shape[1:])
    dense = blocks.stride(0) == size
    if not blocks[:1].is_contiguous() or blocks.stride(0) < size:
        raise TransportError(
            "KV tensors are not stored block by block: set VLLM_KV_CACHE_LAYOUT to a layout that does, as NHD or HND"
        )
    if len(blocks) % num_blocks or (len(blocks) > num_blocks and not dense):
        raise TransportError(f"KV tensors have {len(blocks)} rows for {num_blocks} blocks")
    rows = blocks.as_strided((len(blocks), size), (blocks.stride(0), 1)).view(torch.uint8)
    return rows.view(num_blocks, -1) if dense else rows


class _HostLayer:
    """KV rows in memory. NumPy moves rows at memory speed; torch's ``index_copy_`` takes 30 times as long."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self._rows = rows

    def gather(self, index: NDArray[np.int64], part: NDArray[np.uint8]) -> None:
        np.take(self._rows, index, axis=0, out=part, mode="clip")

    def scatter(self, index: NDArray[np.int64], part: NDArray[np.uint8]) -> None:
        self._rows[index] = part


class _DeviceLayer:
    """KV rows on an accelerator, copied on a stream of their own beside the model's."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._stream = torch.cuda.Stream(rows.device) if rows.device.type == "cuda" else None

    def gather(self, index: NDArray[np.int64], part: NDArray[np.uint8]) -> None:
        with self._beside():
            torch.from_numpy(part).copy_(self._rows.index_select(0, self._on_device(index)))

    def scatter(self, index: NDArray[np.int64], part: NDArray[np.uint8]) -> None:
        with self._beside():
            self._rows.index_copy_(0, self._on_device(index), torch.from_numpy(part).to(self._rows.device))

    def _on_device(self, index: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(index).to(self._rows.device)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


class Pacer:
    """Keeps copying to a share of the time, so that requests that decode on the same core go on.

    ``share`` 1.0: never waits.
    """

    def __init__(self, share: float, slice_bytes: int) -> None:
        self._share = share
        self._slice_bytes = slice_bytes
        self._since = time.perf_counter()
        self._copied = 0
        self.busy_s = 0.0

    def __call__(self, num_bytes: int) -> None:
        """``num_bytes`` were copied."""
        self._copied += num_bytes
        if self._copied < self._slice_bytes:
            return
        self._count()
        if self._share < 1.0:
            time.sleep(self._last * (1.0 / self._share - 1.0))
        self._copied, self._since = 0, time.perf_counter()

    def finish(self) -> float:
        """Seconds spent copying, waits not counted."""
        self._count()
        return self.busy_s

    def _count(self) -> None:
        self._last = time.perf_counter() - self._since
        self.busy_s += self._last
        self._since = time.perf_counter()
