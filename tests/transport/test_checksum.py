"""Checksums: no changed, missing, added or swapped byte goes unnoticed, however the bytes are cut into slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arriero.core.errors import TransportError
from arriero.transport.checksum import FIELD, Checksum

repeatable = settings(deadline=None, derandomize=True, database=None)


def checksum(*parts: bytes) -> Checksum:
    made = Checksum()
    for part in parts:
        made.add(np.frombuffer(part, dtype=np.uint8))
    return made


@repeatable
@given(st.lists(st.binary(max_size=50), max_size=8))
def test_how_the_bytes_were_cut_does_not_matter(parts: list[bytes]) -> None:
    """The exporter copies in slices of another size than the importer."""
    checksum(*parts).require({FIELD: checksum(b"".join(parts)).value})


@repeatable
@given(st.binary(max_size=200), st.binary(max_size=200))
def test_other_bytes_are_refused(sent: bytes, arrived: bytes) -> None:
    assume(sent != arrived)
    with pytest.raises(TransportError, match="arrived damaged"):
        checksum(arrived).require({FIELD: checksum(sent).value})


def test_a_ticket_without_a_checksum_is_refused() -> None:
    with pytest.raises(TransportError, match="the source's was None"):
        checksum(b"blocks").require({})


def test_tensors_of_any_shape_are_hashed_as_their_bytes() -> None:
    data = np.arange(24, dtype=np.uint8)
    shaped = Checksum()
    shaped.add(data.reshape(2, 3, 4))
    assert shaped.value == checksum(data.tobytes()).value
