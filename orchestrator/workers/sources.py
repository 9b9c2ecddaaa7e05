"""What is known of a source that finds workers (`orchestrator/discovery`), for the operator."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SourceStatus:
    """A status is kept up to date by whoever follows the source. Moments are `time.monotonic()`."""

    name: str  # `kubernetes team/qwen-decode`
    pools: tuple[tuple[str, str], ...]  # model and role of those whose workers it finds
    since: float  # when its last whole set came; until the first one, when it was first asked
    members: int | None = None  # in that set; None until the first one
    away: str | None = None  # why it cannot be asked, if that is so
    problems: tuple[str, ...] = field(default=())  # what is wrong with that set
