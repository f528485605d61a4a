"""Makes the models importable and sets Hypothesis up: ``ARRIERO_HYPOTHESIS=long`` searches longer, at random."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile(
    "short", max_examples=400, stateful_step_count=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=_QUIET,
)  # fmt: skip
settings.register_profile(
    "long", max_examples=5000, stateful_step_count=80, deadline=None, database=None, suppress_health_check=_QUIET,
    print_blob=True,
)  # fmt: skip
settings.load_profile(os.environ.get("ARRIERO_HYPOTHESIS", "short"))
