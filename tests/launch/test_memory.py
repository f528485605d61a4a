"""Whether the machine ran out of memory."""

from __future__ import annotations

from pathlib import Path

from arriero.launch.memory import OutOfMemory


def test_a_kill_for_memory_is_seen_once(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("pgfault 7\noom_kill 3\n")
    watch = OutOfMemory(vmstat)
    assert not watch.happened()
    vmstat.write_text("pgfault 9\noom_kill 4\n")
    assert [watch.happened(), watch.happened()] == [True, False]


def test_where_the_kernel_does_not_count_it_may_always_have_been(tmp_path: Path) -> None:
    assert OutOfMemory(tmp_path / "nowhere").happened()
    (tmp_path / "vmstat").write_text("pgfault 9\n")
    assert OutOfMemory(tmp_path / "vmstat").happened()
