"""`python -m orchestrator.processes.process CHANNEL LISTENER ROWS` is one of several data-plane processes.

Only `processes/handle.py` starts it; the arguments are inherited file descriptors. What it imports at once
is small: a process pool that it starts imports this module too, and until the first line of `main` Ctrl-C,
which reaches everybody in the terminal's group, would end it with a traceback.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor says what they mean
    from orchestrator.form import take_form

    take_form(os.environ)
    from orchestrator.processes.data_process import run

    channel, listener, rows = map(int, sys.argv[1:])
    return run(channel, listener, rows)


if __name__ == "__main__":
    sys.exit(main())
