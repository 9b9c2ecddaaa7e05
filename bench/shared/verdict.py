"""A verdict tells what must hold, what was found, and whether that is good enough."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What was found is told in words; `holds` is None where there is no goal."""

    goal: str
    found: str
    holds: bool | None

    @property
    def mark(self) -> str:
        return {True: "holds", False: "DOES NOT HOLD", None: "-"}[self.holds]
