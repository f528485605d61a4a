"""`arriero simulate`, as a sub-command."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

import pytest

from arriero.sim import cli

AZURE = str(files("arriero") / "data" / "azure2023_conv_200.csv")


def simulate(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["simulate", *arguments])
    code: int = args.run(args)
    return code


def test_policies_are_compared_on_the_same_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(AZURE, "--policy", "round_robin, arriero", "--instances", "2") == 0
    output = capsys.readouterr().out
    assert "azure2023_conv_200: 200 requests" in output
    lines = {line.strip().partition("  ")[0]: line for line in output.splitlines()}
    assert len(lines["prefill mean s"].split()) == 5
    assert "round_robin" in output
    assert len(lines["request P99 s"].split()) == 5


def test_json_and_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("old\n")
    arguments = ["--workload", "S-L", "--rate", "3", "--num-requests", "60", "--high-priority", "0.5", "--json"]
    arguments += ["--events", str(log), "--policy", "freeness", "--instances", "2", "--kv-tokens", "8000", "--cv", "4"]
    assert simulate(*arguments) == 0
    first = json.loads(capsys.readouterr().out)["policies"]["freeness"]
    assert first["num_requests"] == 60
    assert set(first["by_priority"]) == {"-1", "0"}
    events = log.read_bytes()
    assert sum(json.loads(line)["event"] == "finish" for line in events.splitlines()) == 60
    assert simulate(*arguments) == 0
    again = json.loads(capsys.readouterr().out)["policies"]["freeness"]
    assert {k: v for k, v in first.items() if k != "cpu_s"} == {k: v for k, v in again.items() if k != "cpu_s"}
    assert log.read_bytes() == events


def test_several_policies_have_a_log_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        simulate(AZURE, "--policy", "freeness,arriero", "--events", str(tmp_path / "log"), "--num-requests", "5") == 0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.arriero", "log.freeness"]
    assert "5 requests" in capsys.readouterr().out


def test_the_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--profile", "list") == 0
    assert "llama-7b_a10" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a trace or --workload"),
        ([AZURE, "--workload", "S-S"], "give either a trace or --workload"),
        ([AZURE, "--rate", "2"], "--rate 2.0 is for --workload"),
        (["--workload", "S-S"], "needs --rate"),
        (["--workload", "S-S", "--rate", "0"], "rate=0.0 is invalid"),
        ([AZURE, "--policy", "magic"], "policy 'magic' is unknown"),
        ([AZURE, "--profile", "abacus"], "profile 'abacus' is unknown"),
        ([AZURE, "--instances", "0"], "num_instances=0 is invalid"),
        (["/nowhere.csv"], "trace /nowhere.csv cannot be read"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("arriero simulate: ")
    assert message in error
    assert error.count("\n") == 1
