"""What ends `baton simulate` early."""

from __future__ import annotations


class SimulationError(Exception):
    """The user must change what the message says: it names the file, or the option."""
