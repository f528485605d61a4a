"""Tables on standard output."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arriero.tables import output, print_table

words = st.text("abcdefghij0123456789.", min_size=1, max_size=14)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Words of the lines that have any, without the title's and the rule's."""
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    return [line for line in shown if line and line != ["title"] and not line[0].startswith("─")]


HEADINGS = ("system", "first token s", "decode P99 ms", "note")
ROWS = [("arriero", "0.1234", "56.78", "-"), ("a long name of a system", "12", "3", "said")]


def test_what_goes_to_a_file_is_as_wide_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    many = [f"column{n}" for n in range(60)]
    print_table("title", ["name", *many], [["row", *many]])
    assert lines(capsys) == [["name", *many], ["row", *many]]


def test_columns_that_do_not_fit_follow_below_with_the_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "48")
    print_table("title", HEADINGS, ROWS)
    assert lines(capsys) == [
        ["first"],
        ["token", "decode"],
        ["system", "s", "P99", "ms"],
        ["arriero", "0.1234", "56.78"],
        ["a", "long", "name", "of", "a", "system", "12", "3"],
        ["system", "note"],
        ["arriero", "-"],
        ["a", "long", "name", "of", "a", "system", "said"],
    ]


def test_figures_are_aligned_right_and_words_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", HEADINGS, ROWS, left=["note"])
    *_, first, second, _ = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert first.index("56.78") + len("56.78") == second.index(" 3 ") + len(" 3")
    assert first.index("-") == second.index("said")


def test_a_table_without_rows_shows_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["system", "note"], [])
    assert lines(capsys) == [["system", "note"]]


def test_a_table_of_names_alone_has_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("some title", ["name"], [["a"], ["b"]])
    assert capsys.readouterr().out.splitlines()[0] == "some title", "it is wider than the table"


def test_columns_says_how_wide_standard_output_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output().width > 1000
    monkeypatch.setenv("COLUMNS", "77")
    assert output().width == 77


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 120), st.data())
def test_nothing_is_cut_off_at_any_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, data: st.DataObject
) -> None:
    headings = data.draw(st.lists(words, min_size=2, max_size=8))
    cells = st.tuples(*[words] * len(headings))
    rows = data.draw(st.lists(cells, min_size=1, max_size=3))
    monkeypatch.setenv("COLUMNS", str(width))
    print_table("title", headings, rows)
    blocks = lines(capsys)
    tables = [blocks[n : n + len(rows) + 1] for n in range(0, len(blocks), len(rows) + 1)]
    assert all(len(line) >= 2 for table in tables for line in table)
    for number, row in enumerate([headings, *rows]):
        found = [cell for table in tables for cell in table[number][1:]]
        assert [tables[0][number][0], *found] == list(row)
        assert all(table[number][0] == row[0] for table in tables)
