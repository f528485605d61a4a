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
    assert sum(json.loads(line)["event"] == "finish" for line in events.splitlines()[1:]) == 60
    assert simulate(*arguments) == 0
    again = json.loads(capsys.readouterr().out)["policies"]["freeness"]
    assert {k: v for k, v in first.items() if k != "cpu_s"} == {k: v for k, v in again.items() if k != "cpu_s"}
    assert log.read_bytes() == events


def test_prompts_in_parts_that_fit_into_a_target_let_streams_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    longest: dict[str, float] = {}
    for target in ("0", "200"):
        arguments = [AZURE, "--profile", "cpu-smollm2", "--instances", "8", "--itl-target-ms", target, "--json"]
        assert simulate(*arguments, "--policy", "round_robin") == 0
        result = json.loads(capsys.readouterr().out)["policies"]["round_robin"]
        longest[target] = result["tpot_s"]["p99"]
    assert longest["200"] < longest["0"]


def test_instances_die(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    arguments = [AZURE, "--instances", "2", "--kill", "9:1", "--kill", "5:0", "--events", str(log)]
    assert simulate(*arguments) == 0
    lines = {line.strip().partition("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["lost instances"][-1] == "2"
    assert int(lines["replays"][-1]) > 0
    events = log.read_bytes()
    assert simulate(*arguments) == 0
    assert log.read_bytes() == events
    capsys.readouterr()
    assert simulate(AZURE, "--instances", "2") == 0
    assert "replays" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill", "30"], "--kill 30 is invalid: give a time in seconds and an instance, as in --kill 30:2"),
        (["--kill=-1:2"], "--kill -1:2 is invalid: the time must be 0 or more seconds"),
        (["--kill", "30:16"], "--kill 30:16 is invalid: there is no instance 16 at that time, name one from 0 to 15"),
        (["--horizon", "5"], "--horizon 5 is for --policy clairvoyant: no other policy knows the future"),
        (["--policy", "clairvoyant", "--horizon", "-5"], "horizon_s=-5.0 is invalid: it must be 0 or more seconds"),
    ],
)
def test_bad_futures_give_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(AZURE, *arguments) == 2
    assert capsys.readouterr().err == f"arriero simulate: {message}\n"


def test_the_horizon_counts(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for horizon in ("0", "5"):
        arguments = ["--workload", "M-M", "--rate", "1.6", "--num-requests", "200", "--instances", "2", "--json"]
        assert simulate(*arguments, "--policy", "clairvoyant", "--horizon", horizon) == 0
        found.append(json.loads(capsys.readouterr().out)["policies"]["clairvoyant"]["ttft_s"]["mean"])
    assert found[0] != found[1]


def test_several_policies_have_a_log_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        simulate(AZURE, "--policy", "freeness,arriero", "--events", str(tmp_path / "log"), "--num-requests", "5") == 0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.arriero", "log.freeness"]
    assert "5 requests" in capsys.readouterr().out


def test_a_log_is_simulated_again_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log of a run, taken as a workload, gives that log again."""
    logs = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    arguments = ["--policy", "freeness", "--instances", "3", "--json"]
    workload = ["--workload", "S-S", "--rate", "20", "--num-requests", "80", "--high-priority", "0.2"]
    assert simulate(*workload, *arguments, "--events", str(logs[0])) == 0
    first = json.loads(capsys.readouterr().out)
    assert simulate(str(logs[0]), *arguments, "--events", str(logs[1])) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["workload"] == "first"
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert again["policies"]["freeness"][name] == pytest.approx(first["policies"]["freeness"][name], rel=1e-9)
    assert len(logs[0].read_bytes().splitlines()) == len(logs[1].read_bytes().splitlines())


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    arguments = ["--workload", "M-M", "--rate", "9", "--num-requests", "200", "--instances", "3", "--kv-tokens", "8000"]
    assert simulate(*arguments, "--policy", "round_robin,arriero", "--plot", str(path)) == 0
    assert "round_robin" in capsys.readouterr().out
    written = path.read_bytes()
    assert written.startswith(b"\x89PNG" if suffix == "png" else b"<!doctype html>")
    assert len(written) > 20_000
    assert suffix == "png" or b"://" not in written, "the page needs nothing beside it"


@pytest.mark.parametrize("trace", [AZURE, str(files("arriero") / "data" / "mooncake_conversation_200.csv")])
def test_prefixes_are_cached_where_a_trace_has_them(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    hits = []
    for flag in ([], ["--no-prefix-caching"], ["--prefix-caching"]):
        assert simulate(trace, "--instances", "4", "--profile", "llama2-7b_a100", "--json", *flag) == 0
        hits.append(json.loads(capsys.readouterr().out)["policies"]["arriero"]["prefix_hit"])
    has_prefixes = "mooncake" in trace
    assert hits[1] is None
    assert (hits[0] is not None) is has_prefixes
    assert (hits[2] > 0.01) is has_prefixes


def test_the_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--profile", "list") == 0
    assert "llama-7b_a10" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a trace or --workload"),
        ([AZURE, "--cv", "2"], "--cv 2.0 is for --workload"),
        ([AZURE, "--high-priority", "0.1"], "--high-priority 0.1 is for --workload"),
        ([AZURE, "--plot", "a.svg"], "--plot a.svg: the name must end with .png or .html"),
        ([AZURE, "--plot", "/no/such/a.png"], "there is no folder /no/such"),
        ([AZURE, "--profile", "none.json"], "profile none.json cannot be read"),
        (["M-M", "--rate", "2"], "there is no file M-M: for the class of that name say --workload M-M"),
        ([AZURE, "--workload", "S-S"], "give either a trace or --workload"),
        ([AZURE, "--rate", "2"], "--rate 2.0 is for --workload"),
        (["--workload", "S-S"], "needs --rate"),
        (["--workload", "S-S", "--rate", "0"], "rate=0.0 is invalid"),
        ([AZURE, "--policy", "magic"], "policy 'magic' is unknown"),
        ([AZURE, "--profile", "abacus"], "profile 'abacus' is unknown"),
        ([AZURE, "--itl-target-ms", "-1"], "itl_target_s=-0.001 is invalid: it must be 0 or more seconds"),
        ([AZURE, "--itl-target-ms", "90", "--prefill-first"], "--itl-target-ms 90: --prefill-first computes prompts"),
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
