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
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from starlette.middleware import Middleware
from vllm.platforms import current_platform

from arriero.core.config import HttpConfig
from arriero.core.errors import ConfigError, LaunchError
from arriero.dashboard.app import attach_dashboard
from arriero.frontend.admin import attach_admin
from arriero.frontend.cluster import Cluster
from arriero.frontend.links import InstanceLinks
from arriero.frontend.placements import Placements
from arriero.frontend.reconnect import Reconnect, attach_reconnect
from arriero.frontend.request_ids import RequestIds
from arriero.frontend.resumable import ResumableStreams
from arriero.frontend.targets import Targets
from arriero.launch.leftovers import reclaim_folders, run_folder
from arriero.launch.local import LocalLauncher
from arriero.launch.memory import holds_one_more
from arriero.observe.events import EventLog
from arriero.observe.metrics import default_metrics
from arriero.transport.shm import sweep
from arriero.vllm import compat
from arriero.vllm.arguments import ServeOptions, parse
from arriero.vllm.client import SHUTDOWN_GRACE_S, ClusterClient
from arriero.vllm.codec import VllmCodec
from arriero.vllm.compat import (
    AsyncLLM,
    EngineCoreClient,
    UsageContext,
    build_app,
    cli_env_setup,
    configure_logging_from_args,
    get_uvicorn_log_config,
    init_app_state,
    serve_http,
    setup_server,
)
from arriero.vllm.instance_specs import SHM_PREFIX, InstanceSpecs, engine_config, respec
from vllm import envs


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


def _surge(cluster: Cluster) -> int:
    """How many instances may start beside those that run: GPUs have no room for two."""
    if current_platform.is_cuda_alike():
        return 0
    return int(holds_one_more(i.pid for i in cluster.instances if i.serves))


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

    _is_shut_down = False

    def shutdown(self, timeout: float | None = None) -> None:
        """Requests end first: vLLM would take the tokenizer away from those that still come, before anything else.

        Idempotent: vLLM calls it once more as the object is collected, when the interpreter may be half gone.
        """
        if self._is_shut_down:
            return
        self._is_shut_down = True
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
    app.user_middleware += [Middleware(Reconnect, streams=streams, config=options.http), Middleware(Targets)]
    app.user_middleware.append(Middleware(Placements))
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
