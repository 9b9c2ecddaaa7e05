"""A backlog holds what a connection has received and not parsed yet."""

from __future__ import annotations

from collections import deque
from typing import Final

MAX_STEP = 32 * 1024  # bytes parsed in one turn: at worst (6 bytes per chunk) some 5 ms
# With more unparsed bytes reading stops, and it is no longer noticed when a client leaves.
MAX_HELD: Final = 64 * 1024
MANY_HELD: Final = 64  # reads, before they are joined


class Backlog:
    """A backlog gives bytes in order of arrival, in pieces that the event loop has time for."""

    def __init__(self) -> None:
        self.max_step = MAX_STEP
        self.size = 0  # bytes
        self.is_body_unwanted = False  # for the time being: the application has enough of it
        self._pieces: deque[bytes | memoryview] = deque()

    @property
    def is_to_pause(self) -> bool:
        """Return whether no more is to be read, as the application and what is held say."""
        return self.is_body_unwanted or self.size > MAX_HELD

    def hold(self, data: bytes) -> None:
        """Keep `data` behind what is held already."""
        self._pieces.append(data)
        self.size += len(data)

    def join(self) -> None:
        """Join what came in many reads: each piece costs as much as a large one."""
        if len(self._pieces) > MANY_HELD:
            self._pieces = deque([b"".join(self._pieces)])

    def take(self, size: int) -> bytes | memoryview:
        """Return the next bytes, at most `size` and at most those of one read. There must be some."""
        data = self._pieces.popleft()
        if len(data) > size:
            self._pieces.appendleft(memoryview(data)[size:])
            data = memoryview(data)[:size]
        self.size -= len(data)
        return data

    def step(self, is_head_next: bool) -> int:
        """Return how many bytes to parse in one turn. `is_head_next`: a request begins with the next one.

        Then they go up to the end of its head, so that a body behind it can be parsed as what it is.
        """
        if not is_head_next:
            return self.max_step
        end = bytes(self._pieces[0][: self.max_step]).find(b"\r\n\r\n")
        return end + 4 if end >= 0 else self.max_step

    def clear(self) -> None:
        """Drop what is held, as it will not be served."""
        self._pieces.clear()
        self.size = 0
