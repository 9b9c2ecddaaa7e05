"""A case is sent to both, once each, and what differs is held against the table of rightful differences."""

from __future__ import annotations

from typing import Any

import httpx

from tests.differential.answers import ask, differences, facts_of
from tests.differential.case import Case
from tests.differential.rightful import EVERYWHERE, NAMED


class Pair:
    """Baton at `front`, and a worker of the same model, asked straight."""

    def __init__(self, client: httpx.Client, front: str, worker: str, model: str) -> None:
        self._client = client
        self._front = front
        self._worker = worker
        self._model = model

    def check(self, case: Case) -> None:
        # The worker may be Baton's decode worker: it is asked before it has pulled the prompt.
        theirs = ask(self._client, self._worker, case, self._model)
        ours = ask(self._client, self._front, case, self._model)
        assert theirs.status_code == case.status, f"the worker: {theirs.status_code} {theirs.text[:500]}"
        found = differences(facts_of(ours), facts_of(theirs))
        assert unexplained(case, found) == []
        assert missing(case, found) == []
        if case.is_generated and ours.status_code == 200:
            path = "aggregated" if case.is_whole else "disaggregated"
            assert ours.headers["x-baton-path"] == path


def unexplained(case: Case, found: dict[str, tuple[Any, Any]]) -> list[str]:
    """What nothing explains."""
    rights = [*EVERYWHERE.values(), *(NAMED[name] for name in case.differs)]
    return [
        f"{fact}: {ours!r}, a worker's is {theirs!r}"
        for fact, (ours, theirs) in found.items()
        if not any(right.explains(fact) for right in rights)
    ]


def missing(case: Case, found: dict[str, tuple[Any, Any]]) -> list[str]:
    """The rightful differences of the case that do not occur any more."""
    return [name for name in case.differs if not any(map(NAMED[name].explains, found))]
