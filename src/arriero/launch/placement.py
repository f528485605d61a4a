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


def split_devices(
    devices: Sequence[str], num_instances: int, world_size: int, instances_per_device: int = 1
) -> list[list[str]]:
    """``world_size`` devices for each instance, in order; a second instance on a device when all have a first.

    Raises ConfigError if they don't suffice.
    """
    groups = [list(devices[i : i + world_size]) for i in range(0, len(devices) - world_size + 1, world_size)]
    if num_instances > len(groups) * instances_per_device:
        need = -(-num_instances // instances_per_device) * world_size
        shared = f", {instances_per_device} on a GPU," if instances_per_device > 1 else ""
        raise ConfigError(
            f"--instances {num_instances} with {world_size} GPU(s) each{shared} needs {need} GPUs, "
            f"{len(devices)} are visible: start fewer instances, make more GPUs visible, or let instances share them "
            "(--instances-per-gpu)"
        )
    return [groups[i % len(groups)] for i in range(num_instances)]
