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

# A shell that starts a run in the background has it ignore Ctrl-C, and nohup has it ignore SIGHUP; so do all
# its children. But tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
