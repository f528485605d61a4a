"""The exit status of a process that nobody has waited for yet."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from arriero.launch.exiting import exit_code_ahead, open_stat

Child = tuple[subprocess.Popen[bytes], int]


@pytest.fixture
def child() -> Iterator[Child]:
    """It exits with the number that it reads."""
    process = subprocess.Popen([sys.executable, "-c", "exit(int(input()))"], stdin=subprocess.PIPE)
    stat_fd = open_stat(process.pid)
    yield process, stat_fd
    os.close(stat_fd)
    process.kill()
    process.communicate()


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait until it has ended; it is not reaped."""
    pidfd = os.pidfd_open(process.pid)
    select.select([pidfd], [], [])
    os.close(pidfd)


def say(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def test_a_process_that_lives_has_no_exit_code(child: Child) -> None:
    assert exit_code_ahead(child[1]) is None


def test_the_code_of_a_process_that_ends_by_itself(child: Child) -> None:
    process, stat_fd = child
    say(process, b"3\n")
    end(process)
    assert exit_code_ahead(stat_fd) == 3
    assert process.wait() == 3
    assert exit_code_ahead(stat_fd) is None, "it is gone, and its number may be another's"


def test_the_signal_that_killed_a_process(child: Child) -> None:
    process, stat_fd = child
    process.kill()
    end(process)
    assert exit_code_ahead(stat_fd) == -9


def test_of_an_end_in_order_the_pidfd_tells(child: Child) -> None:
    process, stat_fd = child
    say(process, b"0\n")
    end(process)
    assert exit_code_ahead(stat_fd) is None
