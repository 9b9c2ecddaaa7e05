"""What ends `baton bench` early. The message is one line for the user."""

from __future__ import annotations

from launch.exits import Exit


class BenchError(Exception):
    """The endpoint cannot be measured, or a result cannot be read or written."""

    exit = Exit.FAILED


class WrongUsage(BenchError):
    """What the user asked for is not possible, whatever the endpoint does."""

    exit = Exit.USAGE
