"""The command line: what a user who is wrong is told, and what a user who asks is shown."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from arriero import __version__
from arriero.cli import main
from arriero.core.errors import ConfigError


def run(*argv: str) -> int:
    """The exit code of `arriero ARGV`."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    code = caught.value.code
    return 0 if code is None else int(code)


@dataclass
class Printed:
    """What a command wrote."""

    out: str
    err: str

    def only_line(self) -> str:
        """The one line on the error output; nothing is on the other."""
        assert self.out == ""
        assert self.err.endswith("\n")
        (line,) = self.err.splitlines()
        return line


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    def read() -> Printed:
        return Printed(*capsys.readouterr())

    return read


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are cut to the terminal's width."""
    monkeypatch.setenv("COLUMNS", "160")


# ---------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["nonsense"], "'nonsense'"),
        (["--no-such-flag"], "COMMAND"),
        (["status", "--no-such-flag"], "--no-such-flag"),
        (["status", "extra"], "extra"),
        (["migrate"], "request, --to"),
        (["migrate", "r"], "--to"),
        (["migrate", "r", "--to", "there"], "'there'"),
        (["migrate", "r", "--to", "1", "--mode", "teleport"], "'teleport'"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line_that_names_them(argv: list[str], says: str, printed: Any) -> None:
    assert run(*argv) == 2
    line = printed().only_line()
    assert line.startswith("arriero")
    assert says in line
    assert "--help" in line


def test_help_and_version_are_no_errors(printed: Any) -> None:
    assert run("--version") == 0
    assert printed().out == f"arriero {__version__}\n"
    for argv in (["--help"], ["status", "--help"], ["migrate", "--help"]):
        assert run(*argv) == 0
        assert printed().err == ""


def test_without_arguments_of_its_own_it_reads_those_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["arriero", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert __version__ in capsys.readouterr().out


# ---------------------------------------------------------------------- arriero serve


@pytest.fixture(scope="module")
def arguments() -> Any:
    """arriero.vllm.arguments; importing vLLM takes seconds, and may write a line of its own."""
    return pytest.importorskip("arriero.vllm.arguments")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder in the place of a model: nothing reads it before the engine's configuration is made."""
    return str(tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--instances", "0"], "--instances 0 is invalid: it must be 1 or more"),
        (["--instances", "-1"], "--instances -1 is invalid"),
        (["--instances-per-gpu", "0"], "--instances-per-gpu 0 is invalid"),
        (["--rebalance", "--rebalance-low", "20"], "low_freeness=20.0 is invalid: it must be at most high_freeness"),
        (["--rebalance-high", "nan"], "high_freeness=nan"),
        (["--rebalance-interval", "0"], "interval_s=0.0 is invalid"),
        (["--max-migrations-per-instance", "0"], "max_migrations_per_instance=0 is invalid"),
        (["--migration-share", "0"], "copy_share=0.0 is invalid: it must be in (0, 1]"),
        (["--migration-share", "1.5"], "copy_share=1.5 is invalid"),
        (["--itl-target-ms", "-5"], "itl_target_s=-0.005 is invalid: it must be 0 or more seconds"),
        (["--itl-target-ms", "nan"], "itl_target_s=nan is invalid"),
        (["--migration-timeout", "0"], "timeout_s=0.0 is invalid"),
        (["--max-instances", "1"], "--instances 2 is not in [2, --max-instances 1]"),
        (["--min-instances", "1"], "--min-instances 1 needs --max-instances"),
        (["--policy", "fastest"], "policy 'fastest' is unknown: use one of arriero"),
        (["--dispatch-policy", "fastest"], "'fastest' is unknown: use one of freeness"),
        (["--dispatch-policy", "no_such_module.Policy"], "'no_such_module.Policy' cannot be loaded"),
        (["--event-log", "/no/such/folder/events"], "there is no folder /no/such/folder"),
        (["--event-log", "/"], "--event-log / is a folder"),
        (["--data-parallel-size", "3"], "use --instances 3"),
        (["--api-server-count", "2"], "--api-server-count 2: one front end"),
        (["--api-server-count", "0"], "--api-server-count 0: one front end"),
        (["--headless"], "--headless is not supported"),
        (["--grpc"], "--grpc is not supported"),
        (["--worker-extension-cls", "my.Extension"], "--worker-extension-cls my.Extension"),
        (["--enable-auto-tool-choice"], "--tool-call-parser"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--config", "settings.txt"], "yaml"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_one_line(
    arguments: Any, model: str, flags: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        arguments.parse([model, *flags])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["a: [1", "- only\n- a list", "nonsense", ""])
def test_a_broken_file_of_settings_is_refused_in_one_line(
    arguments: Any, model: str, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        arguments.parse([model, "--config", str(path)])
    assert str(caught.value).startswith("--config: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./no-such-model", "/no/such/model", "~/no-such-model"])
def test_a_model_path_that_does_not_exist_is_refused(arguments: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"model {path!r}: there is no such file or folder")):
        arguments.parse([path])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--instances", "two"], "'two'"),
        (["--instances"], "--instances"),
        (["--engine", "gpu"], "'gpu'"),
        (["--rebal"], "ambiguous option"),
        (["another-model"], "another-model"),
        (["--max-model-len", "long"], "'long'"),
        (["--kv-transfer-config", "{"], "KVTransferConfig"),
    ],
)
def test_unknown_flags_and_values_exit_with_2_and_one_line(
    arguments: Any, model: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.parse([model, *flags])
    assert caught.value.code == 2
    line = Printed(*capsys.readouterr()).only_line()
    assert line.startswith("arriero serve: ")
    assert says in line


def test_an_error_of_our_own_while_parsing_is_not_taken_for_one_of_the_user(
    arguments: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(kind: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(arguments, "make_parser", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        arguments.parse([model])


def test_what_is_not_given_has_the_defaults_of_the_configuration(arguments: Any, model: str) -> None:
    args, options = arguments.parse([model])
    assert args.model == model
    assert args.worker_extension_cls == arguments.WORKER_EXTENSION
    assert (options.num_instances, options.engine, options.pin_cores, options.event_log) == (2, "vllm", True, None)
    assert options.scheduler == replace(
        arguments.policy_config("arriero"),
        admission=arguments.AdmissionConfig(),
        no_instance_timeout_s=arguments.RecoveryConfig().no_instance_timeout_s,
    )
    assert options.http == arguments.HttpConfig()
    assert options.recovery == arguments.RecoveryConfig()
    assert options.migration == arguments.MigrationConfig()
    assert options.copy == arguments.CopyConfig()
    assert options.step == arguments.StepConfig()


def test_our_options_reach_the_configuration_and_those_of_vllm_the_engine(
    arguments: Any, model: str, tmp_path: Path
) -> None:
    flags = (
        "--instances 3 --engine sim --no-pin --dispatch-policy round_robin --migration-share 0.5 --migration-timeout 7 "
        "--rebalance --rebalance-interval 1 --rebalance-low 2 --rebalance-high 4 --max-migrations-per-instance 5 "
        "--max-queued-requests 9 --client-timeout 2.5 --max-model-len 1k --port 1234 --api-server-count 1 "
        "--instances-per-gpu 4 --no-restart --itl-target-ms 80 --hang-timeout 9 --max-replays 1 --no-instance-timeout 8"
    )
    args, options = arguments.parse([model, *flags.split(), "--event-log", str(tmp_path / "events")])
    assert (options.num_instances, options.engine, options.pin_cores) == (3, "sim", False)
    assert options.instances_per_gpu == 4
    assert options.event_log == tmp_path / "events"
    assert options.copy.copy_share == 0.5
    assert options.step.itl_target_s == 0.08
    assert options.migration.timeout_s == 7
    assert options.scheduler.dispatch_policy == "round_robin"
    assert options.scheduler.no_instance_timeout_s == 8
    assert options.recovery == arguments.RecoveryConfig(restart=False, hang_timeout_s=9, max_replays=1)
    assert options.scheduler.rebalancing == arguments.RebalancingConfig(
        interval_s=1, low_freeness=2, high_freeness=4, max_migrations_per_instance=5
    )
    assert options.scheduler.admission == arguments.AdmissionConfig(max_queued_requests=9)
    assert options.http == arguments.HttpConfig(client_timeout_s=2.5)
    assert (args.max_model_len, args.port) == (1000, 1234)


def test_a_policy_is_a_set_of_rules_of_which_flags_change_parts(arguments: Any, model: str) -> None:
    def scheduler(*flags: str) -> Any:
        return arguments.parse([model, *flags])[1].scheduler

    default = scheduler()
    assert default.queueing is not None
    assert default.rebalancing is not None
    assert default.scaling is None
    assert scheduler("--no-rebalance").rebalancing is None
    assert scheduler("--policy", "infaas").rebalancing is None
    assert scheduler("--policy", "infaas", "--rebalance").rebalancing is not None
    assert scheduler("--policy", "llumnix", "--rebalance-low", "1").rebalancing.low_freeness == 1
    scaling = scheduler("--max-instances", "4", "--min-instances", "1").scaling
    assert (scaling.min_instances, scaling.max_instances) == (1, 4)


def test_priorities_count_inside_an_instance_unless_the_user_wants_otherwise(arguments: Any, model: str) -> None:
    assert arguments.parse([model])[0].scheduling_policy == "priority"
    assert arguments.parse([model, "--scheduling-policy", "fcfs"])[0].scheduling_policy == "fcfs"


def test_a_path_in_the_home_folder_is_found(arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    args, _ = arguments.parse(["~/model"])
    assert args.model == str(tmp_path / "model")


def test_serve_tells_a_user_who_is_wrong_in_one_line_and_exits_with_2(
    arguments: Any, printed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, in this process: its check of vLLM, and both ways in which arguments are refused."""
    pytest.importorskip("arriero.vllm.server")
    monkeypatch.setattr("arriero.vllm.server.cli_env_setup", lambda: None)  # it sets variables of the process
    printed()
    for argv, says in ((["--no-such-flag"], "--no-such-flag"), (["./no-such-model"], "no such file or folder")):
        assert run("serve", *argv) == 2
        line = printed().only_line()
        assert line.startswith("arriero serve: ")
        assert says in line


def test_serve_without_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, printed: Any) -> None:
    monkeypatch.setitem(sys.modules, "arriero.vllm.server", None)
    assert run("serve", "model") == 2
    assert "install vllm 0.32 beside arriero" in printed().only_line()


# ---------------------------------------------------------------------- operating a server


@dataclass
class Asked:
    """One request that the stub server got."""

    method: str
    path: str
    authorization: str | None
    body: Any


@dataclass
class StubServer:
    """Answers each path with a status and a text."""

    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def json(self, path: str, body: Any, status: int = 200) -> None:
        self.answers[path] = (status, json.dumps(body))


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            authorization = self.headers.get("authorization")
            stub.asked.append(Asked(self.command, self.path, authorization, json.loads(body) if body else None))
            status, text = stub.answers.get(self.path, (404, '{"detail": "Not Found"}'))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        stub.url = f"http://127.0.0.1:{http.server_port}"
        yield stub
        http.shutdown()


@pytest.fixture
def dead_url() -> Iterator[str]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


READY = {
    "id": 0,
    "pid": 4711,
    "host": "alpaca",
    "state": "ready",
    "stage": "ready",
    "running": 3,
    "waiting": 12,
    "blocks_used": 77,
    "blocks_total": 1024,
    "block_size": 16,
    "preemptions": 2,
    "incoming": 0,
    "freeness": 315.667,
}
DEAD = {**{key: None for key in READY}, "id": 1, "pid": 4712, "host": "vicuna", "state": "dead"}
DEAD_OF_AN_OLDER_SERVER = {k: v for k, v in DEAD.items() if k not in ("block_size", "preemptions", "incoming")}
REQUEST = {
    "id": "cmpl-7-0-abcdef",
    "client_id": "cmpl-7-0",
    "instance": 0,
    "state": "running",
    "prompt_tokens": 41,
    "output_tokens": 987,
    "priority": 0,
    "moves": 6,
    "paused_ms": 23.5,
    "age_s": 12.25,
    "unmovable": None,
}


def columns_of(table: str) -> list[list[str]]:
    """Rows of a printed table as lists of cells."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip()]


def test_status_shows_instances_and_requests_as_tables(server: StubServer, printed: Any) -> None:
    server.json("/instances", [READY, DEAD])
    server.json("/requests", [REQUEST])
    assert run("status", "--url", server.url) == 0
    written = printed()
    assert written.err == ""
    for shown in ("2 instances", "1 request", "ready", "dead", "315.667", "4712", "cmpl-7-0", "987", "23.5"):
        assert shown in written.out


@pytest.mark.parametrize("dead", [DEAD, DEAD_OF_AN_OLDER_SERVER])
def test_values_stand_under_their_own_names_also_for_an_instance_without_load(
    server: StubServer, printed: Any, dead: dict[str, Any]
) -> None:
    """Whichever comes first."""
    server.json("/requests", [])
    for rows in ([READY, dead], [dead, READY]):
        server.json("/instances", rows)
        assert run("status", "--url", server.url) == 0
        table = columns_of(printed().out)
        head = next(row for row in table if "freeness" in row)
        shown = {row[0]: dict(zip(head, row, strict=True)) for row in table if row[0] in ("0", "1")}
        assert shown["0"]["freeness"] == "315.667"
        assert (shown["0"]["running"], shown["0"]["waiting"]) == ("3", "12")
        assert shown["1"]["state"] == "dead"


def test_status_of_an_idle_server_shows_empty_tables(server: StubServer, printed: Any) -> None:
    server.json("/instances", [])
    server.json("/requests", [])
    assert run("status", "--url", server.url) == 0
    assert "0 requests" in printed().out


def test_status_as_json_is_for_programs(server: StubServer, printed: Any) -> None:
    server.json("/instances", [READY])
    server.json("/requests", [REQUEST])
    assert run("status", "--json", "--url", server.url) == 0
    assert json.loads(printed().out) == {"instances": [READY], "requests": [REQUEST]}


@pytest.mark.parametrize("command", [["status"], ["migrate", "r", "--to", "1"]])
class TestNoUse:
    """Both commands, against servers that are of no use: exit code 1, and one line that says what to do."""

    def fails_with(self, command: list[str], url: str, printed: Any, *more: str) -> str:
        assert run(*command, "--url", url, *more) == 1
        line = str(printed().only_line())
        assert line.startswith(f"arriero {command[0]}: ")
        return line

    def test_a_dead_port(self, command: list[str], dead_url: str, printed: Any) -> None:
        line = self.fails_with(command, dead_url, printed)
        assert f"no answer from {dead_url}" in line
        assert "is the server running there?" in line

    @pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port"])
    def test_no_url_at_all(self, command: list[str], url: str, printed: Any) -> None:
        assert "no answer from" in self.fails_with(command, url, printed)

    def test_a_key_that_no_header_can_carry(self, command: list[str], server: StubServer, printed: Any) -> None:
        self.fails_with(command, server.url, printed, "--api-key", "ключ")

    def test_a_server_that_does_not_speak_json(self, command: list[str], server: StubServer, printed: Any) -> None:
        server.answers = dict.fromkeys(("/instances", "/requests/r/migrate"), (200, "<html>"))
        assert "is it an arriero server?" in self.fails_with(command, server.url, printed)

    @pytest.mark.parametrize("body", [{"status": "ok"}, "ok", 7, None])
    def test_a_server_that_says_something_else(
        self, command: list[str], server: StubServer, printed: Any, body: Any
    ) -> None:
        for path in ("/instances", "/requests/r/migrate"):
            server.json(path, body)
        assert "is it an arriero server?" in self.fails_with(command, server.url, printed)

    @pytest.mark.parametrize(
        ("status", "body", "says"),
        [
            (401, {"error": {"message": "this endpoint needs\nan API key"}}, "this endpoint needs an API key"),
            (404, {"detail": "Not Found"}, "Not Found"),
            (400, {"error": "Bad Request"}, "Bad Request"),
            (500, {"error": {}}, "the server answered 500"),
            (502, [], "the server answered 502"),
        ],
    )
    def test_an_error_is_shown_in_the_server_s_words(
        self, command: list[str], server: StubServer, printed: Any, status: int, body: Any, says: str
    ) -> None:
        for path in ("/instances", "/requests/r/migrate"):
            server.json(path, body, status)
        assert self.fails_with(command, server.url, printed) == f"arriero {command[0]}: {says}"


def moved(**fields: Any) -> dict[str, Any]:
    report = {
        "request_id": "0_cmpl-7",
        "source": 0,
        "destination": 1,
        "ok": True,
        "reason": "",
        "stages": [{}, {}],
        "num_bytes": 3 * 2**19,
        "total_s": 0.0123,
    }
    return {**report, **fields}


def test_migrate_asks_for_the_move_and_shows_what_it_did(server: StubServer, printed: Any) -> None:
    server.json("/requests/cmpl-7/migrate", {"ok": True, "migrations": [moved(), moved(request_id="1_cmpl-7")]})
    assert run("migrate", "cmpl-7", "--to", "1", "--url", server.url + "/", "--mode", "recompute") == 0
    assert server.asked == [Asked("POST", "/requests/cmpl-7/migrate", None, {"to": 1, "mode": "recompute"})]
    assert printed().out.splitlines() == [
        "0_cmpl-7: 0 -> 1 moved in 12 ms (2 stages, 1.5 MiB)",
        "1_cmpl-7: 0 -> 1 moved in 12 ms (2 stages, 1.5 MiB)",
    ]


def test_migrate_says_what_did_not_move_why_and_where_it_runs_on(server: StubServer, printed: Any) -> None:
    reports = [moved(), moved(request_id="1_cmpl-7", ok=False, reason="destination refused: full")]
    server.json("/requests/cmpl-7/migrate", {"ok": False, "migrations": reports}, status=409)
    assert run("migrate", "cmpl-7", "--to", "1", "--url", server.url) == 1
    assert printed().out.splitlines() == [
        "0_cmpl-7: 0 -> 1 moved in 12 ms (2 stages, 1.5 MiB)",
        "1_cmpl-7: 0 -> 1 not moved: destination refused: full; it runs on at 0",
    ]


def test_a_move_is_live_unless_another_mode_is_asked_for(server: StubServer, printed: Any) -> None:
    server.json("/requests/r/migrate", {"ok": True, "migrations": []})
    run("migrate", "r", "--to", "1", "--url", server.url)
    assert server.asked[0].body == {"to": 1, "mode": "live"}


def test_any_id_can_be_named(server: StubServer, printed: Any) -> None:
    """Clients choose them: a slash or a question mark must not end the path."""
    server.json("/requests/a%2Fb%3Fc%20%23%C3%A4/migrate", {"ok": True, "migrations": [moved()]})
    assert run("migrate", "a/b?c #ä", "--to", "1", "--url", server.url) == 0


@pytest.mark.parametrize("command", [["status"], ["migrate", "r", "--to", "1"]])
def test_the_key_goes_to_the_server(server: StubServer, printed: Any, command: list[str]) -> None:
    server.json("/instances", [])
    server.json("/requests", [])
    server.json("/requests/r/migrate", {"ok": True, "migrations": []})
    assert run(*command, "--url", server.url, "--api-key", "key") == 0
    assert {asked.authorization for asked in server.asked} == {"Bearer key"}


# ---------------------------------------------------------------------- explaining


EXPLAINED = {
    "id": "chatcmpl-9-1b2d",
    "client_id": "chatcmpl-9",
    "instance": 1,
    "now": "decodes on instance 1, beside 3 others",
    "steps": [
        {"at_s": 0.0, "event": "dispatch", "what": "goes to instance 0 (freeness)"},
        {"at_s": 1.25, "event": "migration", "what": "moved from instance 0 to 1"},
    ],
    "num_left_out": 0,
}


def test_explain_tells_each_step_with_its_time(server: StubServer, printed: Any) -> None:
    server.json("/requests/chatcmpl%2F9/explain", {"requests": [EXPLAINED, {**EXPLAINED, "num_left_out": 7}]})
    assert run("explain", "chatcmpl/9", "--url", server.url) == 0
    lines = printed().out.splitlines()
    assert lines[:3] == [
        "chatcmpl-9: decodes on instance 1, beside 3 others",
        "       0.000 s  goes to instance 0 (freeness)",
        "       1.250 s  moved from instance 0 to 1",
    ]
    assert lines[-1] == "  (7 events in the middle are not remembered)"


def test_explain_as_json_is_for_programs(server: StubServer, printed: Any) -> None:
    server.json("/requests/r/explain", {"requests": [EXPLAINED]})
    assert run("explain", "r", "--json", "--url", server.url) == 0
    assert json.loads(printed().out) == {"requests": [EXPLAINED]}


def test_explain_says_that_nothing_is_known(server: StubServer, printed: Any) -> None:
    server.json("/requests/r/explain", {"error": {"message": "nothing is known of request 'r'"}}, 404)
    assert run("explain", "r", "--url", server.url) == 1
    assert printed().err == "arriero explain: nothing is known of request 'r'\n"


# ---------------------------------------------------------------------- draining and restarting


def test_status_notes_how_an_instance_died_and_which_one_it_replaces(server: StubServer, printed: Any) -> None:
    server.json("/instances", [{**DEAD, "stage": "killed by SIGKILL"}, {**READY, "id": 2, "replaces": 1}])
    server.json("/requests", [])
    assert run("status", "--url", server.url) == 0
    dead, ready = columns_of(printed().out)[3:5]
    assert (dead[-1], ready[-1]) == ("killed by SIGKILL", "replaces 1")


def test_drain_asks_for_it_and_says_how_long_it_took(server: StubServer, printed: Any) -> None:
    report = {"instance": 1, "ok": True, "num_requests": 7, "emptied_s": 1.26, "total_s": 1.84}
    server.json("/instances/1/drain", report)
    assert run("drain", "1", "--force", "--url", server.url) == 0
    assert server.asked == [Asked("POST", "/instances/1/drain", None, {"force": True})]
    assert printed().out == ("instance 1 ended after 1.8 s; its 7 requests had moved away or ended within 1.3 s\n")


def test_a_drain_that_was_cut_short_is_a_failure(server: StubServer, printed: Any) -> None:
    report = {"instance": 1, "ok": False, "num_requests": 7, "emptied_s": None, "total_s": 300.0}
    server.json("/instances/1/drain", report)
    assert run("drain", "1", "--url", server.url) == 1
    assert "before it was empty" in printed().out


def test_a_drain_that_is_refused_says_why(server: StubServer, printed: Any) -> None:
    server.json("/instances/1/drain", {"error": {"message": "instance 1 is the last one"}}, 409)
    assert run("drain", "1", "--url", server.url) == 1
    assert printed().only_line() == "arriero drain: instance 1 is the last one"


def test_restart_passes_on_the_flags_after_the_dashes_and_lists_who_replaces_whom(
    server: StubServer, printed: Any
) -> None:
    server.json("/restart", {"ok": True, "replaced": {"0": 2, "1": 3}, "total_s": 61.2, "reason": ""})
    flags = ("--max-num-seqs", "64", "--url", "of the instances")
    assert run("restart", "--rolling", "--max-surge", "2", "--url", server.url, "--", *flags) == 0
    assert server.asked[0].body == {"instances": None, "max_surge": 2, "flags": list(flags)}
    assert printed().out.splitlines() == ["instance 0 -> 2", "instance 1 -> 3", "2 instances replaced in 61.2 s"]


def test_a_restart_that_had_to_end_says_how_far_it_came_and_why(server: StubServer, printed: Any) -> None:
    report = {"ok": False, "replaced": {"0": 2}, "total_s": 61.2, "reason": "instance 3 ended"}
    server.json("/restart", report, 409)
    assert run("restart", "0", "1", "--url", server.url) == 1
    assert server.asked[0].body == {"instances": [0, 1], "max_surge": None, "flags": []}
    said = printed()
    assert said.out == "instance 0 -> 2\n"
    assert said.err == "arriero restart: instance 3 ended; the other instances were not touched\n"


@pytest.mark.parametrize("arguments", [["restart"], ["restart", "1", "--rolling"]])
def test_restart_wants_names_or_all(printed: Any, arguments: list[str]) -> None:
    assert run(*arguments) == 2
    assert "use --rolling for all" in printed().err


def test_only_restart_takes_flags_after_dashes(printed: Any) -> None:
    assert run("drain", "1", "--", "--flag") == 2
    assert "drain takes no flags after --" in printed().err
