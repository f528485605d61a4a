"""The event loop."""

from __future__ import annotations

import pytest

from arriero.sim.kernel import Kernel


def test_events_run_by_time_then_order_then_age() -> None:
    kernel, seen = Kernel(), []
    for name, time_s, order in (("d", 2.0, 0), ("c", 1.0, 1), ("a", 1.0, 0), ("b", 1.0, 0), ("e", 3.0, -1)):
        kernel.at(time_s, lambda name=name: seen.append((name, kernel.now)), order)  # type: ignore[misc]
    kernel.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 2.0), ("e", 3.0)]


def test_events_may_make_events_even_for_now() -> None:
    kernel, seen = Kernel(), []

    def tick() -> None:
        seen.append(kernel.now)
        if len(seen) < 4:
            kernel.at(kernel.now + (len(seen) % 2) * 0.5, tick)

    kernel.at(1.0, tick)
    kernel.run()
    assert seen == [1.0, 1.5, 1.5, 2.0]


@pytest.mark.parametrize("time_s", [0.99, -1.0, float("nan")])
def test_the_past_cannot_be_changed(time_s: float) -> None:
    kernel = Kernel()
    kernel.at(1.0, lambda: kernel.at(time_s, lambda: None))
    with pytest.raises(ValueError, match=r"it is 1\.0 s already"):
        kernel.run()
