from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A slow machine is no failure; and CI tries the same examples each time, so that a red run means a change.
settings.register_profile(
    "baton",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("baton")
