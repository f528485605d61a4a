"""KV blocks of one worker as bytes: gather into staging memory, scatter out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arriero.core.errors import TransportError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """What two workers must agree on before blocks may travel between them."""

    num_layers: int  #: distinct KV tensors
    block_bytes: int  #: bytes of one block in one of them
    dtype: str
    shape: tuple[int, ...]  #: of one block

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_bytes


class KvBlocks:
    """The worker's KV tensors, block index first, as byte matrices ``[num_blocks, block_bytes]``."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises TransportError if the layout can't be moved block by block."""
        distinct = list({t.data_ptr(): t for t in tensors if isinstance(t, torch.Tensor)}.values())
        if not distinct:
            raise TransportError("the model has no KV tensors of a known kind")
        if len(distinct) != len({id(t) for t in tensors}):
            raise TransportError("layers share KV tensors")
        first = distinct[0]
        if any(t.shape != first.shape or t.dtype != first.dtype for t in distinct):
            raise TransportError("layers have KV tensors of different shapes (hybrid model)")
        if not all(t.is_contiguous() for t in distinct):
            raise TransportError("KV tensors are not stored block by block")
        self._bytes = [t.view(torch.uint8).view(t.shape[0], -1) for t in distinct]
        self.layout = BlockLayout(
            num_layers=len(distinct),
            block_bytes=self._bytes[0].shape[1],
            dtype=str(first.dtype),
            shape=tuple(first.shape[1:]),
        )
        self._on_device = first.device.type != "cpu"
        self._stream = torch.cuda.Stream(first.device) if first.device.type == "cuda" else None

    def gather(self, block_ids: Sequence[int], stage: memoryview, pause: Callable[[int], None]) -> None:
        """Copy blocks into ``stage``, laid out ``[layer][block][byte]``; ``pause(num_bytes)`` after each slice."""
        index = torch.tensor(block_ids, dtype=torch.int64)
        self._each(index, stage, pause, self._gather_slice)

    def scatter(self, block_ids: Sequence[int], stage: memoryview, pause: Callable[[int], None]) -> None:
        """The way back."""
        index = torch.tensor(block_ids, dtype=torch.int64)
        self._each(index, stage, pause, self._scatter_slice)

    def _each(self, index: torch.Tensor, stage: memoryview, pause: Callable[[int], None], copy: Any) -> None:
        size = len(index) * self.layout.block_bytes
        staged = torch.frombuffer(stage, dtype=torch.uint8)
        if staged.numel() < size * len(self._bytes):
            raise TransportError(f"staging memory holds {staged.numel()} bytes, {size * len(self._bytes)} are needed")
        for layer, blocks in enumerate(self._bytes):
            part = staged[layer * size : (layer + 1) * size].view(len(index), -1)
            copy(blocks, index, part)
            pause(size)
        if self._stream is not None:
            self._stream.synchronize()

    def _gather_slice(self, blocks: torch.Tensor, index: torch.Tensor, part: torch.Tensor) -> None:
        if not self._on_device:
            torch.index_select(blocks, 0, index, out=part)
        elif self._stream is None:
            part.copy_(blocks.index_select(0, index.to(blocks.device)))
        else:
            with torch.cuda.stream(self._stream):
                part.copy_(blocks.index_select(0, index.to(blocks.device)))

    def _scatter_slice(self, blocks: torch.Tensor, index: torch.Tensor, part: torch.Tensor) -> None:
        if not self._on_device:
            blocks.index_copy_(0, index, part)
        elif self._stream is None:
            blocks.index_copy_(0, index.to(blocks.device), part.to(blocks.device))
        else:
            with torch.cuda.stream(self._stream):
                blocks.index_copy_(0, index.to(blocks.device), part.to(blocks.device))


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
