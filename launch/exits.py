"""`baton` ends with these exit codes; `baton --help` prints this table."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """The shell learns the code; its text is for the help."""

    OK = 0
    FAILED = 1
    USAGE = 2
    START_FAILED = 3
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    Exit.OK: "done; for `up`: stopped on request after it was ready",
    Exit.FAILED: "it ran and failed",
    Exit.USAGE: "wrong command line or wrong config; nothing was started",
    Exit.START_FAILED: "`up`: a process did not start; everything was stopped",
    Exit.INTERRUPTED: "stopped by a signal before it was ready, or done",
}
