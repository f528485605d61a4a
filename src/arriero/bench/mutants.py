"""Break each rule of the protocol in turn: does a test notice? `make mutants` -> results/mutants.json.

A mutant is a textual patch of a *copy* of the package; tests run against the copy. One of the protocol is tried by
three suites on their own, since a state machine that only ever passes beside unit tests that fail might be vacuous:

- *scripted*: one disturbance at one exact moment, the llumlet alone, and the rules of recovery and draining;
- *walk*: the long seeded walk under chaos;
- *machine*: Hypothesis' state machine, the same rules.

One of the way that KV blocks take is tried by *blocks*: copies, checksums, and damage between two instances.

Every mutant has to be killed by at least one. Run it in the repository's root.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arriero
from arriero.bench import report
from arriero.bench.planted import MUTANTS, Mutant
from arriero.bench.report import Target
from arriero.core.errors import ConfigError

SUITES: dict[str, tuple[str, ...]] = {
    "scripted": (
        "tests/core/test_llumlet.py",
        "tests/core/test_migration_scripted.py",
        "tests/core/test_suspects.py",
        "tests/core/test_draining.py",
        "tests/core/test_restarts.py",
        "tests/core/test_watchdog.py",
    ),
    "walk": ("tests/core/test_migration_protocol.py::test_walk_keeps_every_law_and_reaches_every_outcome",),
    "machine": ("tests/core/test_migration_protocol.py::TestMigrationMachine",),
    "blocks": ("tests/transport", "tests/vllm/test_worker_copies.py", "tests/e2e/test_damaged_blocks.py"),
}
SURVIVED = "survived"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one suite made of one mutant."""

    killed_by: str | None  #: the first test that failed
    cpu_s: float


def patch(text: str, mutant: Mutant) -> str:
    """``text`` with the fault in it. ConfigError unless each old passage is there exactly once."""
    for old, new in mutant.edits:
        found = text.count(old)
        if found != 1:
            raise ConfigError(
                f"mutant {mutant.name!r}: {found} passages of {mutant.file} match, 1 must; adapt it to the code:\n{old}"
            )
        text = text.replace(old, new)
    compile(text, mutant.file, "exec")
    return text


@contextmanager
def overlay(mutant: Mutant | None) -> Iterator[Path]:
    """A directory to put first on the path: ``arriero`` with the mutant's fault, or as it is."""
    package = Path(arriero.__file__).parent
    with tempfile.TemporaryDirectory(prefix="arriero-mutant-") as name:
        copy = Path(name) / "arriero"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = copy / mutant.file
            file.write_text(patch(file.read_text(), mutant))
        yield Path(name)


def run(suite: Sequence[str], path: Path, limit_s: int) -> Outcome:
    """Run the tests against the package under ``path``, up to the first failure.

    ``limit_s`` is CPU time: on a busy machine, or while stopped, a test may take any time without having failed.
    """
    env = os.environ | {
        "PYTHONPATH": str(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ARRIERO_HYPOTHESIS": "unshrunk",
        "COLUMNS": "300",  # pytest cuts the names in its summary at the terminal's width
    }
    where = subprocess.run(
        [sys.executable, "-c", "import arriero.core as core; print(core.__path__[0])"],
        env=env, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if Path(where).parent.parent.resolve() != path.resolve():
        raise ConfigError(f"the tests would import arriero.core from {where}, not from the mutant in {path}")
    options = ("-x", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", "-o", "timeout=0")
    began_s = _cpu_of_children()
    limited = ["bash", "-c", 'ulimit -t "$1"; shift; exec "$@"', "limit", str(limit_s)]
    pytest = [sys.executable, "-m", "pytest", *options, *suite]
    done = subprocess.run([*limited, *pytest], env=env, capture_output=True, text=True, check=False)
    cpu_s = round(_cpu_of_children() - began_s, 2)
    failed = re.search(r"^FAILED \S*?::(.*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return Outcome(killed_by=None, cpu_s=cpu_s)
    if done.returncode == 1 and failed:
        return Outcome(killed_by=failed[1], cpu_s=cpu_s)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL) and cpu_s >= limit_s - 1:
        return Outcome(killed_by=f"no end after {limit_s} s of CPU", cpu_s=cpu_s)
    raise ConfigError(f"the tests did not run (pytest's exit code {done.returncode}):\n{done.stdout}{done.stderr}")


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def try_suites(mutant: Mutant | None, suites: Sequence[str], limit_s: int) -> dict[str, Outcome]:
    """The outcome of each suite; ``mutant`` None: the code as it is, which must pass."""
    with overlay(mutant) as path:
        return {name: run(SUITES[name], path, limit_s) for name in suites if mutant is None or is_for(name, mutant)}


def is_for(suite: str, mutant: Mutant) -> bool:
    """Whether the suite is about what the mutant breaks."""
    return (suite == "blocks") != mutant.file.startswith("core/")


def sample_of(mutant: Mutant, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """One mutant's entry in the result."""
    return {
        "mutant": mutant.name,
        "file": mutant.file,
        "killed": any(o.killed_by for o in outcomes.values()),
        "suites": {name: {"killed_by": o.killed_by, "cpu_s": o.cpu_s} for name, o in outcomes.items()},
    }


def row_of(sample: dict[str, Any]) -> dict[str, Any]:
    """One mutant's line in the table: the killing test, and which suites find it alone."""
    suites = sample["suites"]
    killers = [o["killed_by"] for o in suites.values() if o["killed_by"]]
    seconds = dict.fromkeys(SUITES, "") | {
        name: f"{o['cpu_s']:.1f} s" if o["killed_by"] else "-" for name, o in suites.items()
    }
    return {"mutant": sample["mutant"], "killed_by": killers[0] if killers else SURVIVED.upper(), **seconds}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m arriero.bench.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants with one of these words in their name")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES), help="(default: all)")
    parser.add_argument("--limit", type=int, default=120, help="s of CPU a suite; then it hangs (default: 120)")
    return parser


def try_all(mutants: Sequence[Mutant], suites: Sequence[str], limit_s: int) -> list[dict[str, Any]]:
    """A sample for each mutant, once the suites have passed without any."""
    for name, outcome in try_suites(None, suites, limit_s).items():
        if outcome.killed_by:
            raise ConfigError(f"suite {name} fails without any mutant, at {outcome.killed_by}: mend that first")
    samples = []
    for mutant in mutants:
        samples.append(sample_of(mutant, try_suites(mutant, suites, limit_s)))
        print(f"{'killed' if samples[-1]['killed'] else SURVIVED}: {mutant.name}", file=sys.stderr, flush=True)
    return samples


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every mutant was killed, 1 if one survived, 2 if they could not be tried."""
    args = _parser().parse_args(argv)
    chosen = [m for m in MUTANTS if not args.only or any(word in m.name for word in args.only)]
    chosen = [m for m in chosen if any(is_for(suite, m) for suite in args.suites)]
    try:
        samples = try_all(chosen, args.suites, args.limit)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    num_killed = sum(s["killed"] for s in samples)
    targets = [Target.at_least("mutants killed", num_killed, len(samples))]
    report.write("mutants", samples, targets)
    report.print_table("mutants", [row_of(s) for s in samples], targets)
    return 0 if num_killed == len(samples) else 1


# ---------------------------------------------------------------------- the faults


if __name__ == "__main__":
    sys.exit(main())
