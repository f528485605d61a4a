"""The network of the simulator: messages take a latency, copies share what an instance can copy.

    message:  latency_s
    copy:     setup_s + num_bytes / rate;  rate = nominal / max over its endpoints of the copies that run there
    decode:   every step of an instance takes (1 + decode_slow_down) times as long while a copy runs there

The nominal rate is ``bytes_per_s`` between two instances and ``staging_bytes_per_s`` into the source's own staging
memory. The defaults are those of Llumnix (OSDI'24): its figure 10 has 0.211 ms a token of 512 KiB, hence 2.3 GiB/s,
and steps that are 1 to 3 % slower during a migration; its artifact stages at 15 GB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from arriero.core.errors import ConfigError
from arriero.core.types import InstanceId
from arriero.sim.kernel import Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Figures of the network; see the module for the formulas."""

    latency_s: float = 0.0005
    setup_s: float = 0.001
    bytes_per_s: float = 2.3 * 2**30
    staging_bytes_per_s: float = 15e9
    decode_slow_down: float = 0.02

    def __post_init__(self) -> None:
        for name in ("latency_s", "setup_s", "decode_slow_down"):
            if getattr(self, name) < 0:
                raise ConfigError(f"network: {name}={getattr(self, name)!r} is invalid: it must be 0 or more")
        for name in ("bytes_per_s", "staging_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"network: {name}={getattr(self, name)!r} is invalid: it must be more than 0")


@dataclass(slots=True, eq=False)
class _Copy:
    endpoints: tuple[InstanceId, ...]
    nominal: float  #: bytes a second, alone
    started_s: float
    bytes_left: float
    done: Callable[[float], None]
    rate: float = 0.0
    version: int = 0


class Network:
    """Copies in flight. ``on_change(instance)`` is told when the first copy starts there or the last one ends."""

    def __init__(self, config: NetworkConfig, kernel: Kernel, on_change: Callable[[InstanceId], None]) -> None:
        self.config = config
        self._kernel = kernel
        self._on_change = on_change
        self._copies: list[_Copy] = []
        self._num_at: dict[InstanceId, int] = {}
        self._updated_s = 0.0

    def slow_down(self, instance: InstanceId) -> float:
        """Factor on the time of a step that begins now."""
        return 1 + self.config.decode_slow_down if self._num_at.get(instance) else 1.0

    def alone_s(self, num_bytes: int, nominal: float) -> float:
        """Seconds of a copy that shares with nobody."""
        return self.config.setup_s + num_bytes / nominal

    def copy(
        self, num_bytes: int, nominal: float, endpoints: tuple[InstanceId, ...], done: Callable[[float], None]
    ) -> None:
        """Begin a copy; ``done`` is called at its end with the seconds that it took. It counts from its set-up on."""
        now = self._kernel.now
        # The set-up is paid as the bytes that would pass meanwhile: one formula for sharing it, too.
        copy = _Copy(endpoints, nominal, now, num_bytes + self.config.setup_s * nominal, done)
        self._progress()
        self._copies.append(copy)
        self._count(copy, 1)
        self._share()

    def _count(self, copy: _Copy, change: int) -> None:
        for instance in copy.endpoints:
            before = self._num_at.get(instance, 0)
            self._num_at[instance] = before + change
            if not before or not before + change:
                self._on_change(instance)

    def _progress(self) -> None:
        now = self._kernel.now
        for copy in self._copies:
            copy.bytes_left -= copy.rate * (now - self._updated_s)
        self._updated_s = now

    def _share(self) -> None:
        """New rates for all, and new ends for those whose rate changed."""
        for copy in self._copies:
            rate = copy.nominal / max(self._num_at[i] for i in copy.endpoints)
            if rate != copy.rate:
                copy.rate, copy.version = rate, copy.version + 1
                end_s = self._kernel.now + max(0.0, copy.bytes_left) / rate
                self._kernel.at(end_s, partial(self._end, copy, copy.version))

    def _end(self, copy: _Copy, version: int) -> None:
        if copy.version != version:
            return
        self._progress()
        self._copies.remove(copy)
        self._count(copy, -1)
        self._share()
        copy.done(self._kernel.now - copy.started_s)
