"""Change bits in shared memory, where KV blocks are staged on their way."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path

from arriero.transport.shm import HEADER_BYTES, SHM

_STAGED_FROM_THE_FRONT = 4096
"""Bytes of a segment that some blocks lie in, if any do."""


def flip_bit(segment: Path, num_bytes: int, rng: random.Random) -> bool:
    """Change one bit among the first ``num_bytes`` of the blocks in ``segment``. False: it holds none."""
    with segment.open("r+b") as file:
        if int.from_bytes(file.read(8), "little") == 0:
            return False  # idle
        file.seek(HEADER_BYTES + rng.randrange(num_bytes))
        byte = file.read(1)
        if not byte:
            return False
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ (1 << rng.randrange(8))]))
    return True


def flip_staged(pids: Sequence[int], rng: random.Random) -> int:
    """Change a bit in each segment that processes ``pids`` have staged blocks in; how many."""
    num_flipped = 0
    for path in [p for pid in pids for p in SHM.glob(f"arriero-*-{pid}-*")]:
        with contextlib.suppress(OSError):
            num_flipped += flip_bit(path, _STAGED_FROM_THE_FRONT, rng)
    return num_flipped
