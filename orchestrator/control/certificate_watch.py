"""The end of the certificate is told in the log and as an event: two weeks before, and when it has come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from orchestrator.http.tls import Certificate
from orchestrator.telemetry.events import Events

LOOK_S: Final = 60.0
NOTICE_S: Final = 14 * 86400.0  # as long as it takes to get another one

_log = logging.getLogger("baton.certificate")


class CertificateWatch:
    """It looks at the end of the certificate that is served with, which a reload may renew."""

    def __init__(
        self, certificate: Certificate | None, events: Events, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._certificate = certificate
        self._events = events
        self._wall_clock = wall_clock
        self._told: tuple[bool, float] | None = None  # whether it had expired, and when it ends

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        end = None if self._certificate is None else self._certificate.not_after
        if end is None:
            return
        left = end - self._wall_clock()
        if left <= NOTICE_S and self._told != (left <= 0, end):
            self._told = (left <= 0, end)
            self._tell(left <= 0, f"{datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC")

    def _tell(self, has_expired: bool, end: str) -> None:
        if has_expired:
            what = f"the certificate of orchestrator.tls has expired at {end}: clients refuse connections"
            self._events.note("certificate.expired", what)
        else:
            what = f"the certificate of orchestrator.tls expires at {end}: renew its files, then reload"
            self._events.note("certificate.expires", what)
        _log.warning("%s", what)
