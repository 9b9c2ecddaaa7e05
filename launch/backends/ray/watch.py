"""An actor is watched by asking it again and again: what it answers, if it does, is what is known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from launch.local.processes import UNKNOWN_CODE

REPORT_S: Final = 1.0  # an actor is asked so often, and tells of news at once
SILENT_S: Final = 3.0  # an actor that tells nothing for so long is out of reach
AGAIN_S: Final = 0.25  # until an actor that is out of reach is asked again
FIRST_DELAY_S: Final = 1.0  # before an engine that ended is started again; doubled with each end
LONGEST_DELAY_S: Final = 30.0
STABLE_S: Final = 60.0  # after so long a run the next delay is the first again

News = Mapping[str, Any]


class Watched:
    """A worker of the run, through all starts of its actor."""

    def __init__(self, ray: Any, name: str, actor_name: str, actor: Any) -> None:
        self.name = name
        self.actor_name = actor_name
        self.actor = actor
        self.lost_at = time.monotonic()  # since when it is out of reach, unless it `is_reached`
        self.is_reached = False
        self.was_reached = False
        self._ray = ray
        self._asked: Any = None  # the report that is awaited
        self._asked_at = 0.0
        self._next_at = 0.0
        self._uid = ""
        self._offset = 0
        self._began_at = 0.0
        self._delay_s = FIRST_DELAY_S
        self._has_ended = False
        self._dead_at: float | None = None

    def tend(self, now: float) -> Iterator[News]:
        """Ask the actor if it is time, and yield what it has told since."""
        if self._asked is None:
            if now >= self._next_at and self._dead_at is None:
                self._ask(now)
        elif self._ray.wait([self._asked], timeout=0)[0]:
            yield from self._heard(now)
        elif self.is_reached and now > self._asked_at + SILENT_S:
            self._lose(now)

    def _ask(self, now: float) -> None:
        if now >= self._began_at + STABLE_S and not self._has_ended:
            self._delay_s = FIRST_DELAY_S
        self._asked = self.actor.report.remote(self._uid, self._offset, self._delay_s, REPORT_S)
        self._asked_at = now

    def _heard(self, now: float) -> Iterator[News]:
        answer, self._asked = self._asked, None
        try:
            report = self._ray.get(answer)
        except self._ray.exceptions.ActorUnavailableError:
            self._lose(now)
            self._next_at = now + AGAIN_S
        except self._ray.exceptions.RayError as error:
            self._lose(now)
            self._dead_at = now
            yield {"report": _of_dead(error)}
        else:
            yield {"report": self._noted(report, now)}

    def _lose(self, now: float) -> None:
        if self.is_reached:
            self.is_reached, self.lost_at = False, now

    def _noted(self, report: dict[str, Any], now: float) -> News:
        if report["uid"] != self._uid:
            self._uid, self._began_at, self._has_ended = report["uid"], now, False
        self._offset = report["offset"]
        self.is_reached = self.was_reached = True
        if report["code"] is not None and not self._has_ended:
            self._has_ended = True
            self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S)
        return report | {"output": report["output"].decode("utf-8", "replace")}

    def is_lost_for_good(self, now: float) -> bool:
        """Return whether Ray does not start the actor again, and it is time to make another one."""
        return self._dead_at is not None and now >= self._dead_at + self._delay_s

    def replace(self, actor_name: str, actor: Any) -> None:
        """Watch another actor in place of one that is lost for good."""
        self.actor_name = actor_name
        self.actor = actor
        self._dead_at = None
        self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S)


def _of_dead(error: Exception) -> News:
    """Return a report in place of one of an actor that could not be made, or that somebody has ended."""
    text = str(error)
    if "No module named" in text and ("launch" in text or "orchestrator" in text):
        text = f"Baton is not installed on that node: pip install baton-serve\n{text}"
    return {"uid": "", "ready_url": "", "code": UNKNOWN_CODE, "output": f"{text}\n"}
