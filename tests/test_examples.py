"""The examples run as their docstrings say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_policy_of_your_own_runs_by_its_dotted_path_beside_ours() -> None:
    own = "examples.shortest_prompt_queue.ShortestPromptQueue"
    command = ["simulate", "--workload", "S-S", "--rate", "20", "--num-requests", "200", "--instances", "4", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "arriero.cli", *command, "--policy", f"infaas,{own}"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    summaries = json.loads(done.stdout)["policies"]
    assert list(summaries) == ["infaas", own]
    assert all(s["num_requests"] == 200 and s["num_rejected"] == 0 for s in summaries.values())
