"""What the checksum of KV blocks costs beside their copy: `results/checksum.json`.

Blocks of SmolLM2-135M's layout are gathered and scattered in one thread, as `vllm/blocks.py` does on a CPU: with no
checksum, with ours and with zlib's CRC-32, in turn; CPU time of the thread. A share is the extra over the copy alone,
both medians of one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.bench import report
from arriero.bench.report import Target
from arriero.transport.checksum import Checksum

NUM_LAYERS, BLOCK_BYTES, NUM_BLOCKS = 30, 24_576, 400
MAX_SHARE = 0.5
MAX_REST_MS = 0.1
REST_BLOCKS = 2
"""What is copied in the pause of a live move."""


Bytes = NDArray[np.uint8]


class _Nothing:
    def add(self, part: Any) -> None: ...


class _Crc32:
    def __init__(self) -> None:
        self.value = 0

    def add(self, part: Any) -> None:
        self.value = zlib.crc32(part.data, self.value)


KINDS: dict[str, type[Any]] = {"none": _Nothing, "xxh3_64": Checksum, "crc32": _Crc32}


@dataclass(frozen=True, slots=True)
class Sample:
    """One copy."""

    num_blocks: int
    operation: str
    kind: str
    cpu_ms: float


def measure(sizes: Sequence[int], rounds: int) -> list[Sample]:
    """All kinds in turn in every round."""
    random, samples = np.random.default_rng(0), []
    layers = [random.integers(0, 255, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8) for _ in range(NUM_LAYERS)]
    for num_blocks in sizes:
        index = random.permutation(NUM_BLOCKS)[:num_blocks]
        stage = np.zeros((NUM_LAYERS, num_blocks, BLOCK_BYTES), dtype=np.uint8)
        for _ in range(rounds):
            for kind, checksum in KINDS.items():
                for operation in (_gather, _scatter):
                    started = time.thread_time()
                    operation(layers, index, stage, checksum())
                    took_ms = 1e3 * (time.thread_time() - started)
                    samples.append(Sample(num_blocks, operation.__name__.strip("_"), kind, took_ms))
    return samples


def _gather(layers: Sequence[Bytes], index: Any, stage: Bytes, checksum: Any) -> None:
    for layer, part in zip(layers, stage, strict=True):
        np.take(layer, index, axis=0, out=part, mode="clip")
        checksum.add(part)


def _scatter(layers: Sequence[Bytes], index: Any, stage: Bytes, checksum: Any) -> None:
    for layer, part in zip(layers, stage, strict=True):
        checksum.add(part)
        layer[index] = part


def summarise(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Medians, a row a size and operation."""
    rows = []
    for num_blocks, operation in sorted({(s.num_blocks, s.operation) for s in samples}):
        median = {
            kind: statistics.median(
                s.cpu_ms for s in samples if (s.num_blocks, s.operation, s.kind) == (num_blocks, operation, kind)
            )
            for kind in KINDS
        }
        rows.append(
            {
                "blocks": num_blocks,
                "KiB": num_blocks * NUM_LAYERS * BLOCK_BYTES >> 10,
                "operation": operation,
                "copy_ms": median["none"],
                "xxh3_64_share": median["xxh3_64"] / median["none"] - 1,
                "crc32_share": median["crc32"] / median["none"] - 1,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 0 whether the targets are met or not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[REST_BLOCKS, 8, 43], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=101, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    samples = measure(args.blocks, args.rounds)
    summary = summarise(samples)
    worst = max(row["xxh3_64_share"] for row in summary)
    rest = sum(row["copy_ms"] * row["xxh3_64_share"] for row in summary if row["blocks"] == min(args.blocks))
    targets = [
        Target.at_most("share of a copy's CPU time that its checksum adds", worst, MAX_SHARE),
        Target.at_most(f"added to a pause with {min(args.blocks)} blocks, both sides", rest, MAX_REST_MS, "ms"),
    ]
    report.write("checksum", samples, targets, summary=summary)
    report.print_table("Checksums of KV blocks", summary, targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
