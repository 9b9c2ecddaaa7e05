"""What a test changes of its process goes with it, or the next one, and all that it starts, would inherit it.

`orchestrator.run.run()`, say, sets variables for the processes that it starts, and holds SIGHUP back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PYTESTS_OWN = "PYTEST_CURRENT_TEST"


@contextmanager
def taken_back() -> Iterator[None]:
    """Take back, at the end of the block, what it changed of the environment, held signals and the folder."""
    environ, held, folder = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.getcwd()
    try:
        yield
    finally:
        for name in os.environ.keys() - environ.keys() - {_PYTESTS_OWN}:
            del os.environ[name]
        for name, value in environ.items():
            if os.environ.get(name) != value and name != _PYTESTS_OWN:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        os.chdir(folder)
