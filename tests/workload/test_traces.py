"""Traces: read, written, and refused with the place of the error."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path

import pytest

from arriero.core.errors import ConfigError
from arriero.workload.traces import read_columns, read_trace, write_trace
from arriero.workload.workload import Arrival, make_workload

DATA = Path(str(files("arriero") / "data"))
HEADER = "arrival_s,prompt_tokens,output_tokens"


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_azure_excerpt() -> None:
    workload = read_trace(DATA / "azure2023_conv_200.csv")
    assert (workload.name, len(workload.arrivals)) == ("azure2023_conv_200", 200)
    assert workload.arrivals[:2] == [Arrival(0.0, 374, 44), Arrival(4.3146, 396, 109)]


def test_the_mooncake_excerpt_has_prefix_runs() -> None:
    arrivals = read_trace(DATA / "mooncake_conversation_200.csv").arrivals
    assert arrivals[1] == Arrival(0.0, 7322, 490, 0, ((0, 0), (14, 27)))


def test_a_gzipped_trace_and_its_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(f"{HEADER},ttft_s\n1,2,3,0.25\n4,5,6,0.5\n".encode()))
    workload = read_trace(path)
    assert (workload.name, workload.arrivals) == ("trace", [Arrival(1.0, 2, 3), Arrival(4.0, 5, 6)])
    assert read_columns(path, ["ttft_s"]) == {"ttft_s": [0.25, 0.5]}
    for broken in (path.read_bytes()[:20], b"no gzip"):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(path)


def test_fields_may_stand_in_any_order_beside_others_and_the_reading_may_stop_early(tmp_path: Path) -> None:
    path = write(tmp_path, "x,output_tokens,priority,prompt_tokens,arrival_s", "a,2,-1,3,0.5", "b,2,0,3,0.75", "c")
    assert read_trace(path, limit=2).arrivals == [Arrival(0.5, 3, 2, -1), Arrival(0.75, 3, 2)]


@pytest.mark.parametrize("source", ["generated", "azure2023_conv_200.csv", "mooncake_conversation_200.csv"])
def test_what_was_written_is_read_back(tmp_path: Path, source: str) -> None:
    if source == "generated":
        workload = make_workload("M-M", num_requests=100, rate=3, cv=4, priorities={-1: 0.2})
    else:
        workload = read_trace(DATA / source)
    write_trace(tmp_path / "again.csv", workload.arrivals)
    assert read_trace(tmp_path / "again.csv").arrivals == workload.arrivals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("soon,1,1", "line 3: arrival_s='soon' is invalid: it must be seconds, 0 or more"),
        ("-1,1,1", "line 3: arrival_s='-1'"),
        ("nan,1,1", "line 3: arrival_s='nan'"),
        ("inf,1,1", "line 3: arrival_s='inf'"),
        ("5,0,1", "line 3: prompt_tokens='0' is invalid: it must be a whole number of tokens, 1 or more"),
        ("5,1,2.5", "line 3: output_tokens='2.5'"),
        ("5,1,", "line 3: output_tokens=''"),
        ("5,1", "line 3: 2 fields, but the header has 3"),
        ("0.5,1,1", "line 3: arrival_s='0.5' is invalid: it must be at least 1.0, as the line before"),
    ],
)
def test_a_malformed_line_is_named_with_field_and_value(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, HEADER, "1,1,1", line)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"trace {path}, ")
    assert message in str(caught.value)


def test_targets_may_be_missing_and_are_written_back(tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER},ttft_target_s", "1,1,1,0.5", "1,1,1,")
    workload = read_trace(path)
    assert [a.ttft_target_s for a in workload.arrivals] == [0.5, None]
    write_trace(tmp_path / "again.csv", workload.arrivals)
    assert read_trace(tmp_path / "again.csv").arrivals == workload.arrivals
    with pytest.raises(ConfigError, match="line 2: ttft_target_s='0' is invalid: it must be seconds, more than 0"):
        read_trace(write(tmp_path, f"{HEADER},ttft_target_s", "1,1,1,0"))


@pytest.mark.parametrize("ids", ["a", "3-1", "1,2", "1-"])
def test_malformed_hash_ids(tmp_path: Path, ids: str) -> None:
    path = write(tmp_path, f"{HEADER},hash_ids", f'1,1,1,"{ids}"')
    with pytest.raises(ConfigError, match=f"line 2: hash_ids='{ids}'"):
        read_trace(path)


def test_more_hash_ids_than_the_prompt_has_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, f"{HEADER},hash_ids", "1,513,1,0-1", "2,512,1,0 7")
    with pytest.raises(ConfigError, match="line 3: hash_ids='0 7' is invalid: it must be at most 1 ids"):
        read_trace(path)


def test_a_missing_field_a_missing_file_and_no_text_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: no field 'output_tokens' in the header 'arrival_s,prompt_tokens'"):
        read_trace(write(tmp_path, "arrival_s,prompt_tokens", "1,1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "binary.csv")
    with pytest.raises(ConfigError, match="no field 'arrival_s'"):
        read_trace(write(tmp_path, ""))
