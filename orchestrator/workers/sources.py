"""What is known of a source that finds workers (`orchestrator/discovery`), for the operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class SourceStatus:
    """A status is kept up to date by whoever follows the source. Moments are `time.monotonic()`."""

    name: str  # `kubernetes team/qwen-decode`
    pools: tuple[tuple[str, str], ...]  # model and role of those whose workers it finds
    since: float  # when its last whole set came; until the first one, when it was first asked
    members: int | None = None  # in that set; None until the first one
    away: str | None = None  # why it cannot be asked, if that is so
    problems: tuple[str, ...] = field(default=())  # what is wrong with that set

    def described(self, now: float) -> dict[str, Any]:
        """Return the status as the admin API shows it, with its age in seconds."""
        return {
            "name": self.name,
            "pools": ["/".join(pool) for pool in self.pools],
            "age_s": round(now - self.since, 3),
            "members": self.members,
            "away": self.away,
            "problems": self.problems,
        }
