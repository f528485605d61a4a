"""Who may import whom (docs: architecture, "Layers"), read from the source: imports inside functions count too.

Imports under ``if TYPE_CHECKING`` do not run and do not count. ``importlib.import_module("a.b")`` counts.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"arriero", "arriero.core"}),
    frozenset({"arriero.wire", "arriero.tables"}),
    frozenset({"arriero.frontend", "arriero.launch", "arriero.transport", "arriero.observe"})
    | {"arriero.workload", "arriero.dashboard"},
    frozenset({"arriero.vllm", "arriero.sim", "arriero.bench", "arriero.model", "arriero.chaos"}),
    frozenset({"arriero.cli"}),
)
"""From the bottom up. A part may import its own layer and those below; inside a layer there are no cycles of parts."""

PURE = frozenset(
    {
        "__future__", "abc", "bisect", "collections", "copy", "dataclasses", "enum", "fractions", "functools",
        "heapq", "itertools", "math", "numbers", "operator", "random", "re", "statistics", "string", "types", "typing",
    }
)  # fmt: skip
"""All that core may use of the standard library: no clock, no I/O, no concurrency, nothing of the machine."""

ALLOWED_IN_CORE = {"arriero.core.dispatch": {"importlib"}}  # a user's policy by its dotted path
IO_BUILTINS = {"open", "print", "input", "exec", "eval", "__import__"}

HEAVY: dict[str, tuple[str, ...]] = {
    "vllm": ("arriero.vllm",),
    "torch": ("arriero.vllm",),
    "safetensors.torch": ("arriero.vllm",),
    "ray": ("arriero.launch.ray",),
}
"""Third-party modules that only some parts of the package may import."""

CONVERTER = "arriero.model.bundled"
"""Writes bf16 weights, which numpy cannot: inside the one function that does it, and for nothing else, torch."""

PUBLIC_VLLM = {"vllm.platforms", "vllm.envs"}
COMPAT = "arriero.vllm.compat"
COMMANDS = {"arriero.vllm.calibrate", "arriero.vllm.server"}
"""What of `vllm/` the command line may import: one module a command."""

Sources = Mapping[str, str]
"""Module name -> source text. A package goes by its own name."""


@dataclass(frozen=True)
class Import:
    """``importer`` imports ``name`` from ``module`` (or ``module`` itself, with name None) at ``line``."""

    importer: str
    module: str
    name: str | None
    line: int
    in_function: bool = False

    @property
    def dotted(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.dotted}"


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


# ---------------------------------------------------------------------- reading


def sources_of(root: Path) -> dict[str, str]:
    """All modules under ``root``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports_of(module: str, source: str, *, is_package: bool) -> Iterator[Import]:
    """Every import in ``source`` that can run, at whatever depth."""
    package = module if is_package else module.rpartition(".")[0]
    for node, deep in _that_run(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(module, alias.name, None, node.lineno, deep)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    parent = package.split(".")[: len(package.split(".")) - level + 1]
                    base = ".".join(parent + ([base] if base else []))
                for alias in names:
                    yield Import(module, base or "", alias.name, node.lineno, deep)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func) in {"importlib.import_module", "import_module", "__import__"}:
                    yield Import(module, name, None, node.lineno, deep)


def _that_run(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below ``node``, and whether inside a function; without the bodies of ``if TYPE_CHECKING``."""
    deep = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    children: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) in {
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        }
        children += child.orelse if is_for_types else [child]  # type: ignore[attr-defined]
    for child in children:
        yield child, deep
        yield from _that_run(child, deep)


def all_imports(sources: Sources) -> list[Import]:
    return [
        found
        for module, source in sources.items()
        for found in imports_of(module, source, is_package=any(m.startswith(module + ".") for m in sources))
    ]


def target(found: Import, sources: Sources) -> str | None:
    """The module of ours that an import leads to."""
    name = found.dotted
    while name not in sources:
        name = name.rpartition(".")[0]
        if not name:
            return None
    return name


# ---------------------------------------------------------------------- the rules


def core_is_pure(sources: Sources) -> list[str]:
    """core imports itself and the pure part of the standard library; randomness comes in as an argument."""
    core = {m: s for m, s in sources.items() if within(m, "arriero.core")}
    wrong = []
    for found in all_imports(core):
        top = found.module.partition(".")[0]
        if within(found.dotted, "arriero.core") or top in ALLOWED_IN_CORE.get(found.importer, ()):
            continue
        if top not in PURE or (found.module == "random" and found.name not in (None, "Random")):
            wrong.append(str(found))
    for module, source in core.items():
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Attribute(value=ast.Name(id="random"), attr=attribute) if attribute != "Random":
                    wrong.append(f"{module}:{node.lineno} uses the global random.{attribute}")
                case ast.Call(func=ast.Name(id=name)) if name in IO_BUILTINS:
                    wrong.append(f"{module}:{node.lineno} calls {name}()")
    return wrong


def heavy_modules_stay_in_their_part(sources: Sources) -> list[str]:
    """vLLM and torch under arriero.vllm only, ray in its launcher only."""
    return [
        f"{found}: only {' and '.join(parts)} may"
        for found in all_imports(sources)
        for heavy, parts in HEAVY.items()
        if within(found.dotted, heavy)
        and not any(within(found.importer, part) for part in parts)
        and not (found.importer == CONVERTER and found.in_function and heavy in ("torch", "safetensors.torch"))
    ]


def only_compat_names_private_vllm(sources: Sources) -> list[str]:
    """The other files take from vLLM what it documents, and the rest from compat."""
    return [
        f"{found}: only {COMPAT} may"
        for found in all_imports(sources)
        if within(found.module, "vllm")
        and found.importer != COMPAT
        and found.module not in PUBLIC_VLLM
        and found.dotted not in PUBLIC_VLLM
    ]


def layer_of(module: str) -> int:
    """Number of a module's layer; -1 if it has none."""
    part = ".".join(module.split(".")[:2])
    return next((number for number, parts in enumerate(LAYERS) if part in parts), -1)


def layers_look_down(sources: Sources) -> list[str]:
    """No import leads to a higher layer, and of arriero.vllm the command line knows the server alone."""
    wrong = [f"{module} has no layer: add its part to LAYERS" for module in sources if layer_of(module) < 0]
    for found in all_imports(sources):
        to = target(found, sources)
        if to is None:
            continue
        if layer_of(to) > layer_of(found.importer):
            wrong.append(f"{found}: a higher layer")
        if within(found.importer, "arriero.cli") and within(to, "arriero.vllm") and to not in COMMANDS:
            wrong.append(f"{found}: the command line knows {' and '.join(sorted(COMMANDS))} alone")
    return wrong


def no_cycles(sources: Sources) -> list[str]:
    """Neither among modules nor among parts of the package."""
    modules: dict[str, set[str]] = {module: set() for module in sources}
    for found in all_imports(sources):
        to = target(found, sources)
        if to is not None and to != found.importer:
            modules[found.importer].add(to)
    parts: dict[str, set[str]] = {}
    for module, targets in modules.items():
        part = ".".join(module.split(".")[:2])
        parts.setdefault(part, set()).update({".".join(t.split(".")[:2]) for t in targets} - {part})
    wrong = []
    for graph in (modules, parts):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            wrong.append("cycle: " + " <- ".join(error.args[1]))
    return wrong


RULES = (core_is_pure, heavy_modules_stay_in_their_part, only_compat_names_private_vllm, layers_look_down, no_cycles)


@pytest.fixture(scope="module")
def ours() -> Sources:
    return sources_of(SOURCE)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(ours: Sources, rule) -> None:  # type: ignore[no-untyped-def]
    assert rule(ours) == []


# ---------------------------------------------------------------------- does the checker see anything?

PACKAGE: Sources = {
    name: ""
    for name in (
        "arriero",
        "arriero.core",
        "arriero.core.load",
        "arriero.core.types",
        "arriero.frontend",
        "arriero.frontend.links",
        "arriero.launch",
        "arriero.launch.port",
        "arriero.sim",
        "arriero.sim.engine",
        "arriero.vllm",
        "arriero.vllm.compat",
        "arriero.vllm.engine",
        "arriero.vllm.server",
        "arriero.cli",
    )
}


def broken_rules(planted: Sources) -> set[str]:
    return {rule.__name__ for rule in RULES if rule({**PACKAGE, **planted})}


BAD = {
    "a module that is not pure": ("core_is_pure", {"arriero.core.load": "import time"}),
    "part of a module": ("core_is_pure", {"arriero.core.load": "from asyncio import sleep"}),
    "third party": ("core_is_pure", {"arriero.core.load": "import msgspec"}),
    "inside a function": ("core_is_pure", {"arriero.core.load": "def f():\n    import socket"}),
    "inside a method, behind a condition": (
        "core_is_pure",
        {"arriero.core.load": "class A:\n    def f(self):\n        if self:\n            import logging"},
    ),
    "by a string": ("core_is_pure", {"arriero.core.dispatch": "importlib.import_module('socket')"}),
    "importlib elsewhere": ("core_is_pure", {"arriero.core.load": "import importlib"}),
    "global random": ("core_is_pure", {"arriero.core.load": "import random\nrandom.shuffle([])"}),
    "a global random function": ("core_is_pure", {"arriero.core.load": "from random import choice"}),
    "a file": ("core_is_pure", {"arriero.core.load": "open('state')"}),
    "torch beside the KV tensors": (
        "heavy_modules_stay_in_their_part",
        {"arriero.launch.port": "def f():\n    import torch.nn"},
    ),
    "torch behind safetensors": (
        "heavy_modules_stay_in_their_part",
        {"arriero.sim.engine": "from safetensors.torch import save_file"},
    ),
    "torch as the converter is imported": (
        "heavy_modules_stay_in_their_part",
        {"arriero.model.bundled": "import torch"},
    ),
    "vLLM in the converter": (
        "heavy_modules_stay_in_their_part",
        {"arriero.model.bundled": "def f():\n    from vllm import envs"},
    ),
    "ray": ("heavy_modules_stay_in_their_part", {"arriero.launch.port": "import ray"}),
    "vLLM's private modules": (
        "only_compat_names_private_vllm",
        {"arriero.vllm.engine": "from vllm.v1.engine import EngineCoreRequest"},
    ),
    "vLLM as a whole": ("only_compat_names_private_vllm", {"arriero.vllm.engine": "import vllm"}),
    "below a public module": (
        "only_compat_names_private_vllm",
        {"arriero.vllm.engine": "from vllm.platforms.cpu import CpuPlatform"},
    ),
    "upwards": ("layers_look_down", {"arriero.frontend.links": "from arriero.sim.engine import SimEngine"}),
    "upwards, relative": ("layers_look_down", {"arriero.frontend.links": "from ..sim import engine"}),
    "upwards, the package itself": ("layers_look_down", {"arriero": "from arriero.cli import main"}),
    "past the server": ("layers_look_down", {"arriero.cli": "from arriero.vllm.engine import main"}),
    "no layer": ("layers_look_down", {"arriero.utils": ""}),
    "a cycle": (
        "no_cycles",
        {
            "arriero.core.load": "from arriero.core.types import InstanceId",
            "arriero.core.types": "def f():\n    from arriero.core import load",
        },
    ),
    "a cycle of parts, though not of modules": (
        "no_cycles",
        {
            "arriero.frontend.links": "import arriero.launch.port",
            "arriero.launch.local": "import arriero.frontend.cluster",
            "arriero.frontend.cluster": "",
        },
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_checker_sees_a_planted_import(case: str) -> None:
    rule, planted = BAD[case]
    assert broken_rules(planted) == {rule}


def test_the_checker_sees_a_module_of_core_that_looks_up_as_both_impure_and_upwards() -> None:
    assert broken_rules({"arriero.core.load": "import arriero.cli"}) == {"core_is_pure", "layers_look_down"}


GOOD: Sources = {
    "arriero.core.load": "from __future__ import annotations\nimport random\nrandom.Random(1).random()",
    "arriero.core.types": "import arriero.core.load\nfrom collections.abc import Set\nfrom random import Random",
    "arriero.core.dispatch": "import importlib\nimportlib.import_module(name)",
    "arriero.launch.port": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch, arriero.cli",
    "arriero.frontend.links": "import zmq\nfrom arriero.launch.port import Launcher\nfrom ..core import types",
    "arriero.vllm.compat": "import vllm.v1.core, torch",
    "arriero.vllm.engine": "import torch\nfrom vllm import envs\nfrom vllm.platforms import current_platform\n"
    "from arriero.vllm import compat\nfrom arriero.vllm.compat import Request",
    "arriero.vllm.server": "from . import engine",
    "arriero.model.bundled": "def f():\n    import torch",
    "arriero.cli": "from arriero import __version__\ndef f():\n    from arriero.vllm.server import main",
}


def test_the_checker_lets_good_imports_pass() -> None:
    assert broken_rules(GOOD) == set()


def test_the_other_branch_of_a_type_checking_block_counts() -> None:
    source = "import typing\nif typing.TYPE_CHECKING:\n    import torch\nelse:\n    import socket"
    found = {i.dotted for i in imports_of("arriero.core.load", source, is_package=False)}
    assert found == {"typing", "socket"}


def test_relative_imports_count_from_their_package() -> None:
    source = "from . import a\nfrom .b import c\nfrom .. import d"
    inside = {i.dotted for i in imports_of("arriero.sim.engine", source, is_package=False)}
    assert inside == {"arriero.sim.a", "arriero.sim.b.c", "arriero.d"}
    package = {i.dotted for i in imports_of("arriero.sim", source, is_package=True)}
    assert package == {"arriero.sim.a", "arriero.sim.b.c", "arriero.d"}


def test_the_checker_reads_the_whole_package(ours: Sources) -> None:
    assert {"arriero", "arriero.core.scheduler", "arriero.vllm.compat", "arriero.cli"} <= set(ours)
    assert any(i.importer == COMPAT and i.module == "vllm.version" for i in all_imports(ours))
