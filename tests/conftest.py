from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# A slow machine is no failure; and CI tries the same examples each time, so that a red run means a change.
settings.register_profile(
    "baton",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("baton")

# A shell that starts a run in the background has it ignore Ctrl-C, and all its children too; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
