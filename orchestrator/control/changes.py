"""Each change that an operator makes is one line in the log and one event, which say who made it."""

from __future__ import annotations

import logging

from starlette.requests import Request

from orchestrator.control.pages import who_asks
from orchestrator.telemetry.events import Events

_log = logging.getLogger("baton.admin")


class Changes:
    """What is changed at the admin listener is noted here, after it is done."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def note(self, request: Request, kind: str, what: str, *, subject: str = "") -> None:
        """Note `what` the sender of `request` has done, as one line."""
        who = who_asks(request.scope)
        _log.info("%s, by %s", " ".join(what.split()), who, extra={"kind": kind, "who": who})
        self._events.note(kind, what, subject=subject, who=who)
