"""What a killed front end leaves is reclaimed by the next start, and nothing that anybody uses."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from arriero.launch.leftovers import note_shared_memory, reclaim_folders, run_folder
from arriero.launch.memory import holds_one_more

NOBODY = 4_194_304
"""No process has this number: it is the limit."""

MAPS = """
import mmap, os, sys
os.setpgid(0, 0)
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(file, 4096)
memory = mmap.mmap(file, 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_its_users_alone_and_stays_while_its_process_lives(folder: Path) -> None:
    mine = run_folder()
    assert mine.parent == folder
    assert mine.stat().st_mode & 0o077 == 0
    (folder / "arriero-notes").mkdir()
    (folder / f"other-{NOBODY}-x").mkdir()
    assert reclaim_folders() == []
    assert len(list(folder.iterdir())) == 3


def test_what_a_dead_front_end_left_goes_with_the_shared_memory_of_its_dead_instances(folder: Path) -> None:
    left = folder / f"arriero-{NOBODY}-abc"
    left.mkdir()
    memory = Path(f"/dev/shm/test-leftover-{os.getpid()}")
    with subprocess.Popen(
        [sys.executable, "-c", MAPS, str(memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as instance:
        assert instance.stdout is not None
        assert instance.stdout.readline() == "mapped\n"
        note_shared_memory(left, instance.pid)
        instance.kill()
    (left / f"{os.getpid()}.shm").write_text("of an instance that lives")
    assert memory.exists()
    try:
        assert reclaim_folders() == [left.name]
        assert not memory.exists()
        assert not left.exists()
    finally:
        memory.unlink(missing_ok=True)
    assert reclaim_folders() == []


def test_one_more_fits_beside_what_is_small_and_not_beside_what_is_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    assert holds_one_more([])
    assert holds_one_more([os.getpid(), NOBODY])
    monkeypatch.setattr("arriero.launch.memory.MARGIN", 1e9)
    assert not holds_one_more([os.getpid()])
