"""The `arriero` command."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NoReturn
from urllib.parse import quote

import httpx
from rich.box import SIMPLE_HEAD
from rich.table import Table

from arriero import __version__
from arriero.core.types import MigrationMode
from arriero.observe import parity
from arriero.sim import cli as simulation
from arriero.sim import sweep_cli as sweep
from arriero.tables import output

DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (the operation failed) or 2 (bad arguments)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["serve"]:
        sys.exit(_serve(arguments[1:]))
    if arguments[:1] == ["calibrate"]:
        sys.exit(_calibrate(arguments[1:]))
    if arguments[:1] == ["chaos"]:
        sys.exit(_chaos(arguments[1:]))
    own, flags = _split(arguments)
    args = _parser().parse_args(own)
    if flags and args.run is not _restart:
        _parser().error(f"{own[0]} takes no flags after --")
    args.flags = flags
    sys.exit(args.run(args))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before ``--``, and what after."""
    if "--" not in arguments:
        return arguments, []
    where = arguments.index("--")
    return arguments[:where], arguments[where + 1 :]


def _serve(argv: list[str]) -> int:
    try:
        from arriero.vllm.server import main as serve
    except ModuleNotFoundError as error:
        sys.stderr.write(f"arriero serve: {error}; install vllm 0.32 beside arriero\n")
        return 2
    return serve(argv)


def _calibrate(argv: list[str]) -> int:
    try:
        from arriero.vllm.calibrate import main as calibrate
    except ModuleNotFoundError as error:
        sys.stderr.write(f"arriero calibrate: {error}; install vllm 0.32 beside arriero\n")
        return 2
    return calibrate(argv)


def _chaos(argv: list[str]) -> int:
    from arriero.chaos.cli import main as chaos  # late: the other commands need none of what it imports

    return chaos(argv)


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        self.exit(2, f"{self.prog}: {message} (see '{self.prog} --help')\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="arriero", description="LLM serving over several vLLM instances that moves requests while they run."
    )
    parser.add_argument("--version", action="version", version=f"arriero {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="start instances and the OpenAI server (arriero serve --help)", add_help=False)
    commands.add_parser("calibrate", help="measure a model's step times for arriero simulate", add_help=False)
    commands.add_parser("chaos", help="load a server, hurt what is behind it (arriero chaos --help)", add_help=False)
    status = commands.add_parser("status", help="show instances and running requests")
    status.add_argument("--json", action="store_true", help="print JSON instead of tables")
    status.set_defaults(run=_status)
    migrate = commands.add_parser("migrate", help="move a running request to another instance")
    migrate.add_argument("request", help="id of the request or its beginning, as `arriero status` shows it")
    migrate.add_argument("--to", type=int, required=True, help="instance to move to")
    migrate.add_argument("--mode", choices=[m.value for m in MigrationMode], default=MigrationMode.LIVE.value)
    migrate.set_defaults(run=_migrate)
    explain = commands.add_parser("explain", help="show why a request is where it is, or went where it did")
    explain.add_argument("request", help="its id or the beginning of it, as `arriero status` shows it; may have ended")
    explain.add_argument("--json", action="store_true", help="print JSON instead of lines")
    explain.set_defaults(run=_explain)
    drain = commands.add_parser("drain", help="move everything away from an instance, then end it")
    drain.add_argument("instance", type=int, help="its id, as `arriero status` shows it")
    drain.add_argument("--force", action="store_true", help="also the last instance that takes requests")
    drain.set_defaults(run=_drain)
    restart = commands.add_parser(
        "restart", help="replace instances under load", epilog="flags of `vllm serve` for the instances follow after --"
    )
    restart.add_argument("instances", type=int, nargs="*", help="their ids, or --rolling")
    restart.add_argument("--rolling", action="store_true", help="all instances, one after the other")
    restart.add_argument(
        "--max-surge",
        type=int,
        default=None,
        help="so many start before others are drained (default: 1 if memory allows)",
    )
    restart.set_defaults(run=_restart, flags=[])
    simulation.add_parser(commands)
    parity.add_parser(commands)
    sweep.add_parser(commands)
    for command in (status, migrate, explain, drain, restart):
        command.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
        command.add_argument("--api-key", default=None, help="the server's API key, if it wants one")
    return parser


# ---------------------------------------------------------------------- operating a server


class _Failed(Exception):
    """Printed as one line; exit code 1."""


def _call(
    args: argparse.Namespace,
    method: str,
    path: str,
    *,
    shows: str = "migrations",
    timeout: float | None = 120,
    **kwargs: Any,
) -> Any:
    """The answer: a list, or an object with a key ``shows``, if need be with an error's status."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    try:
        response = httpx.request(method, args.url.rstrip("/") + path, headers=headers, timeout=timeout, **kwargs)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise _Failed(f"no answer from {args.url}: {error}; is the server running there?") from error
    try:
        body = response.json()
    except ValueError as error:
        raise _Failed(f"{args.url} answered {response.status_code} without JSON: is it an arriero server?") from error
    if response.is_error and not (isinstance(body, dict) and shows in body):
        raise _Failed(_message(body, response.status_code))
    if not (shows in body if isinstance(body, dict) else isinstance(body, list)):
        raise _Failed(f"{args.url} answered {path} with something else: is it an arriero server?")
    return body


def _message(body: Any, status: int) -> str:
    if isinstance(body, dict):
        error = body.get("error", body.get("detail"))
        if isinstance(error, dict):
            error = error.get("message")
        if error:
            return " ".join(str(error).split())
    return f"the server answered {status}"


def _status(args: argparse.Namespace) -> int:
    try:
        instances, requests = _call(args, "GET", "/instances"), _call(args, "GET", "/requests")
    except _Failed as error:
        sys.stderr.write(f"arriero status: {error}\n")
        return 1
    if args.json:
        print(json.dumps({"instances": instances, "requests": requests}, indent=2))
        return 0
    console = output()
    for instance in instances:
        instance["note"] = _note(instance)
    console.print(_table("instances", INSTANCE_COLUMNS, instances, console.width))
    console.print(_table("requests", REQUEST_COLUMNS, requests, console.width))
    return 0


def _note(instance: dict[str, Any]) -> str | None:
    """What there is to say of an instance beside its state, if anything."""
    replaces, stage = instance.get("replaces"), instance.get("stage") or ""
    said = [stage] if stage not in ("ready", "") else []
    said += [f"replaces {replaces}"] if replaces is not None else []
    return ", ".join(said) or None


INSTANCE_COLUMNS = {
    "id": "{id}",
    "state": "{state}",
    "pid": "{pid}",
    "host": "{host}",
    "running": "{running}",
    "waiting": "{waiting}",
    "KV blocks": "{blocks_used} / {blocks_total}",
    "freeness": "{freeness}",
    "note": "{note}",
}
REQUEST_COLUMNS = {
    "request": "{client_id}",
    "instance": "{instance}",
    "state": "{state}",
    "prompt": "{prompt_tokens}",
    "output": "{output_tokens}",
    "moves": "{moves}",
    "paused ms": "{paused_ms}",
    "age s": "{age_s}",
}


def _table(title: str, columns: dict[str, str], rows: list[dict[str, Any]], width: int) -> Table:
    """Where ``width`` is small, only ids are cut: `arriero migrate` takes the beginning of one."""
    title = title.removesuffix("s") if len(rows) == 1 else title
    table = Table(title=f"{len(rows)} {title}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shown = [{key: "-" if value is None else value for key, value in row.items()} for row in rows]
    cells = {c: [template.format_map(row) for row in shown] for c, template in columns.items()}
    others = sum(max(map(len, [c, *cells[c]])) for c in columns if c != "request")
    for column in columns:
        left = column in ("request", "state", "host", "note")
        longest = max(12, width - others - 2 * len(columns) - 2) if column == "request" else None
        table.add_column(column, no_wrap=True, justify="left" if left else "right", max_width=longest)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def _migrate(args: argparse.Namespace) -> int:
    body = {"to": args.to, "mode": args.mode}
    try:
        answer = _call(args, "POST", f"/requests/{quote(args.request, safe='')}/migrate", json=body)
    except _Failed as error:
        sys.stderr.write(f"arriero migrate: {error}\n")
        return 1
    for report in answer["migrations"]:
        what = f"{report['request_id']}: {report['source']} -> {report['destination']}"
        if report["ok"]:
            stages, size = len(report["stages"]), report["num_bytes"] / 2**20
            print(f"{what} moved in {1e3 * report['total_s']:.0f} ms ({stages} stages, {size:.1f} MiB)")
        else:
            print(f"{what} not moved: {report['reason']}; it runs on at {report['source']}")
    return 0 if answer["ok"] else 1


def _explain(args: argparse.Namespace) -> int:
    try:
        answer = _call(args, "GET", f"/requests/{quote(args.request, safe='')}/explain", shows="requests")
    except _Failed as error:
        sys.stderr.write(f"arriero explain: {error}\n")
        return 1
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    for request in answer["requests"]:
        print(f"{request['client_id'] or request['id']}: {request['now']}")
        for step in request["steps"]:
            print(f"  {step['at_s']:10.3f} s  {step['what']}")
        if request["num_left_out"]:
            print(f"  ({request['num_left_out']} events in the middle are not remembered)")
    return 0


def _drain(args: argparse.Namespace) -> int:
    try:
        path = f"/instances/{args.instance}/drain"
        report = _call(args, "POST", path, shows="num_requests", timeout=None, json={"force": args.force})
    except _Failed as error:
        sys.stderr.write(f"arriero drain: {error}\n")
        return 1
    what = f"instance {report['instance']} ended after {report['total_s']:.1f} s"
    if not report["ok"]:
        print(f"{what}, before it was empty: what was left there goes on elsewhere, from its tokens")
        return 1
    print(f"{what}; its {report['num_requests']} requests had moved away or ended within {report['emptied_s']:.1f} s")
    return 0


def _restart(args: argparse.Namespace) -> int:
    if args.rolling == bool(args.instances):
        sys.stderr.write("arriero restart: name the instances, or use --rolling for all\n")
        return 2
    body = {"instances": args.instances or None, "max_surge": args.max_surge, "flags": args.flags}
    try:
        report = _call(args, "POST", "/restart", shows="replaced", timeout=None, json=body)
    except _Failed as error:
        sys.stderr.write(f"arriero restart: {error}\n")
        return 1
    for old, new in report["replaced"].items():
        print(f"instance {old} -> {new}")
    if not report["ok"]:
        sys.stderr.write(f"arriero restart: {report['reason']}; the other instances were not touched\n")
        return 1
    print(f"{len(report['replaced'])} instances replaced in {report['total_s']:.1f} s")
    return 0


if __name__ == "__main__":
    main()
