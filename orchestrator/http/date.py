"""Every answer tells its time (RFC 9110, 6.6.1), which is written once a second and not for each."""

from __future__ import annotations

from email.utils import formatdate


class DateLine:
    """It has the last lines of a head, with the time of the last `refresh`."""

    def __init__(self) -> None:
        self._second = -1
        self.end = b""  # of the head of an answer that another may follow
        self.last_end = b""  # of one behind which the connection closes

    def refresh(self, now: float) -> None:
        """Tell the time `now`, in seconds since 1970."""
        second = int(now)
        if second != self._second:
            self._second = second
            self.end = b"date: %b\r\n\r\n" % formatdate(second, usegmt=True).encode()
            self.last_end = b"connection: close\r\n" + self.end
