"""Kills every process group of `up` when `up` itself is gone, however it ended.

Nothing else does: vLLM's engine core does not watch its parent, so a death signal on the API server would
leave it alive. The guard holds the reading end of a pipe whose writing end only `up` has. Each child adds
its group before it becomes a worker, so there is no moment in which it is unknown; `up` removes a group once
it is gone. Standard library only, started as `python -I -S guard.py`: small and up at once.

Lines on the pipe: `+PGID` adds a group, `-PGID` removes it. Each is one write, shorter than PIPE_BUF.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable


def main() -> None:
    # The terminal sends these to everybody; the guard must outlive `up`.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if "--distant" in sys.argv and os.fork():
        return  # its child has no parent any more that could look for it
    kill_groups(watch(sys.stdin.buffer))


def watch(lines: Iterable[bytes]) -> set[int]:
    """Return the groups that are left when the pipe closes."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line.startswith(b"+"):
            groups.add(group)
        else:
            groups.discard(group)
    return groups


def kill_groups(groups: Iterable[int]) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
