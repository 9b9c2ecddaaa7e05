"""The journal has what a worker has seen: one entry per request, for tests of whoever sent it."""

from __future__ import annotations

import base64
from collections import deque
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from orchestrator.wire.info import LEG_HEADER
from worker.sim.faults import Leg

_KEPT = 1000
_SHOWN_HEADERS = (
    "x-request-id",
    "x-baton-leg",
    "x-msgpack",
    "x-token-ids",
    "content-type",
    "accept",
    "traceparent",
    "tracestate",
)


@dataclass(slots=True)
class Entry:
    """`outcome` is "running", "done", "aborted", "refused: ...", "kv lost: ..." or "fault: ..."."""

    path: str
    headers: dict[str, str]
    leg: Leg | None = None
    answer_id: str | None = None
    outcome: str = "running"
    decoded: Any = None
    raw: bytes | None = None

    @property
    def name(self) -> str | int:
        """By this it is ended; a number if its sender gave it none."""
        return self.headers.get(LEG_HEADER.lower()) or self.headers.get("x-request-id") or id(self)

    def summary(self) -> dict[str, Any]:
        """Return the entry without bodies and secrets: of other headers only the names."""
        return {
            "path": self.path,
            "leg": self.leg,
            "id": self.answer_id,
            "outcome": self.outcome,
            "headers": {name: self.headers[name] for name in _SHOWN_HEADERS if name in self.headers},
            "header_names": sorted(self.headers),
        }

    def full(self) -> dict[str, Any]:
        raw = None if self.raw is None else base64.b64encode(self.raw).decode()
        return {**self.summary(), "headers": self.headers, "body": self.decoded, "raw": raw}


class Journal:
    """It has the last 1000 requests; the bodies of the last `record` ones."""

    def __init__(self, record: int = 0) -> None:
        self._record = record
        self._entries: deque[Entry] = deque(maxlen=_KEPT)
        self._recorded: deque[Entry] = deque()

    async def add(self, request: Request, decoded: object = None) -> Entry:
        entry = Entry(path=request.url.path, headers=dict(request.headers))
        self._entries.append(entry)
        if self._record:
            self._forget_oldest()
            entry.decoded, entry.raw = decoded, await request.body()
            self._recorded.append(entry)
        return entry

    def summaries(self) -> list[dict[str, Any]]:
        return [entry.summary() for entry in self._entries]

    def recorded(self) -> list[dict[str, Any]]:
        return [entry.full() for entry in self._recorded]

    def _forget_oldest(self) -> None:
        if len(self._recorded) == self._record:
            oldest = self._recorded.popleft()
            oldest.decoded = oldest.raw = None
