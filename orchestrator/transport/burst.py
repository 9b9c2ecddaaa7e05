"""What one read brings to many clients is written to them back to back.

Each write to a socket goes to the kernel at once. With other code between two writes, whoever reads has gone
to sleep again by the second one, and the caches hold something else: in a burst a write costs a tenth less
(`bench/micro/burst.py`).
"""

from __future__ import annotations

from collections.abc import Callable


class Burst:
    """While it `is_on` it keeps what is put; `end()` writes that, in its order.

    It is on for a part of one callback of the event loop only, so nothing else can be written in between.
    """

    __slots__ = ("_data", "_writes", "is_on")

    def __init__(self) -> None:
        self.is_on = False
        self._writes: list[Callable[[bytes], object]] = []
        self._data: list[bytes] = []

    def put(self, write: Callable[[bytes], object], data: bytes) -> None:
        self._writes.append(write)
        self._data.append(data)

    def end(self) -> None:
        """Write everything. A write may raise RuntimeError, as uvloop's do once the connection is closed: its
        owner has been told of that, and the others get theirs.
        """
        self.is_on = False
        for at, write in enumerate(self._writes):
            try:
                write(self._data[at])
            except RuntimeError:
                continue
        self._writes.clear()
        self._data.clear()
