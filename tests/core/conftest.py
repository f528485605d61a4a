"""Makes the models importable and sets Hypothesis up.

``ARRIERO_HYPOTHESIS=long`` searches longer and at random; ``unshrunk`` is for :mod:`arriero.bench.mutants`,
which wants to know whether an example fails, not the smallest that does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent))

_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
_SHORT = settings(
    max_examples=100,
    stateful_step_count=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=_QUIET,
)
settings.register_profile("short", _SHORT)
settings.register_profile("unshrunk", _SHORT, phases=[Phase.explicit, Phase.generate])
settings.register_profile("long", _SHORT, max_examples=5000, stateful_step_count=80, derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("ARRIERO_HYPOTHESIS", "short"))
