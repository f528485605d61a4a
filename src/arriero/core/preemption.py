"""Who gives way when an instance's KV memory has run out, and who of those that wait goes on first.

vLLM preempts the request that was admitted last (of the least urgent, the one that came last), computes it anew as soon
as its tokens fit, and lets all others wait behind it. Here the one gives way that costs least to compute anew; it goes
on only where the running requests keep room to grow, since otherwise one of them is preempted next; and a small one
whose stream stands still does not wait for a large one to fit (backfilling; Lifka, 1995).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from arriero.core.config import PreemptionConfig

T = TypeVar("T")


class Standing(NamedTuple):
    """What the rules look at. ``priority``: vLLM's sign, lower number sooner."""

    priority: int
    num_tokens: int  #: prompt and output: what is computed anew after a preemption
    num_output: int
    num_preemptions: int  #: at this instance

    @property
    def has_begun(self) -> bool:
        """Whether it had a place here already, or its stream has begun and stands still."""
        return self.num_preemptions > 0 or self.num_output > 0


class Preemption:
    """The rules, for any kind of request: ``of`` tells how one stands."""

    def __init__(self, config: PreemptionConfig) -> None:
        self._config = config

    def victim(self, running: Sequence[T], of: Callable[[T], Standing]) -> T:
        """Of the least urgent the smallest, and of those the last. ``running``: one or more, by admission."""

        def cost(request: T) -> tuple[int, int]:
            standing = of(request)
            return -standing.priority, standing.num_tokens

        return min(reversed(running), key=cost)

    def line(self, waiting: Sequence[T], of: Callable[[T], Standing]) -> Iterator[T]:
        """Of those that wait, in their order, who may start next if it fits: the first, and each that has begun and is
        no less urgent.
        """
        for number, request in enumerate(waiting):
            standing = of(request)
            if not number:
                most = standing.priority
            elif standing.priority > most or not standing.has_begun:
                continue
            yield request

    def reserve_blocks(self, standing: Standing, num_running: int) -> int:
        """KV blocks that must be left free where a request starts beside ``num_running`` others."""
        return int(self._config.restart_blocks_per_running * num_running) if standing.has_begun else 0
