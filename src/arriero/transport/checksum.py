"""Checksums of exported KV blocks, from the exporter's cache to the importer's.

XXH3-64 runs at memory speed (cyan4973's xxHash; CRC-32 would take as long as the copy itself). It is taken slice by
slice right after a slice was copied, while it is in the processor's cache. It finds what memory, a transport or
another process has broken; it is no defence against somebody who may write into our memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xxhash
from numpy.typing import NDArray

from arriero.core.errors import TransportError

FIELD = "checksum"
"""Where a ticket carries it."""


class Checksum:
    """Of bytes that come in slices, in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, part: NDArray[Any]) -> None:
        """The next slice; C-contiguous."""
        self._hash.update(part.data)

    @property
    def value(self) -> int:
        """64 bits, without sign."""
        return self._hash.intdigest()

    def require(self, ticket: Mapping[str, Any]) -> None:
        """Raise TransportError unless the bytes are those that the exporter of ``ticket`` had."""
        expected = ticket.get(FIELD)
        if expected != self.value:
            raise TransportError(
                f"the KV blocks arrived damaged: their checksum is {self.value:#x}, "
                f"the source's was {expected if not isinstance(expected, int) else hex(expected)}"
            )
