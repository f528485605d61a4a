"""The one file that names vLLM's private symbols, and the check that they are what we think.

Written against vLLM 0.32. Everything here is imported by name from where 0.32 has it; under another
version :func:`self_check` says which symbol is missing or has changed instead of failing somewhere deep.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from arriero.core.errors import ConfigError

SUPPORTED_MINOR = "0.32"


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name that we build on; ``parameters`` that must exist if it is callable."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()  #: of the class
    assigned: tuple[str, ...] = ()  #: ``self.NAME = ...`` somewhere in the class


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
            "collective_rpc_async",
            "get_supported_tasks_async",
            "_apply_ready_response",
            "_ensure_output_queue_task",
            "_format_exception",
            "shutdown",
        ),
        assigned=("outputs_queue", "client_index", "client_count"),
    ),
    Symbol("vllm.v1.engine.core_client", "BackgroundResources", ("ctx",), attributes=("engine_dead",)),
    Symbol(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        attributes=("from_vllm_config", "shutdown", "reset_mm_cache"),
        assigned=("engine_core", "output_processor"),
    ),
    Symbol("vllm.v1.engine.output_processor", "OutputProcessor", attributes=("abort_requests",)),
    Symbol("vllm.v1.serial_utils", "MsgpackEncoder", attributes=("encode",)),
    Symbol("vllm.v1.serial_utils", "MsgpackDecoder", attributes=("decode", "ext_hook", "_convert_result")),
    Symbol("vllm.v1.serial_utils", "CUSTOM_TYPE_RAW_VIEW"),
    Symbol("vllm.v1.serial_utils", "UtilityResult"),
    Symbol("vllm.v1.engine", "EngineCoreRequest", ("request_id", "current_wave", "client_index", "external_req_id")),
    Symbol(
        "vllm.v1.engine",
        "EngineCoreReadyResponse",
        ("vllm_version", "dtype", "block_size", "world_size", "tensor_parallel_size", "max_model_len"),
    ),
    Symbol("vllm.v1.engine", "EngineCoreOutputs", ("engine_index", "outputs", "utility_output", "scheduler_stats")),
    Symbol("vllm.v1.engine", "EngineCoreOutput", ("request_id", "new_token_ids", "finish_reason")),
    Symbol("vllm.v1.engine", "UtilityOutput", ("call_id", "failure_message", "result")),
    Symbol("vllm.v1.engine", "FinishReason", attributes=("ERROR",)),
    Symbol("vllm.exceptions", "GracefulHTTPError", ("message", "http_status")),
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
    Symbol("vllm.entrypoints.serve.utils.api_utils", "cli_env_setup"),
    Symbol("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    Symbol("vllm.engine.arg_utils", "AsyncEngineArgs", attributes=("from_cli_args", "create_engine_config")),
    Symbol("vllm.usage.usage_lib", "UsageContext", attributes=("OPENAI_API_SERVER",)),
    Symbol("vllm.logger", "configure_logging_from_args", ("args",)),
    Symbol("vllm.logger", "configure_logging"),
    Symbol("vllm.v1.executor", "Executor", attributes=("get_class",)),
    # engine
    Symbol(
        "vllm.v1.engine.core",
        "EngineCoreProc",
        (
            "vllm_config",
            "local_client",
            "handshake_address",
            "executor_class",
            "log_stats",
            "engine_index",
        ),
        attributes=(
            "_perform_handshakes",
            "_initialize_kv_caches",
            "_make_ready_response",
            "_handle_client_request",
            "_process_engine_step",
            "_process_input_queue",
            "_send_engine_dead",
            "abort_requests",
            "add_request",
            "collective_rpc",
            "execute_dummy_batch",
            "has_work",
            "list_loras",
            "preprocess_add_request",
            "reset_prefix_cache",
            "run_busy_loop",
            "shutdown",
        ),
        assigned=("input_queue", "output_queue", "scheduler", "shutdown_state", "step_fn", "structured_output_manager"),
    ),
    Symbol(
        "vllm.v1.engine.core",
        "EngineCore",
        ("vllm_config", "executor_class", "log_stats"),
        attributes=("abort_requests", "add_request", "post_step", "preprocess_add_request", "shutdown"),
        assigned=("batch_queue", "scheduler", "step_fn"),
    ),
    Symbol("vllm.v1.engine.core", "EngineShutdownState", attributes=("REQUESTED",)),
    Symbol("vllm.v1.engine", "EngineCoreRequestType", attributes=("ADD", "ABORT", "UTILITY", "WAKEUP")),
    Symbol("vllm.v1.engine", "EngineCoreEvent", ("type", "timestamp")),
    Symbol("vllm.v1.engine", "EngineCoreEventType", attributes=("QUEUED", "SCHEDULED", "PREEMPTED")),
    Symbol("vllm.v1.metrics.stats", "PrefillStats", ("num_prompt_tokens", "num_cached_tokens")),
    Symbol("vllm.v1.engine.utils", "EngineZmqAddresses", ("inputs", "outputs")),
    Symbol(
        "vllm.v1.request",
        "Request",
        attributes=(
            "append_output_token_ids",
            "num_tokens",
            "num_output_tokens",
            "num_tokens_with_spec",
            "is_finished",
            "use_structured_output",
        ),
        assigned=(
            "events",
            "is_prefill_chunk",
            "max_tokens",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_output_placeholders",
            "num_preemptions",
            "num_prompt_tokens",
            "output_token_ids",
            "prefill_stats",
            "priority",
            "status",
            "structured_output_request",
        ),
    ),
    Symbol(
        "vllm.v1.request",
        "RequestStatus",
        attributes=("RUNNING", "WAITING", "PREEMPTED", "WAITING_FOR_REMOTE_KVS", "FINISHED_ABORTED"),
    ),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        attributes=(
            "add_request",
            "finish_requests",
            "get_request_counts",
            "has_requests",
            "schedule",
            "update_from_output",
            "_holds_kv_blocks",
            "_preempt_request",
            "_request_blocks_can_be_freed",
        ),
        assigned=(
            "adaptive_long_prefill_threshold",
            "block_size",
            "connector",
            "deferred_waiting",
            "finished_req_ids",
            "kv_cache_config",
            "kv_cache_manager",
            "kv_holding_waiting",
            "max_model_len",
            "max_num_running_reqs",
            "max_num_scheduled_tokens",
            "need_mamba_block_aligned_split",
            "num_lookahead_tokens",
            "num_spec_tokens",
            "requests",
            "running",
            "scheduler_config",
            "waiting",
            "_pause_state",
        ),
    ),
    Symbol("vllm.v1.core.sched.interface", "PauseState", attributes=("UNPAUSED",)),
    Symbol(
        "vllm.v1.core.sched.request_queue",
        "FCFSRequestQueue",
        attributes=("add_request", "prepend_request", "prepend_requests", "remove_requests"),
    ),
    Symbol(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_spec_decode_tokens"),
    ),
    Symbol(
        "vllm.config",
        "SchedulerConfig",
        ("disable_chunked_mm_input", "enable_chunked_prefill", "long_prefill_token_threshold"),
    ),
    Symbol(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager",
        attributes=("allocate_slots", "cache_blocks", "free", "get_block_ids"),
        assigned=("block_pool", "coordinator"),
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
    Symbol(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        attributes=("sample_tokens",),
        assigned=("device", "discard_request_mask", "input_batch", "kv_caches", "requests"),
    ),
    Symbol("vllm.sampling_params", "SamplingType", attributes=("RANDOM_SEED",)),
    Symbol("vllm.sampling_params", "SamplingParams", ("max_tokens", "temperature", "seed", "structured_outputs")),
    Symbol("vllm.sampling_params", "StructuredOutputsParams", ("json",)),
    Symbol("vllm.transformers_utils.config", "maybe_register_config_serialize_by_value"),
    Symbol("vllm.utils.system_utils", "decorate_logs"),
    Symbol("vllm.utils.system_utils", "set_process_title"),
)

_MODULES = {symbol.name: symbol.module for symbol in SYMBOLS}


def __getattr__(name: str) -> Any:
    """Import a symbol of the table on first use, so that nothing heavy is imported before it is needed."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


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
        missing += [f"{where}().{a}" for a in symbol.assigned if not _assigns(found, a)]
        missing += [f"{where}({p}=...)" for p in symbol.parameters if p not in _parameters(found)]
    return missing


def _parameters(found: Any) -> Collection[str]:
    try:
        return inspect.signature(found).parameters
    except (TypeError, ValueError):  # no longer callable
        return ()


def _assigns(found: Any, name: str) -> bool:
    """Whether some method of the class or its bases assigns ``self.name``, or it is an attribute of the class."""
    bases = [base for base in getattr(found, "__mro__", ()) if base.__module__.startswith("vllm.")]
    return hasattr(found, name) or any(name in _assigned(base) for base in bases)


@functools.cache
def _assigned(cls: type) -> frozenset[str]:
    """Every NAME in ``self.NAME = ...`` in the source of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


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
            f"vLLM {__version__} lacks {', '.join(missing)}: "
            f"arriero is written for vLLM {SUPPORTED_MINOR}.x, install that"
        )
