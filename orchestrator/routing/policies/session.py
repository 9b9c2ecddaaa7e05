"""This policy keeps the requests of a session on one worker, within a bound of its load.

It is rendezvous hashing (Thaler and Ravishankar, 1998): each worker has a weight for each session, and the
heaviest is its home. If a worker comes or goes, only its own sessions move. The load is bounded as in
consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a home that has too much to
do is passed over for the next in weight, and taken again later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from orchestrator.routing.policies.base import (
    RANKED,
    Argument,
    C,
    Choice,
    Context,
    Explanation,
    Policy,
    PolicySpec,
    Request,
    explained,
    ranking_of,
)

MOST_HOMES: Final = 16_384  # sessions of which it is remembered where they are at home
NO_SESSION: Final = "It has the fewest legs under way: the request names no session."


class SessionChoice(Choice[Any]):
    """It remembers how the worker stands to the session."""

    __slots__ = ("is_home", "limit", "source")

    def __init__(self, worker: Any, source: str, is_home: bool, limit: float) -> None:
        super().__init__(worker, "")
        self.source = source
        self.is_home = is_home
        self.limit = limit

    def __str__(self) -> str:
        if self.is_home:
            return f"The session that {self.source} names is at home there."
        return (
            f"It is the next choice of the session that {self.source} names: with the request its home would "
            f"have more than {self.limit:.1f} legs under way."
        )


class Session(Policy):
    def __init__(
        self, context: Context, headers: Sequence[str], fields: Sequence[str], load_factor: float, margin: int
    ) -> None:
        self._headers = [name.lower().encode() for name in headers]
        self._fields = fields
        self._load_factor = load_factor
        self._margin = margin
        self._turn = -1
        self._candidates: Sequence[Any] = ()  # those of the last choice, if they cannot change
        self._homes: dict[int, int] = {}  # of sessions among these, by their hashes

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose the home of the session, or its next choice if the home has too much to do.

        A request without a session goes to the least loaded; equals take turns.
        """
        for header in self._headers:
            value = request.header(header)
            if value:
                return self._at_home(value, f"the header '{header.decode()}'", candidates)
        for field in self._fields:
            raw = request.field(field)
            value = b"" if raw is None else bytes(raw)
            if value and value not in _NOTHING:
                return self._at_home(value, f"the field '{field}'", candidates)
        return self._least_loaded(candidates)

    def _at_home(self, session: bytes, source: str, candidates: Sequence[C]) -> Choice[C]:
        limit = max(self._load_factor * (_legs(candidates) + 1) / len(candidates), 1.0) + self._margin
        seed = xxh3_64_intdigest(session)
        home = self._home(seed, candidates)
        worker = candidates[home]
        if worker.in_flight + 1 <= limit:
            return SessionChoice(worker, source, True, limit)
        best, heaviest = -1, -1
        for index in range(len(candidates)):
            weight = xxh3_64_intdigest(candidates[index].name.encode(), seed)
            if weight > heaviest and candidates[index].in_flight + 1 <= limit:
                best, heaviest = index, weight
        return SessionChoice(candidates[best], source, best == home, limit)

    def _home(self, seed: int, candidates: Sequence[C]) -> int:
        """Return the index of the heaviest; it stays while the candidates do."""
        if candidates is not self._candidates or len(self._homes) >= MOST_HOMES:
            self._candidates = candidates if isinstance(candidates, tuple) else ()
            self._homes = {}
        home = self._homes.get(seed, -1)
        if home < 0:
            heaviest = -1
            for index in range(len(candidates)):
                weight = xxh3_64_intdigest(candidates[index].name.encode(), seed)
                if weight > heaviest:
                    home, heaviest = index, weight
            self._homes[seed] = home
        return home

    def _least_loaded(self, candidates: Sequence[C]) -> Choice[C]:
        self._turn += 1
        count = len(candidates)
        first = self._turn % count
        best = candidates[first]
        if count > RANKED and (ranking := ranking_of(best)) is not None:
            ranked: C | None = ranking.least(candidates, first)
            if ranked is not None:
                return Choice(ranked, NO_SESSION)
        least = best.in_flight
        for index in range(first + 1 - count, first):
            load = candidates[index].in_flight
            if load < least:
                best, least = candidates[index], load
        return Choice(best, NO_SESSION)

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        turn = self._turn
        choice = self.choose(request, candidates)
        self._turn = turn
        terms = [{"legs": float(candidate.in_flight)} for candidate in candidates]
        if isinstance(choice, SessionChoice):
            for one in terms:
                one["most_legs"] = choice.limit
        return explained(choice, candidates, terms)


def _legs(candidates: Sequence[Any]) -> int:
    """Return how many legs are under way on all of them."""
    if len(candidates) > RANKED and (ranking := ranking_of(candidates[0])) is not None:
        legs = ranking.legs(candidates)
        if legs >= 0:
            return legs
    legs = 0
    for candidate in candidates:
        legs += candidate.in_flight
    return legs


_NOTHING: Final = (b"null", b'""')  # values that name no session

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def _fault(arguments: Mapping[str, Any]) -> str | None:
    """Say why no request could have a session, or never by one of these names; None if all is well."""
    wrong = [name for name in arguments["headers"] if not _HEADER_NAME.fullmatch(name)]
    if wrong:
        return f"no header has the name {wrong[0]!r}"
    if "" in arguments["fields"]:
        return "a field has a name"
    if not (arguments["headers"] or arguments["fields"]):
        return "without headers and fields no request has a session"
    return None


SPEC: Final = PolicySpec(
    "session",
    Session,
    "The requests of a session go to one worker, unless that has too much to do; equals take turns.",
    [
        Argument(
            "headers",
            ["x-session-id"],
            "The first of these headers that a request has names its session.",
        ),
        Argument(
            "fields",
            ["prompt_cache_key", "user"],
            "If it has none of the headers, the first of these fields of its body does.",
        ),
        Argument(
            "load_factor",
            1.25,
            "A worker takes no more of a session while its legs exceed the mean by this factor and `margin`.",
            least=1,
        ),
        Argument("margin", 1, "It may always have so many legs more than that.", least=0),
    ],
    _fault,
)
