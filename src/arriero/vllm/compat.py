"""The one file that names vLLM's private symbols, and the check that they are what we think.

Written against vLLM 0.32. Everything here is imported by name from where 0.32 has it; under another
version :func:`self_check` says which symbol is missing or has changed instead of failing somewhere deep.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

from arriero.core.errors import ConfigError

SUPPORTED_MINOR = "0.32"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name that we build on; ``parameters`` that must exist if it is callable."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


SYMBOLS: tuple[Symbol, ...] = (
    # front end
    Symbol("vllm.v1.engine.core_client", "EngineCoreClient", attributes=("make_async_mp_client",)),
    Symbol(
        "vllm.v1.engine.core_client",
        "AsyncMPClient",
        attributes=(
            "get_output_async",
            "add_request_async",
            "abort_requests_async",
            "call_utility_async",
            "call_utility_all_async",
            "call_utility_consensus_async",
            "_call_utility_async",
            "_apply_ready_response",
            "_ensure_output_queue_task",
            "get_supported_tasks_async",
            "shutdown",
        ),
    ),
    Symbol("vllm.v1.engine.core_client", "BackgroundResources", attributes=("validate_alive",)),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM", attributes=("from_vllm_config", "shutdown")),
    Symbol("vllm.v1.serial_utils", "MsgpackEncoder", attributes=("encode",)),
    Symbol("vllm.v1.serial_utils", "MsgpackDecoder", attributes=("decode",)),
    Symbol("vllm.v1.engine", "EngineCoreOutputs"),
    Symbol("vllm.v1.engine", "EngineCoreOutput"),
    Symbol("vllm.v1.engine", "FinishReason", attributes=("ERROR",)),
    Symbol("vllm.v1.engine", "UtilityOutput"),
    Symbol("vllm.v1.engine", "EngineCoreReadyResponse"),
    Symbol("vllm.v1.serial_utils", "UtilityResult"),
    # server
    Symbol("vllm.entrypoints.launchers.cli_args", "make_arg_parser", ("parser",)),
    Symbol("vllm.entrypoints.launchers.cli_args", "validate_parsed_serve_args", ("args",)),
    Symbol("vllm.entrypoints.launchers.app", "build_app", ("args", "supported_tasks", "model_config")),
    Symbol(
        "vllm.entrypoints.launchers.api_server.app_state",
        "init_app_state",
        ("engine_client", "state", "args", "supported_tasks"),
    ),
    Symbol("vllm.entrypoints.launchers.launcher", "serve_http", ("app", "sock", "enable_ssl_refresh")),
    Symbol("vllm.entrypoints.launchers.launcher", "setup_server", ("args", "reuse_port")),
    Symbol("vllm.entrypoints.launchers.utils.server_utils", "get_uvicorn_log_config", ("args",)),
    Symbol("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    Symbol("vllm.engine.arg_utils", "AsyncEngineArgs", attributes=("from_cli_args", "create_engine_config")),
    Symbol("vllm.v1.executor", "Executor", attributes=("get_class",)),
    # engine
    Symbol(
        "vllm.v1.engine.core",
        "EngineCoreProc",
        attributes=(
            "_perform_handshakes",
            "_handle_client_request",
            "_process_engine_step",
            "_process_input_queue",
            "_send_engine_dead",
            "add_request",
            "abort_requests",
            "preprocess_add_request",
            "run_busy_loop",
            "shutdown",
        ),
    ),
    Symbol("vllm.v1.engine.core", "EngineShutdownState", attributes=("REQUESTED",)),
    Symbol("vllm.v1.engine", "EngineCoreRequestType", attributes=("ADD", "ABORT", "UTILITY", "WAKEUP")),
    Symbol("vllm.v1.engine.utils", "EngineZmqAddresses"),
    Symbol("vllm.v1.request", "Request", attributes=("append_output_token_ids", "num_tokens", "num_output_tokens")),
    Symbol("vllm.v1.request", "RequestStatus", attributes=("RUNNING", "WAITING", "PREEMPTED", "FINISHED_ABORTED")),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        attributes=(
            "add_request",
            "finish_requests",
            "get_request_counts",
            "_enqueue_waiting_request",
        ),
    ),
    Symbol(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        attributes=("allocate_slots", "cache_blocks", "free", "get_block_ids"),
    ),
    Symbol("vllm.v1.structured_output", "StructuredOutputManager", attributes=("accept_tokens", "grammar_init")),
    # worker
    Symbol(
        "vllm.v1.worker.gpu_input_batch",
        "CachedRequestState",
        (
            "req_id",
            "prompt_token_ids",
            "mm_features",
            "sampling_params",
            "generator",
            "block_ids",
            "num_computed_tokens",
            "output_token_ids",
            "lora_request",
        ),
    ),
    Symbol("vllm.sampling_params", "SamplingType", attributes=("RANDOM_SEED",)),
    Symbol("vllm.utils.system_utils", "decorate_logs"),
    Symbol("vllm.utils.system_utils", "set_process_title"),
)


def missing_symbols() -> list[str]:
    """What this vLLM lacks of what arriero builds on; empty if all is there."""
    missing = []
    for symbol in SYMBOLS:
        where = f"{symbol.module}.{symbol.name}"
        try:
            found = getattr(importlib.import_module(symbol.module), symbol.name)
        except (ImportError, AttributeError):
            missing.append(where)
            continue
        missing += [f"{where}.{a}" for a in symbol.attributes if not hasattr(found, a)]
        if symbol.parameters:
            have = inspect.signature(found).parameters
            missing += [f"{where}({p}=...)" for p in symbol.parameters if p not in have]
    return missing


def self_check() -> None:
    """Raise ConfigError if this vLLM cannot be extended as arriero does it."""
    try:
        from vllm.version import __version__
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported ({error}): install vllm {SUPPORTED_MINOR} beside arriero"
        ) from error
    missing = missing_symbols()
    if missing:
        raise ConfigError(
            f"vLLM {__version__} lacks {', '.join(missing)}: arriero is written for vLLM {SUPPORTED_MINOR}.x, install that"
        )
