"""A check ends in a finding: right, a warning or a fault, with what was found and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from orchestrator.config.printing import masked, one_line

CHECK_WIDTH = 10


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"  # it serves, but less well than it could, or it could not be checked
    FAIL = "fail"  # requests would fail, or be answered wrongly


# What was looked at. A new check gets its name here, for `-o json` and for those who read it.
Check = Literal[
    "plan",
    "port",
    "host",
    "transport",
    "nixl",
    "ucx",
    "key",
    "tls",
    "engine",
    "plugin",
    "python",
    "gpu",
    "memory",
    "files",
    "disk",
    "model",
    "discover",
    "start",
    "health",
    "announces",
    "role",
    "clock",
    "answer",
    "fits",
    "revision",
    "version",
    "length",
    "handoff",
    "equal",
    "ready",
]


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    check: Check
    subject: str  # a worker, a pair, an option, or this machine
    found: str
    advice: str = ""  # what to do; not for what is right

    def line(self) -> str:
        """Return it in one line, without secrets and control characters."""
        advice = f": {self.advice}" if self.advice else ""
        text = f"{self.subject}: {self.found}{advice}"
        return one_line(masked(f"{self.verdict:4}  {self.check:{CHECK_WIDTH}} {text}"))


def ok(check: Check, subject: str, found: str) -> Finding:
    return Finding(Verdict.OK, check, subject, found)


def warn(check: Check, subject: str, found: str, advice: str) -> Finding:
    return Finding(Verdict.WARN, check, subject, found, advice)


def fail(check: Check, subject: str, found: str, advice: str) -> Finding:
    return Finding(Verdict.FAIL, check, subject, found, advice)


def count(findings: Sequence[Finding], verdict: Verdict) -> int:
    return sum(finding.verdict is verdict for finding in findings)


def summary(findings: Sequence[Finding]) -> str:
    warnings, faults = count(findings, Verdict.WARN), count(findings, Verdict.FAIL)
    return f"{len(findings)} checks: {_number(faults, 'fault')}, {_number(warnings, 'warning')}"


def _number(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def document(findings: Sequence[Finding]) -> str:
    """Return all as JSON."""
    return json.dumps(
        {
            "ok": not count(findings, Verdict.FAIL),
            "faults": count(findings, Verdict.FAIL),
            "warnings": count(findings, Verdict.WARN),
            "checks": [_entry(finding) for finding in findings],
        },
        indent=2,
    )


def _entry(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "subject": masked(finding.subject),
        "verdict": finding.verdict.value,
        "found": masked(finding.found),
        "advice": masked(finding.advice),
    }
