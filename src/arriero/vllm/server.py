"""`arriero serve`: vLLM's OpenAI app over a cluster of instances."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import psutil
import uvloop
from starlette.middleware import Middleware
from vllm.platforms import current_platform

from arriero.core.config import HttpConfig
from arriero.core.errors import ConfigError, LaunchError
from arriero.core.restarts import Place
from arriero.core.types import InstanceId
from arriero.dashboard.app import attach_dashboard
from arriero.frontend.admin import attach_admin
from arriero.frontend.cluster import Cluster
from arriero.frontend.links import InstanceLinks
from arriero.frontend.placements import Placements
from arriero.frontend.reconnect import Reconnect, attach_reconnect
from arriero.frontend.request_ids import RequestIds
from arriero.frontend.resumable import ResumableStreams
from arriero.launch.leftovers import reclaim_folders, run_folder
from arriero.launch.local import LocalLauncher
from arriero.launch.memory import holds_one_more
from arriero.launch.placement import split_cores, split_devices
from arriero.launch.port import LaunchSpec
from arriero.observe.events import EventLog
from arriero.observe.metrics import default_metrics
from arriero.transport.shm import sweep
from arriero.vllm import compat
from arriero.vllm.arguments import RaisingParser, ServeOptions, parse
from arriero.vllm.client import SHUTDOWN_GRACE_S, ClusterClient
from arriero.vllm.codec import VllmCodec
from arriero.vllm.compat import (
    AsyncEngineArgs,
    AsyncLLM,
    EngineCoreClient,
    Executor,
    UsageContext,
    build_app,
    cli_env_setup,
    configure_logging_from_args,
    get_uvicorn_log_config,
    init_app_state,
    serve_http,
    setup_server,
)
from arriero.vllm.engine import EngineSpec
from vllm import envs

SHM_PREFIX = "arriero"
CPU_MEMORY_SHARE = 0.8


def main(argv: list[str]) -> int:
    """Run the server; the exit code: 0 stopped by the user, 2 bad arguments or surroundings."""
    try:
        compat.self_check()
        cli_env_setup()
        args, options = parse(argv)
        configure_logging_from_args(args)
        return uvloop.run(_serve(args, options, argv))
    except (ConfigError, LaunchError) as error:
        sys.stderr.write(f"arriero serve: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


# ---------------------------------------------------------------------- set-up


def engine_config(args: argparse.Namespace, options: ServeOptions) -> Any:
    """vLLM's configuration of one instance. Raises ConfigError with vLLM's reason in one line."""
    if current_platform.is_cpu() and options.engine == "vllm":
        _share_memory(args, options.num_instances)
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
            devices = _visible_devices()
            split_devices(devices, options.num_instances, self._world_size)  # raises ConfigError if they don't suffice
            self._devices = split_devices(devices, len(devices) // self._world_size, self._world_size)

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


def _surge(cluster: Cluster) -> int:
    """How many instances may start beside those that run: GPUs have no room for two."""
    if current_platform.is_cuda_alike():
        return 0
    return int(holds_one_more(i.pid for i in cluster.instances if i.serves))


def _visible_devices() -> list[str]:
    visible = os.environ.get(current_platform.device_control_env_var)
    if visible:
        return [d for d in visible.split(",") if d]
    return [str(i) for i in range(current_platform.device_count())]


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    folder = run_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def running_cluster(
    args: argparse.Namespace, options: ServeOptions, vllm_config: Any, argv: Sequence[str]
) -> AsyncIterator[Cluster]:
    """Instances started and ready; all ended at exit, whatever happens. Raises LaunchError.

    ``argv``: what ``args`` and ``options`` were parsed from; a rolling restart may add flags to them.
    """
    for name in sweep(SHM_PREFIX):
        _say(f"reclaimed shared memory {name} of an earlier run")
    for name in reclaim_folders():
        _say(f"reclaimed {name} of an earlier run")
    with _socket_folder() as folder:
        addresses = (f"ipc://{folder / 'in'}", f"ipc://{folder / 'out'}")
        links = InstanceLinks(input_address=addresses[0], output_address=addresses[1], codec=VllmCodec())
        cluster = Cluster(
            links=links,
            launcher=LocalLauncher(lambda: sweep(f"{SHM_PREFIX}-{os.getpid()}")),
            make_spec=InstanceSpecs(vllm_config, args, options, addresses),
            scheduler=options.scheduler,
            migration=options.migration,
            recovery=options.recovery,
            progress=_say,
            max_surge=lambda: _surge(cluster),
            respec=lambda flags: respec(argv, flags, args, addresses),
            events=_event_log(options),
            metrics=default_metrics(),
            clock=time.monotonic,
        )
        try:
            await cluster.start(options.num_instances)
            yield cluster
        finally:
            # In a thread: instances need up to seconds to end, and they say goodbye over the links.
            await asyncio.shield(asyncio.to_thread(cluster.close, SHUTDOWN_GRACE_S))
            cluster.close_sockets()
            sweep(SHM_PREFIX)


def _event_log(options: ServeOptions) -> EventLog:
    return EventLog(
        time.monotonic,
        options.event_log,
        wait=False,
        config=options.event_log_config,
        on_left_out=default_metrics().events_left_out.inc,
    )


class ClusterLLM(AsyncLLM):
    """vLLM's front end engine; what it ends with is ours."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Requests end first: vLLM would take the tokenizer away from those that still come, before anything else."""
        client = getattr(self, "engine_core", None)
        if client is not None:
            client.finish(timeout)
        super().shutdown(timeout)


def make_async_llm(vllm_config: Any, cluster: Cluster, args: argparse.Namespace) -> AsyncLLM:
    """vLLM's front end engine over the cluster. Replacing one static method is the only patch."""
    original = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(
        lambda *, vllm_config, **_: ClusterClient(vllm_config, cluster)
    )
    try:
        llm = ClusterLLM.from_vllm_config(
            vllm_config=vllm_config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            aggregate_engine_logging=args.aggregate_engine_logging,
            disable_log_stats=args.disable_log_stats,
        )
    finally:
        EngineCoreClient.make_async_mp_client = original
    llm.engine_core.output_processor = llm.output_processor
    return llm


# ---------------------------------------------------------------------- serving


async def _serve(args: argparse.Namespace, options: ServeOptions, argv: list[str]) -> int:
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)  # until vLLM's server puts its own in place
    try:
        await _serve_until_stopped(args, options, argv)
    except asyncio.CancelledError:
        _say("stopped during start-up")
        return 130
    return 0


async def _serve_until_stopped(args: argparse.Namespace, options: ServeOptions, argv: list[str]) -> None:
    address, sock = _bind(args, options.http)
    with contextlib.closing(sock):
        vllm_config = engine_config(args, options)
        async with running_cluster(args, options, vllm_config, argv) as cluster:
            llm = make_async_llm(vllm_config, cluster, args)
            cluster.membership.serve(vllm_config.model_config.max_model_len)
            try:
                await llm.reset_mm_cache()
                stopped = await _serve_app(llm, cluster, address, sock, args, options)
            finally:
                await asyncio.to_thread(partial(llm.shutdown, timeout=vllm_config.shutdown_timeout))
        await stopped


def _bind(args: argparse.Namespace, http: HttpConfig) -> tuple[str, Any]:
    """The server's socket, before anything heavy starts. Raises ConfigError if it can't be had.

    The kernel drops connections whose client takes nothing for ``client_timeout_s``: one that has vanished, and one
    that has stopped reading once the buffers are full. To vLLM both have disconnected.
    """
    where = args.uds or f"{args.host or '0.0.0.0'}:{args.port}"
    try:
        address, sock = setup_server(args, reuse_port=False)
        if not args.uds:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(http.client_timeout_s * 1000))
            sock.listen(128)
        return address, sock
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {where}: {error}; choose another --port or stop what uses it") from error
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from error


async def _serve_app(
    llm: AsyncLLM, cluster: Cluster, address: str, sock: Any, args: argparse.Namespace, options: ServeOptions
) -> Any:
    """As vLLM's own build_and_serve, with the admin endpoints added."""
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    api_keys = [k for k in (args.api_key or [envs.VLLM_API_KEY]) if k]
    streams = ResumableStreams(options.http)
    # Outside of vLLM's own, and inside: behind its check of the key, and seen by its metrics.
    app.user_middleware.insert(0, Middleware(RequestIds))
    app.user_middleware += [Middleware(Reconnect, streams=streams, config=options.http), Middleware(Placements)]
    app.middleware_stack = None  # vLLM has built it already; it is built anew with the first request
    attach_reconnect(app, streams, api_keys)
    attach_admin(app, cluster, api_keys)
    attach_dashboard(app)
    await init_app_state(llm, app.state, args, tasks)
    log_config = get_uvicorn_log_config(args)
    _say(_what_to_try(address, args))
    return await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **({"log_config": log_config} if log_config is not None else {}),
    )


def _what_to_try(address: str, args: argparse.Namespace) -> str:
    name = (args.served_model_name or [args.model])[0]
    url = address.replace("0.0.0.0", "127.0.0.1")
    return f"""ready on {url}. Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Tell me about llamas."}}], "stream": true}}'

  python -c "from openai import OpenAI; c = OpenAI(base_url='{url}/v1', api_key='-'); \\
    print(c.completions.create(model='{name}', prompt='Once upon a time', max_tokens=50).choices[0].text)"

  {url}/dashboard              watch it in a browser
  arriero status --url {url}   instances and running requests
  arriero migrate REQUEST --to 1 --url {url}
"""


def _say(line: str) -> None:
    sys.stderr.write(f"arriero: {line}\n")
    sys.stderr.flush()
