from __future__ import annotations

import pytest

from bench.chaos.client import End, Result
from bench.chaos.report import (
    Outcome,
    document_of,
    lines_of,
    none_failed,
    nothing,
    reasons,
    table,
    tally,
    within,
)
from bench.shared.verdict import Verdict

RIGHT = Result(0.0, 1.0, End.RIGHT)
CUT = Result(0.0, 1.0, End.CUT, "after 5 bytes")
ERROR = Result(0.0, 1.0, End.ERROR, "HTTP 503\n busy")
MET = Verdict("a promise", "kept", True)
MISSED = Verdict("another", "broken", False)
FIGURE = Verdict("a number", "7", None)


def test_failures_are_counted_by_kind() -> None:
    assert tally([RIGHT] * 2000) == "0 of 2,000"
    assert tally([RIGHT, CUT, CUT, ERROR]) == "3 of 4 (2 cut short, 1 an error)"


def test_reasons_are_lines_the_most_frequent_first() -> None:
    assert reasons([RIGHT, ERROR, CUT, CUT]) == [
        "2 x cut short: after 5 bytes",
        "1 x an error: HTTP 503 busy",
    ]


@pytest.mark.parametrize(("results", "holds"), [([RIGHT], True), ([RIGHT, CUT], False), ([], True)])
def test_one_failure_is_too_many(results: list[Result], holds: bool) -> None:
    assert none_failed(results, "SIGKILL").holds is holds


def test_nothing_is_what_must_be_left() -> None:
    assert nothing("left", {"legs": 0, "leases": 0}) == Verdict("left", "nothing", True)
    assert nothing("left", {"legs": 2, "leases": 0}) == Verdict("left", "2 legs", False)


def test_times_have_limits() -> None:
    assert within("soon", [0.02], 0.05) == Verdict("soon: at most 50 ms", "20 ms", True)
    assert within("soon", [0.02, 0.06, 0.03], 0.05).found == "30 ms (longest of 3: 60 ms)"
    assert not within("soon", [3.001], 3.0).holds


def test_an_outcome_for_people_and_for_programs() -> None:
    outcome = Outcome("kill", [MET, MISSED, FIGURE], 12.34)
    head, *lines = lines_of(outcome)
    assert head == "kill (12 s)"
    assert [line.split("  ")[1] for line in lines] == ["holds", "DOES NOT HOLD", "-"]
    assert table([outcome]).splitlines()[2:] == [
        "| kill | a promise | kept | holds |",
        "| kill | another | broken | DOES NOT HOLD |",
        "| kill | a number | 7 | - |",
    ]
    document = document_of(outcome)
    assert (document["scenario"], document["seconds"]) == ("kill", 12.3)
    assert [verdict["holds"] for verdict in document["verdicts"]] == [True, False, None]
