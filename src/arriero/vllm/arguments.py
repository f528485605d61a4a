"""Arguments of `arriero serve`: all of `vllm serve`, and a few of our own."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from arriero.core.config import (
    AdmissionConfig,
    CopyConfig,
    EventLogConfig,
    HttpConfig,
    LogLevel,
    MigrationConfig,
    RebalancingConfig,
    RecoveryConfig,
    ScalingConfig,
    SchedulerConfig,
    StepConfig,
)
from arriero.core.dispatch import DISPATCH_POLICIES, make_dispatch_policy
from arriero.core.errors import ConfigError
from arriero.core.policies import POLICIES, policy_config
from arriero.vllm.compat import FlexibleArgumentParser, make_arg_parser, validate_parsed_serve_args

WORKER_EXTENSION = "arriero.vllm.worker.ArrieroWorkerExtension"


class OneLineParser(FlexibleArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        sys.stderr.write(f"arriero serve: {_one_line(message)} (see 'arriero serve --help')\n")
        sys.exit(2)


class RaisingParser(FlexibleArgumentParser):
    """For arguments that come while the server runs."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        raise ConfigError(_one_line(message))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Our own options, checked."""

    num_instances: int
    engine: str
    scheduler: SchedulerConfig
    migration: MigrationConfig
    copy: CopyConfig
    step: StepConfig
    recovery: RecoveryConfig
    http: HttpConfig
    event_log: Path | None
    event_log_config: EventLogConfig
    pin_cores: bool
    instances_per_gpu: int


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def make_parser(kind: type[FlexibleArgumentParser] = OneLineParser) -> FlexibleArgumentParser:
    """The parser of `arriero serve`."""
    parser = kind(
        prog="arriero serve",
        description="OpenAI-compatible server over several vLLM instances that moves requests while they run. "
        "Takes every option of `vllm serve`, and these of its own:",
    )
    migration, copy, admission = MigrationConfig(), CopyConfig(), AdmissionConfig()
    recovery = RecoveryConfig()
    group = parser.add_argument_group("arriero")
    group.add_argument("--instances", type=int, default=2, help="vLLM instances to start (default: 2)")
    group.add_argument(
        "--policy",
        default="arriero",
        help=f"a whole set of scheduling rules: one of {', '.join(POLICIES)} (default: arriero)",
    )
    group.add_argument(
        "--dispatch-policy",
        help=f"of these rules, where a request goes: one of {', '.join(DISPATCH_POLICIES)}, or the path of a class",
    )
    group.add_argument(
        "--rebalance",
        action=argparse.BooleanOptionalAction,
        help="of these rules, whether running requests move to emptier instances in the background",
    )
    group.add_argument("--rebalance-interval", type=float, help="seconds between two rounds")
    group.add_argument("--rebalance-low", type=float, help="freeness below which requests leave")
    group.add_argument("--rebalance-high", type=float, help="freeness above which requests may come")
    group.add_argument("--max-migrations-per-instance", type=int, help="at a time")
    group.add_argument(
        "--max-instances", type=int, help="start and drain instances by load, up to so many (default: --instances stay)"
    )
    group.add_argument(
        "--min-instances", type=int, help="with --max-instances: at least so many (default: --instances)"
    )
    group.add_argument(
        "--migration-share",
        type=float,
        default=copy.copy_share,
        help="share of an instance's time that copying may take while others decode (default: %(default)s)",
    )
    group.add_argument(
        "--itl-target-ms",
        type=float,
        default=1e3 * StepConfig().itl_target_s,
        help="most milliseconds between two tokens of a stream while prompts are computed beside it, in parts "
        "that fit; 0: no target (default: %(default)g)",
    )
    group.add_argument(
        "--migration-timeout", type=float, default=migration.timeout_s, help="seconds until a migration gives up"
    )
    group.add_argument(
        "--restart",
        action=argparse.BooleanOptionalAction,
        default=recovery.restart,
        help="replace an instance that died (default: --restart)",
    )
    group.add_argument(
        "--hang-timeout",
        type=float,
        default=recovery.hang_timeout_s,
        help="seconds without a sign of life after which an instance is killed; must be longer than any step; 0: never "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-replays",
        type=int,
        default=recovery.max_replays,
        help="how often a request is tried again whose instances die of it (default: %(default)s)",
    )
    group.add_argument(
        "--no-instance-timeout",
        type=float,
        default=recovery.no_instance_timeout_s,
        help="seconds that requests wait for an instance when there is none (default: %(default)s)",
    )
    group.add_argument(
        "--max-queued-requests",
        type=int,
        default=admission.max_queued_requests,
        help="requests that may wait for each instance; beyond them new ones get HTTP 429 (default: %(default)s)",
    )
    group.add_argument(
        "--client-timeout",
        type=float,
        default=HttpConfig().client_timeout_s,
        help="seconds until a client that acknowledges or takes nothing is dropped (default: %(default)s)",
    )
    group.add_argument(
        "--engine",
        choices=("vllm", "sim"),
        default="vllm",
        help="sim: simulated engines (same protocol, made-up tokens), to try out the control plane",
    )
    group.add_argument("--event-log", type=Path, default=None, help="append every event as a JSON line to this file")
    group.add_argument(
        "--event-log-level",
        choices=[level.value for level in LogLevel],
        default=None,
        help="full: also what the scheduler is told and decides, for `arriero replay` (default: events)",
    )
    group.add_argument(
        "--no-pin", dest="pin_cores", action="store_false", help="do not pin CPU instances to cores of their own"
    )
    group.add_argument(
        "--instances-per-gpu",
        type=int,
        default=1,
        help="instances that share a GPU (needs --kv-cache-memory-bytes; default: %(default)s)",
    )
    made = make_arg_parser(parser)
    # A request's priority counts without a flag. Among equals it is first come, first served, as under vLLM's default.
    made.set_defaults(scheduling_policy="priority")
    return made


def parse(
    argv: list[str], parser: type[FlexibleArgumentParser] = OneLineParser
) -> tuple[argparse.Namespace, ServeOptions]:
    """vLLM's arguments and ours. Raises ConfigError; unknown flags exit with 2."""
    try:
        args = make_parser(parser).parse_args(argv)
    except Exception as error:
        if "--config" not in argv:
            raise
        raise ConfigError(f"--config: {_one_line(error)}") from error  # a file with anything in it
    if args.model_tag is not None:
        args.model = args.model_tag
    args.api_server_count = 1 if args.api_server_count is None else args.api_server_count
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    _refuse_conflicts(args)
    args.worker_extension_cls = WORKER_EXTENSION
    return args, _options(args)


def _options(args: argparse.Namespace) -> ServeOptions:
    if args.instances < 1:
        raise ConfigError(f"--instances {args.instances} is invalid: it must be 1 or more")
    if args.instances_per_gpu < 1:
        raise ConfigError(f"--instances-per-gpu {args.instances_per_gpu} is invalid: it must be 1 or more")
    if args.event_log is not None and not args.event_log.absolute().parent.is_dir():
        raise ConfigError(f"--event-log {args.event_log}: there is no folder {args.event_log.absolute().parent}")
    if args.event_log is not None and args.event_log.is_dir():
        raise ConfigError(f"--event-log {args.event_log} is a folder: name a file")
    if args.event_log_level is not None and args.event_log is None:
        raise ConfigError(f"--event-log-level {args.event_log_level} needs --event-log FILE")
    return ServeOptions(
        num_instances=args.instances,
        engine=args.engine,
        scheduler=_scheduler(args),
        http=HttpConfig(client_timeout_s=args.client_timeout),
        migration=MigrationConfig(timeout_s=args.migration_timeout),
        copy=CopyConfig(copy_share=args.migration_share),
        step=StepConfig(itl_target_s=args.itl_target_ms / 1e3),
        recovery=RecoveryConfig(restart=args.restart, hang_timeout_s=args.hang_timeout, max_replays=args.max_replays),
        event_log=args.event_log,
        event_log_config=EventLogConfig(level=LogLevel(args.event_log_level or LogLevel.EVENTS)),
        pin_cores=args.pin_cores,
        instances_per_gpu=args.instances_per_gpu,
    )


def _scheduler(args: argparse.Namespace) -> SchedulerConfig:
    """The rules that ``--policy`` stands for, with the changes of the other flags."""
    config = policy_config(args.policy)
    given = {
        name: value
        for name, value in (
            ("interval_s", args.rebalance_interval),
            ("low_freeness", args.rebalance_low),
            ("high_freeness", args.rebalance_high),
            ("max_migrations_per_instance", args.max_migrations_per_instance),
        )
        if value is not None
    }
    rebalancing = replace(config.rebalancing or RebalancingConfig(), **given)
    wanted = config.rebalancing is not None if args.rebalance is None else args.rebalance
    config = replace(
        config,
        dispatch_policy=args.dispatch_policy or config.dispatch_policy,
        rebalancing=rebalancing if wanted else None,
        scaling=_scaling(args),
        no_instance_timeout_s=args.no_instance_timeout,
        admission=AdmissionConfig(max_queued_requests=args.max_queued_requests),
    )
    make_dispatch_policy(config.dispatch_policy)  # raises ConfigError now, not when everything else is set up
    return config


def _scaling(args: argparse.Namespace) -> ScalingConfig | None:
    if args.max_instances is None:
        if args.min_instances is not None:
            raise ConfigError(f"--min-instances {args.min_instances} needs --max-instances")
        return None
    least = args.instances if args.min_instances is None else args.min_instances
    if not least <= args.instances <= args.max_instances:
        raise ConfigError(f"--instances {args.instances} is not in [{least}, --max-instances {args.max_instances}]")
    return ScalingConfig(min_instances=least, max_instances=args.max_instances)


def _refuse_conflicts(args: argparse.Namespace) -> None:
    """Options of `vllm serve` that arriero takes the place of."""
    if args.worker_extension_cls:
        raise ConfigError(f"--worker-extension-cls {args.worker_extension_cls}: arriero needs that place itself")
    if args.data_parallel_size > 1:
        raise ConfigError(
            f"--data-parallel-size {args.data_parallel_size}: arriero balances instances itself; "
            f"use --instances {args.data_parallel_size}"
        )
    if args.api_server_count != 1:
        raise ConfigError(f"--api-server-count {args.api_server_count}: one front end process serves all instances")
    for flag in ("headless", "grpc"):
        if getattr(args, flag, False):
            raise ConfigError(f"--{flag} is not supported by arriero serve: it serves HTTP in front of its instances")
    model = Path(args.model).expanduser()
    if args.model.startswith((".", "/", "~")) and not model.exists():
        raise ConfigError(f"model {args.model!r}: there is no such file or folder")
    if args.model.startswith("~"):
        args.model = str(model)
