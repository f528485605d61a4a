"""What the simulator tells the scheduler of the future, where the policy is to know it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arriero.sim.kernel import Kernel
from arriero.workload.workload import Arrival


def foretell(kernel: Kernel, arrivals: Sequence[Arrival], horizon_s: float, tell: Callable[[int], None]) -> None:
    """Call ``tell`` with the number of each arrival ``horizon_s`` before it, or at once if that is past; 0: never."""
    number = 0

    def go_on() -> None:
        nonlocal number
        while number < len(arrivals):
            tell_s = arrivals[number].arrival_s - horizon_s
            if tell_s > kernel.now:
                kernel.at(tell_s, go_on)
                return
            number += 1
            tell(number - 1)

    if horizon_s:
        go_on()
