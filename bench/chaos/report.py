"""A scenario has its verdicts, which are shown to people and to programs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.chaos.client import End, Result
from bench.shared.verdict import Verdict

SHOWN = 3  # reasons


@dataclass(frozen=True)
class Outcome:
    """A scenario came to these verdicts."""

    scenario: str
    verdicts: Sequence[Verdict]
    seconds: float


def none_failed(results: Sequence[Result], when: str) -> Verdict:
    return Verdict(f"{when}: no request fails", tally(results), not any(r.has_failed for r in results))


def none_failed_alone(results: Sequence[Result], when: str) -> Verdict:
    """Who was lost with two workers that end at the same time cannot be told from who ends them."""
    failed = [result for result in results if result.has_failed]
    is_innocent = [result.end is End.ERROR and '"poison"' in result.why for result in failed]
    return Verdict(f"{when}: no request fails that was not lost with both", tally(results), all(is_innocent))


def within(goal: str, seconds: Sequence[float], limit_s: float) -> Verdict:
    """The median of some times is within a limit."""
    median, longest = statistics.median(seconds), max(seconds)
    more = f" (longest of {len(seconds)}: {longest * 1e3:,.0f} ms)" if len(seconds) > 1 else ""
    return Verdict(
        f"{goal}: at most {limit_s * 1e3:,.0f} ms", f"{median * 1e3:,.0f} ms{more}", median <= limit_s
    )


def nothing(goal: str, found: Mapping[str, int]) -> Verdict:
    """All of these numbers must be 0."""
    left = {name: number for name, number in found.items() if number}
    return Verdict(
        goal, ", ".join(f"{number} {name}" for name, number in left.items()) or "nothing", not left
    )


def tally(results: Sequence[Result]) -> str:
    """Say how many failed, and of what."""
    failed = [result for result in results if result.has_failed]
    kinds = Counter(str(result.end) for result in failed)
    because = f" ({', '.join(f'{count} {end}' for end, count in kinds.most_common())})" if failed else ""
    return f"{len(failed)} of {len(results):,}{because}"


def reasons(results: Sequence[Result]) -> list[str]:
    """Return the most frequent reasons."""
    found = Counter(
        f"{result.end}: {' '.join(result.why.split())}" for result in results if result.has_failed
    )
    return [f"{count} x {why}" for why, count in found.most_common(SHOWN)]


def lines_of(outcome: Outcome) -> list[str]:
    """Show an outcome on a terminal."""
    head = f"{outcome.scenario} ({outcome.seconds:.0f} s)"
    return [head, *(f"  {v.mark:<14} {v.goal}: {v.found}" for v in outcome.verdicts)]


def table(outcomes: Sequence[Outcome]) -> str:
    """Show all in Markdown."""
    rows = [(outcome.scenario, v.goal, v.found, v.mark) for outcome in outcomes for v in outcome.verdicts]
    head = ("scenario", "what must hold", "found", "")
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def document_of(outcome: Outcome) -> dict[str, Any]:
    verdicts = [asdict(verdict) for verdict in outcome.verdicts]
    return {"scenario": outcome.scenario, "seconds": round(outcome.seconds, 1), "verdicts": verdicts}
