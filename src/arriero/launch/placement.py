"""Which CPU cores or GPUs an instance gets."""

from __future__ import annotations

from collections.abc import Sequence

from arriero.core.errors import ConfigError


def split_cores(cores: Sequence[int], num_instances: int) -> list[frozenset[int]]:
    """Equal, disjoint shares of ``cores``; instances share single cores if there are too few."""
    cores = sorted(cores)
    if num_instances >= len(cores):
        return [frozenset({cores[i % len(cores)]}) for i in range(num_instances)]
    share = len(cores) // num_instances
    return [frozenset(cores[i * share : (i + 1) * share]) for i in range(num_instances)]


def split_devices(devices: Sequence[str], num_instances: int, world_size: int) -> list[list[str]]:
    """``world_size`` devices for each instance, in order. Raises ConfigError if they don't suffice."""
    if num_instances * world_size > len(devices):
        raise ConfigError(
            f"--instances {num_instances} with {world_size} GPU(s) each needs {num_instances * world_size} GPUs, "
            f"{len(devices)} are visible: start fewer instances or make more GPUs visible"
        )
    return [list(devices[i * world_size : (i + 1) * world_size]) for i in range(num_instances)]
