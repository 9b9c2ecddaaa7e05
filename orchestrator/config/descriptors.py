"""A process may have so many descriptors; clients get a part of them, so that workers can be reached."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

OWN: Final = 64  # for listeners, files, probes, the admin listener, and what else a process opens by itself
LEAST: Final = 16  # client connections, however few descriptors there are
# Hard limits of a billion exist, and programs that a process starts may go through all that they could have.
_MOST: Final = 1024 * 1024


def raise_limit() -> int:
    """Let this process, and those that it starts, have as many descriptors as the system permits.

    Returns how many that is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS permits less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()


def limit() -> int:
    """Return how many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def most_clients() -> int:
    """Return how many client connections leave one to a worker for each of them."""
    return max(LEAST, (limit() - OWN) // 2)
