"""Break each rule of the protocol in turn: does a test notice? `make mutants` -> results/mutants.json.

A mutant is a textual patch of a *copy* of ``arriero.core``; the protocol's tests run against the copy.
Each is tried by three suites on their own, since a state machine that only ever passes beside unit tests
that fail might be vacuous:

- *scripted*: one disturbance at one exact moment, the llumlet alone, and the rules of recovery and draining;
- *walk*: the long seeded walk under chaos;
- *machine*: Hypothesis' state machine, the same rules.

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
}
SURVIVED = "survived"


class Mutant:
    """A fault: ``edits`` are pairs of an old passage, there exactly once, and what replaces it."""

    def __init__(self, name: str, file: str, *edits: tuple[str, str]) -> None:
        self.name = name
        self.file = file  #: under arriero/core
        self.edits = edits


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
        copy.mkdir()
        shutil.copy(package / "__init__.py", copy)
        shutil.copytree(package / "core", copy / "core", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            file = copy / "core" / mutant.file
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
        return {name: run(SUITES[name], path, limit_s) for name in suites}


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
    seconds = {name: f"{o['cpu_s']:.1f} s" if o["killed_by"] else "-" for name, o in suites.items()}
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

MUTANTS = (
    # The commit point
    Mutant(
        "resume on commit timeout",
        "migration.py",
        (
            """        if self.state is State.COMMITTING or self._poll_s is not None:
""",
            """        if self.state is State.COMMITTING:
            return self._uncommit("commit timeout", now)
        if self._poll_s is not None:
""",
        ),
    ),
    Mutant(
        "resume when the destination has delivered",
        "migration.py",
        (
            "        delivered = len(self._tokens) > self._handover.num_output_tokens\n",
            "        delivered = False\n",
        ),
    ),
    Mutant(
        "resume or replay what has finished at the destination",
        "migration.py",
        (
            """        self._wanted = False
        if self.state is State.COMMITTING:
            return []""",
            """        if self.state is State.COMMITTING:
            return []
        self._wanted = False
        if not self.state:
            return []""",
        ),
    ),
    Mutant(
        "commit after abort: DROP is acknowledged, the reservation stays",
        "destination.py",
        ('            self._end_incoming(incoming, "dropped", now)\n', "            pass\n"),
    ),
    Mutant(
        "commit after abort: a refused COMMIT may succeed when asked again",
        "destination.py",
        (
            """            incoming.state, incoming.end_reason = _In.DROPPING, "an import is running"
            raise ProtocolError(incoming.end_reason)
""",
            """            raise ProtocolError("an import is running")
""",
        ),
    ),
    Mutant(
        "commit forgotten while the request runs",
        "destination.py",
        ("if incoming.state is _In.COMMITTED and self._engine.find(incoming.request_id) is not None:", "if False:"),
    ),
    Mutant(
        "route not switched back when COMMIT is refused",
        "migration.py",
        ("                before = [Route(self._source)]\n", "                before = []\n"),
    ),
    Mutant(
        "a hand-over that disagrees with the token log is committed",
        "migration.py",
        ("        if answer.num_output_tokens != len(self._tokens):\n", "        if False:\n"),
    ),
    # The source
    Mutant(
        "free before commit",
        "source.py",
        (
            "                outgoing.state, outgoing.answer = _Out.DETACHED, answer\n",
            """                outgoing.state, outgoing.answer = _Out.DETACHED, answer
                self._engine.release(detach.request_id)
""",
        ),
    ),
    Mutant(
        "last block not copied",
        "source.py",
        (
            "        end = -(-num_computed // self._engine.block_size)\n",
            "        end = num_computed // self._engine.block_size\n",
        ),
    ),
    Mutant(
        "missing epoch check",
        "source.py",
        ("        if epoch >= 0 and status.epoch != epoch:\n", "        if False:\n"),
    ),
    Mutant(
        "duplicate token on late output: hand over under a step in flight",
        "source.py",
        ("        if status is not None and status.in_flight:\n", "        if False:\n"),
    ),
    Mutant(
        "double release: no tombstone, no owner",
        "source.py",
        (
            """        if outgoing.state is _Out.ENDED:
            outgoing.seen_s = now
            if outgoing.released""",
            """        if outgoing.state is _Out.ENDED and not released:
            outgoing.seen_s = now
            if outgoing.released""",
        ),
        (
            """        if released and self._frozen.get(message.request_id) == migration_id:
            del self._frozen[message.request_id]
""",
            """        if released:
            self._frozen.pop(message.request_id, None)
""",
        ),
    ),
    Mutant(
        "release of what another migration holds",
        "source.py",
        (
            """        if released and self._frozen.get(message.request_id) == migration_id:
            del self._frozen[message.request_id]
""",
            """        if released:
            self._frozen.pop(message.request_id, None)
""",
        ),
    ),
    Mutant(
        "a detached request resumes by itself when its lease runs out",
        "source.py",
        (
            "            if outgoing.state is _Out.COPYING and age > self._config.lease_s:\n",
            "            if outgoing.state in (_Out.COPYING, _Out.DETACHED) and age > self._config.lease_s:\n",
        ),
    ),
    Mutant(
        "a repeated COPY exports again",
        "source.py",
        (
            "        if outgoing.answer is not None and message.first != outgoing.answer.end:\n",
            "        if False:\n",
        ),
    ),
    Mutant(
        "staging memory freed under an export",
        "source.py",
        (
            """        if not outgoing.exporting:
            self._engine.close_export(migration_id)
""",
            """        self._engine.close_export(migration_id)
""",
        ),
    ),
    Mutant(
        "staging memory leaks",
        "source.py",
        (
            """        if not outgoing.exporting:
            self._engine.close_export(migration_id)
""",
            "",
        ),
    ),
    # The destination
    Mutant(
        "leak on refused reserve",
        "destination.py",
        (
            """            except ArrieroError:
                self._discard_parked(message.request_id)
                raise
""",
            """            except ArrieroError:
                del self._parked[message.request_id]
                raise
""",
        ),
    ),
    Mutant(
        "lease expiry during an import frees the blocks",
        "destination.py",
        (
            "            if incoming.state is _In.RESERVED and age > self._config.lease_s:\n",
            "            if incoming.state in (_In.RESERVED, _In.IMPORTING) and age > self._config.lease_s:\n",
        ),
    ),
    Mutant(
        "DROP during an import frees the blocks",
        "destination.py",
        (
            '            incoming.state, incoming.end_reason = _In.DROPPING, "dropped"\n',
            '            self._end_incoming(incoming, "dropped", now)\n',
        ),
    ),
    Mutant(
        "tokens told twice",
        "destination.py",
        ("        news = output_token_ids[incoming.known - known :]\n", "        news = output_token_ids\n"),
    ),
    # The owner
    Mutant(
        "lost abort during a move: the source resumes for nobody",
        "migration.py",
        ("            stays = self._wanted and not delivered\n", "            stays = not delivered\n"),
    ),
    Mutant(
        "lost abort during a move: the destination is not told",
        "migration.py",
        (
            "                return [Abort(self.destination)]  # behind COMMIT on the same connection\n",
            "                return []\n",
        ),
    ),
    Mutant(
        "DETACH waits for ever for a token",
        "migration.py",
        (
            """        if self.state is State.ALIGNING and now < self._give_up_s:
            return self._detach(now)
""",
            """        if self.state is State.ALIGNING and now < self._give_up_s:
            return []
""",
        ),
    ),
    Mutant(
        "DETACH is sent with every token",
        "migration.py",
        (
            "        return self._detach(now) if self.state is State.ALIGNING else []\n",
            "        return self._detach(now)\n",
        ),
    ),
    Mutant(
        "an answer of an earlier stage is taken for this one's",
        "migration.py",
        (
            "    return not (answer.ok and isinstance(message, Copy | Load)) or answer.first == message.first\n",
            "    return True\n",
        ),
    ),
    Mutant(
        "lost with its source: no replay",
        "migration.py",
        ("        replay = self._wanted and self._source_lost\n", "        replay = False\n"),
    ),
    Mutant(
        "clean-up is not asked for again",
        "migration.py",
        (
            "        return [*self._unacknowledged.values(), WakeAt(self._deadline())]\n",
            "        return [WakeAt(self._deadline())]\n",
        ),
    ),
    # Recovery and draining
    Mutant(
        "a bystander is given up with the culprit",
        "suspects.py",
        ("            return culprits or set(running)\n", "            return set(running)\n"),
    ),
    Mutant("two suspects on trial at once", "suspects.py", ("        if self.on_trial:\n", "        if False:\n")),
    Mutant(
        "given up for a death before it ran",
        "suspects.py",
        (
            "        culprits = {r for r in running if r in self._records and self._records[r].is_on_trial}\n",
            "        culprits = set(self.on_trial)\n",
        ),
    ),
    Mutant(
        "a place is never fenced",
        "restarts.py",
        ("        if len(deaths) >= config.max_deaths:\n", "        if False:\n"),
    ),
    Mutant(
        "a machine that stood still makes all instances hang",
        "watchdog.py",
        ("min(now - self._ticked_s, 2 * self.tick_s)", "now - self._ticked_s"),
    ),
    Mutant(
        "a drain waits for ever for what cannot move with its cache",
        "draining.py",
        (
            "        if need and (has_failed or not fits):\n",
            "        if need and not fits:\n            return None\n        if False:\n",
        ),
    ),
    Mutant(
        "a drain moves all at once",
        "draining.py",
        ("                if num_free <= 0 or not", "                if not"),
    ),
)


if __name__ == "__main__":
    sys.exit(main())
