"""What instances that share a GPU ask of it."""

from __future__ import annotations

import pickle

import pytest

pytest.importorskip("vllm")

from arriero.core.config import PreemptionConfig
from arriero.core.errors import ConfigError
from arriero.model.bundled import ensure_bundled_model
from arriero.sim.spec import SimSpec
from arriero.vllm import instance_specs
from arriero.vllm.arguments import parse


class NoCpu:
    """A platform of GPUs."""

    @staticmethod
    def is_cpu() -> bool:
        return False


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_specs, "current_platform", NoCpu())
    monkeypatch.setattr(instance_specs, "_engine_config", lambda args: args.gpu_memory_utilization)


@pytest.mark.parametrize(
    ("flags", "utilization"),
    [
        ("", 0.92),
        ("--kv-cache-memory-bytes 1000000", 0.92),
        ("--kv-cache-memory-bytes 1000000 --instances-per-gpu 2", 0.46),
        ("--kv-cache-memory-bytes 1000000 --instances-per-gpu 2 --gpu-memory-utilization 0.1", 0.1),
    ],
)
def test_instances_on_one_gpu_want_their_part_of_it_free(flags: str, utilization: float) -> None:
    args, options = parse(["model", *flags.split()])
    assert instance_specs.engine_config(args, options) == utilization


def test_instances_on_one_gpu_can_not_measure_what_is_free() -> None:
    args, options = parse(["model", "--instances-per-gpu", "2"])
    with pytest.raises(ConfigError, match="--instances-per-gpu 2 needs --kv-cache-memory-bytes"):
        instance_specs.engine_config(args, options)


@pytest.mark.parametrize(("policy", "rules"), [("arriero", PreemptionConfig()), ("llumnix", None)])
@pytest.mark.parametrize("engine", ["vllm", "sim"])
def test_instances_preempt_by_the_rules_of_the_policy(
    policy: str, rules: PreemptionConfig | None, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    flags = ["--policy", policy, "--engine", engine, "--max-model-len", "512", "--no-pin"]
    args, options = parse([str(ensure_bundled_model()), *flags])
    config = instance_specs.engine_config(args, options)
    payload = instance_specs.InstanceSpecs(config, args, options, ("ipc://in", "ipc://out"))(0, 0).payload
    told = SimSpec.from_json(payload).engine if engine == "sim" else pickle.loads(payload)
    assert told.preemption == rules
