"""What ends `baton simulate` early."""

from __future__ import annotations


class SimulationError(Exception):
    """The user must change what the message says: it names the file, or the option."""


class OutOfReach(SimulationError):
    """It was simulated, and no number of workers does what was asked for."""
