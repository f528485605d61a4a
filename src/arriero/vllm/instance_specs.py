"""How instances are launched: vLLM's configuration, cores and GPUs, from the arguments of `arriero serve`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import cloudpickle
import msgspec
import psutil
from vllm.platforms import current_platform

from arriero.core.errors import ConfigError, LaunchError
from arriero.core.restarts import Place
from arriero.core.types import InstanceId
from arriero.launch.placement import split_cores, split_devices
from arriero.launch.port import LaunchSpec
from arriero.model.dtype import computes_bfloat16
from arriero.vllm.arguments import RaisingParser, ServeOptions, parse
from arriero.vllm.compat import AsyncEngineArgs, Executor, UsageContext
from arriero.vllm.engine import EngineSpec

logger = logging.getLogger(__name__)

SHM_PREFIX = "arriero"
CPU_MEMORY_SHARE = 0.8


def engine_config(args: argparse.Namespace, options: ServeOptions) -> Any:
    """vLLM's configuration of one instance. Raises ConfigError with vLLM's reason in one line."""
    if current_platform.is_cpu() and options.engine == "vllm":
        _share_memory(args, options.num_instances)
        config = _engine_config(args)
        _warn_of_slow_numbers(config.model_config.dtype)
        return config
    if options.engine == "vllm" and options.instances_per_gpu > 1:
        _share_gpu(args, options.instances_per_gpu)
    return _engine_config(args)


def _engine_config(args: argparse.Namespace) -> Any:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    try:
        return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, OSError, KeyError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"model {args.model!r} with these options: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if len(lines) < 3 or len(lines[0]) > 60 else " ".join(lines[:3])) if lines else repr(error)


def _share_memory(args: argparse.Namespace, num_instances: int) -> None:
    """On CPU all instances share the machine's memory: give each its part unless the user chose."""
    memory = psutil.virtual_memory()
    wanted = args.kv_cache_memory_bytes
    if wanted is None:
        parser_default = AsyncEngineArgs.gpu_memory_utilization
        if args.gpu_memory_utilization == parser_default:
            args.gpu_memory_utilization = round(CPU_MEMORY_SHARE * memory.available / memory.total / num_instances, 3)
        wanted = int(args.gpu_memory_utilization * memory.total)
    if wanted * num_instances > memory.available:
        raise ConfigError(
            f"{num_instances} instances want {wanted / 2**30:.1f} GiB each, {memory.available / 2**30:.1f} GiB are "
            "available: use fewer --instances or a smaller --kv-cache-memory-bytes"
        )


def _warn_of_slow_numbers(dtype: object) -> None:
    if "bfloat16" in str(dtype) and not computes_bfloat16():
        logger.warning("this CPU has no instructions for bfloat16: --dtype float32 is several times faster here")


def _share_gpu(args: argparse.Namespace, instances_per_gpu: int) -> None:
    """What vLLM wants free on a GPU before it starts is shared like the GPU, unless the user chose."""
    if args.kv_cache_memory_bytes is None:
        raise ConfigError(
            f"--instances-per-gpu {instances_per_gpu} needs --kv-cache-memory-bytes: an instance that measures what is "
            "free on its GPU would be misled by its neighbours"
        )
    if args.gpu_memory_utilization == AsyncEngineArgs.gpu_memory_utilization:
        args.gpu_memory_utilization = round(args.gpu_memory_utilization / instances_per_gpu, 3)


class InstanceSpecs:
    """Makes the launch specification of each instance."""

    def __init__(
        self, vllm_config: Any, args: argparse.Namespace, options: ServeOptions, addresses: tuple[str, str]
    ) -> None:
        self._config = cloudpickle.dumps(vllm_config)
        self._args = args
        self._options = options
        self._addresses = addresses
        self._world_size = vllm_config.parallel_config.world_size
        self._executor_class = Executor.get_class(vllm_config)
        self._max_model_len = vllm_config.model_config.max_model_len
        self._by_priority = vllm_config.scheduler_config.policy == "priority"
        self._max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._shm_prefix = f"{SHM_PREFIX}-{os.getpid()}"
        self._cores = self._devices = None
        if options.engine == "vllm" and current_platform.is_cpu():
            if options.pin_cores:
                self._cores = split_cores(sorted(os.sched_getaffinity(0)), options.num_instances)
        elif options.engine == "vllm" and current_platform.is_cuda_alike():
            devices, sharing = _visible_devices(), options.instances_per_gpu
            split_devices(devices, options.num_instances, self._world_size, sharing)  # raises if they don't suffice
            places = len(devices) // self._world_size * sharing
            self._devices = split_devices(devices, places, self._world_size, sharing)

    def __call__(self, instance: InstanceId, place: Place) -> LaunchSpec:
        """The specification of ``instance``, which is to run at ``place``. Raises LaunchError if that has no device."""
        if self._options.engine == "sim":
            return LaunchSpec(module="arriero.sim.process", payload=self._sim_payload(instance))
        env = {}
        if self._devices is not None:
            if place >= len(self._devices):
                raise LaunchError(f"instance {instance}: all {len(self._devices)} groups of GPUs are in use")
            env[current_platform.device_control_env_var] = ",".join(self._devices[place])
        return LaunchSpec(
            module="arriero.vllm.engine",
            payload=self._vllm_payload(instance),
            env=env,
            cores=self._cores[place % len(self._cores)] if self._cores is not None else None,
        )

    def _vllm_payload(self, instance: InstanceId) -> bytes:
        options = self._options
        spec = EngineSpec(
            instance=instance,
            vllm_config=cloudpickle.loads(self._config),
            executor_class=self._executor_class,
            log_stats=not self._args.disable_log_stats,
            input_address=self._addresses[0],
            output_address=self._addresses[1],
            migration=options.migration,
            copy=options.copy,
            step=options.step,
            preemption=options.scheduler.preemption,
            snapshot_interval_s=options.scheduler.snapshot_interval_s,
            shm_prefix=f"{self._shm_prefix}-i{instance}",
        )
        return bytes(cloudpickle.dumps(spec))

    def _sim_payload(self, instance: InstanceId) -> bytes:
        options = self._options
        payload = {
            "instance": instance,
            "input_address": self._addresses[0],
            "output_address": self._addresses[1],
            "engine": {
                "max_model_len": self._max_model_len,
                "max_num_seqs": self._max_num_seqs,
                "vocab_size": self._vocab_size,
                "priority_scheduling": self._by_priority,
                "itl_target_s": options.step.itl_target_s,
                "preemption": options.scheduler.preemption,
            },
            "migration": options.migration,
            "copy": options.copy,
            "snapshot_interval_s": options.scheduler.snapshot_interval_s,
            "transport": {"kind": "shm", "prefix": f"{self._shm_prefix}-i{instance}"},
        }
        return msgspec.json.encode(payload)


def respec(
    argv: Sequence[str], flags: Sequence[str], running: argparse.Namespace, addresses: tuple[str, str]
) -> InstanceSpecs:
    """Specifications of instances that are started with ``flags`` added to the server's own.

    Raises ConfigError for what is not an instance's to choose, or is wrong.
    """
    args, options = parse([*argv, *flags], parser=RaisingParser)
    args.gpu_memory_utilization = _unless_changed(args, running, "gpu_memory_utilization")
    changed = {name for name, value in vars(args).items() if value != getattr(running, name, None)}
    refused = sorted(changed - {field.name for field in fields(AsyncEngineArgs)} | changed & FRONT_ENDS)
    if refused:
        names = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise ConfigError(f"{names}: the front end depends on it too; restart the server to change it")
    return InstanceSpecs(_engine_config(args), args, options, addresses)


FRONT_ENDS = frozenset(
    {"model", "tokenizer", "tokenizer_mode", "tokenizer_revision", "served_model_name", "max_model_len", "revision"}
)
"""Arguments of vLLM's engine that its front end has built upon."""


def _unless_changed(args: argparse.Namespace, running: argparse.Namespace, name: str) -> Any:
    default = getattr(AsyncEngineArgs, name)
    return getattr(running, name) if getattr(args, name) == default else getattr(args, name)


def _visible_devices() -> list[str]:
    visible = os.environ.get(current_platform.device_control_env_var)
    if visible:
        return [d for d in visible.split(",") if d]
    return [str(i) for i in range(current_platform.device_count())]
