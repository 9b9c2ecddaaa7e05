"""Processes share what their routing policies have chosen, so that each knows what the others sent where.

Notes go in batches over the supervisor's channel, which passes them on. They are hints: what is too much, or
what a process that does not read would have to be kept for, is dropped. A process that starts later begins
with none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from orchestrator.wire.info import Role

PERIOD_S = 0.1  # between two batches: far less than it takes for what was told to matter
MOST_BYTES = 128 * 1024  # of notes in a batch: about four hundred choices


class Note(msgspec.Struct, frozen=True, array_like=True):
    """A note is from a policy to the same policy in other processes."""

    model: str
    role: Role
    content: bytes


class Shared(msgspec.Struct, tag=True):
    """These notes are from one process, or from another one when the supervisor passes them on."""

    notes: list[Note]


class Sharing:
    """A data-plane process collects notes and sends them from time to time."""

    def __init__(self, send: Callable[[Shared], None]) -> None:
        self._send = send
        self._notes: list[Note] = []
        self._size = 0

    def note(self, model: str, role: Role, content: bytes) -> None:
        """Take a note; it is dropped if the batch is full."""
        if self._size + len(content) <= MOST_BYTES:
            self._size += len(content)
            self._notes.append(Note(model, role, content))

    def flush(self) -> None:
        """Send what there is."""
        if self._notes:
            notes, self._notes, self._size = self._notes, [], 0
            self._send(Shared(notes))

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self.flush()
