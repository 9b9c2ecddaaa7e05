"""`baton up` writes to its stdout and stderr here, as long as anybody reads: a run outlives them."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO


class Output:
    """An output is a terminal, a pipe or a file.

    It may be gone, as a window that was closed or a reader that has ended, or full. Nobody is told of that:
    nothing is written from then on.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Python has no stream where the descriptor was closed from the start."""
        self._stream = stream

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # it was closed
            return False

    def write(self, text: str) -> None:
        """Write this at once, if it is taken."""
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            leave(self._stream)
            self._stream = None


def leave(stream: TextIO | None) -> None:
    """Have a stream lead nowhere: what it still holds would fail again when Python ends."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # it may have no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
