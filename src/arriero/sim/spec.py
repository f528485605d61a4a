"""What the process of a simulated instance is told at its start, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from arriero.core.config import CopyConfig, MigrationConfig
from arriero.core.errors import ConfigError
from arriero.core.types import InstanceId
from arriero.sim.config import SimEngineConfig, from_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSpec:
    """All that a simulated instance is told at its start.

    In JSON, ``engine``, ``migration`` and ``copy`` are objects with the fields of their classes (all may be
    left out), and ``transport`` is ``{"kind": "shm", "prefix": ...}``.
    """

    instance: InstanceId
    input_address: str
    output_address: str
    engine: SimEngineConfig
    migration: MigrationConfig
    copy: CopyConfig
    snapshot_interval_s: float
    shm_prefix: str

    def __post_init__(self) -> None:
        if not self.engine.with_contents:
            raise ConfigError("with_contents=False is for the simulator: an instance needs blocks that can be copied")
        if self.engine.prefix_caching:
            raise ConfigError(
                "prefix_caching=True is for the simulator: the engine of an instance computes every prompt"
            )

    @classmethod
    def from_json(cls, data: bytes) -> SimSpec:
        """Raises ConfigError, naming what is missing or wrong."""
        try:
            values: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            transport = values.pop("transport", {"kind": "shm"})
            if transport.get("kind") != "shm":
                raise ConfigError(f"transport {transport!r} is unknown: use {{'kind': 'shm', 'prefix': ...}}")
            return cls(
                instance=int(values.pop("instance")),
                input_address=values.pop("input_address"),
                output_address=values.pop("output_address"),
                engine=SimEngineConfig.from_dict(values.pop("engine", {})),
                migration=from_dict(MigrationConfig, values.pop("migration", {}), "migration"),
                copy=from_dict(CopyConfig, values.pop("copy", {}), "copy"),
                snapshot_interval_s=float(values.pop("snapshot_interval_s", 0.02)),
                shm_prefix=transport.get("prefix", "arriero-sim"),
                **values,
            )
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the spec of the instance cannot be used: {error}") from error
