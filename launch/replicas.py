"""Several orchestrators are asked as if they were one, and the user is told which of them did not answer.

They know nothing of each other: a change is made at each of them, and what they tell is put together.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from urllib.parse import parse_qsl, urlencode

from launch.remote import Admin, Failed, Refused, Run, say

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Row = dict[str, Any]
Query = Mapping[str, str | int | float] | None

AWAY_S: Final = 30.0  # one that does not answer is not asked again for so long
AGAIN_S: Final = 1.0  # before a listener whose stream was cut is asked again
# How figures of one worker, as several orchestrators have them, become one figure. Of a distribution the
# largest figure is shown: nobody can say more without the distributions themselves.
_SUMS: Final = ("in_flight", "rate", "served", "errors", "retries", "transfers")
_LARGEST: Final = (
    "since", "restarts", "is_slow", "is_drained",
    "first_byte_p50", "first_byte_p99", "inter_token_p50", "inter_token_p99",
)  # fmt: skip


class Admins:
    """These are the admin listeners of all orchestrators of a run; it does what an `Admin` does."""

    def __init__(self, members: Sequence[Admin]) -> None:
        """There is at least one member; they are closed with this."""
        self._members = members
        self._away: dict[str, tuple[Failed, float]] = {}  # by URL: why, and until when nobody asks again
        self._told: set[str] = set()  # URLs of those of which it was said that they do not answer
        self.url = ", ".join(member.url for member in members)
        self.run: Run | None = members[0].run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for member in self._members:
            member.__exit__(*error)

    def get(self, path: str, query: Query = None) -> Any:
        """Return what the documents at `path` say together. Raises `Failed` if nobody answers."""
        found = self._found(lambda member: member.get(path, query))
        page = path.partition("?")[0]
        merge = _MERGED.get("/admin/requests/" if page.startswith("/admin/requests/") else page)
        return next(iter(found.values())) if merge is None else merge(found)

    def text(self, path: str) -> str:
        """Return all texts, one after the other. Raises `Failed` if nobody answers."""
        return "".join(self._answers(lambda member: member.text(path)))

    def post(self, path: str, document: object = None) -> Any:
        """Change something everywhere; returns an answer. Raises `Failed` if it was not done everywhere."""
        return self._everywhere(lambda member: member.post(path, document))

    def delete(self, path: str) -> Any:
        """Remove something everywhere; returns an answer. Raises `Failed` if it was not done everywhere."""
        return self._everywhere(lambda member: member.delete(path))

    def forward(
        self, path: str, query: Sequence[tuple[str, str]], body: bytes, headers: Mapping[str, str]
    ) -> httpx.Response:
        """Post somebody's request, which changes nothing; returns the first answer. Raises `Failed`."""
        return self._answers(lambda member: member.forward(path, query, body, headers))[0]

    @contextmanager
    def lines(self, path: str, query: Query = None) -> Iterator[Iterator[str]]:
        """Follow all streams of events; one that is cut is taken up again where it was."""
        lines: queue.Queue[list[str]] = queue.Queue()
        is_over = threading.Event()
        asked = f"{path}?{urlencode(query)}" if query else path
        for index, member in enumerate(self._members):
            arguments = (member, index, asked, lines.put, is_over)
            threading.Thread(target=_follow, args=arguments, daemon=True).start()
        try:
            yield (line for event in iter(lines.get, None) for line in event)
        finally:
            is_over.set()

    def _answers(self, ask: Callable[[Admin], T]) -> list[T]:
        """Return the answers of those that have one; the others are told of once."""
        return [*self._found(ask).values()]

    def _found(self, ask: Callable[[Admin], T]) -> Mapping[int, T]:
        """Return the same by the orchestrators' numbers."""
        results = self._asked(ask)
        answers = {i: result for i, result in enumerate(results) if not isinstance(result, Failed)}
        for member, result in zip(self._members, results, strict=True):
            if isinstance(result, Failed):
                self._tell(member, result)
        if not answers:
            raise next(result for result in results if isinstance(result, Failed))
        return answers

    def _asked(self, ask: Callable[[Admin], T]) -> list[T | Failed]:
        """Ask all at once; who was away a moment ago is not waited for again."""
        with ThreadPoolExecutor(len(self._members)) as threads:
            return list(threads.map(lambda member: self._tried(member, ask), self._members))

    def _tried(self, member: Admin, ask: Callable[[Admin], T]) -> T | Failed:
        error, until = self._away.get(member.url, (None, 0.0))
        if error is not None and time.monotonic() < until:
            return error
        try:
            return ask(member)
        except Refused as error:
            return error
        except Failed as error:
            self._away[member.url] = error, time.monotonic() + AWAY_S
            return error

    def _tell(self, member: Admin, error: Failed) -> None:
        """One that refuses knows less than the others, or all refuse: only one that is away is told of."""
        if not isinstance(error, Refused) and member.url not in self._told:
            self._told.add(member.url)
            say(f"note: {str(error).partition(chr(10))[0]}")

    def _everywhere(self, change: Callable[[Admin], T]) -> T:
        results = self._asked(change)
        answers = [result for result in results if not isinstance(result, Failed)]
        error = next((result for result in results if isinstance(result, Failed)), None)
        if error is not None and answers:
            raise Failed(f"{error}\n{len(answers)} of {len(results)} orchestrators have done it")
        if error is not None:
            raise error
        return answers[0]


def _follow(
    admin: Admin, index: int, path: str, take: Callable[[list[str]], object], is_over: threading.Event
) -> None:
    """Hand on events, each with all its lines but its number, which is one of this listener alone."""
    asked = path
    while not is_over.is_set():
        try:
            with admin.lines(asked) as lines:
                for event in _events(lines):
                    for number in (line.removeprefix("id: ") for line in event if line.startswith("id: ")):
                        asked = _after(path, number)
                    take([_marked(line, index) for line in event if not line.startswith("id: ")])
        except Failed as error:
            say(f"{error}\nasking again")
        is_over.wait(AGAIN_S)


def _marked(line: str, index: int) -> str:
    """Return the line of an event that says whose it is."""
    if not line.startswith("data: {"):
        return line
    return f"data: {json.dumps({**json.loads(line.removeprefix('data: ')), 'orchestrator': index})}"


def _after(path: str, number: str) -> str:
    """Return the path of those after an event. It may name an earlier one already."""
    before, _, query = path.partition("?")
    pairs = [(name, value) for name, value in parse_qsl(query) if name != "after"]
    return f"{before}?{urlencode([*pairs, ('after', number)])}"


def _events(lines: Iterable[str]) -> Iterator[list[str]]:
    event: list[str] = []
    for line in lines:
        event.append(line)
        if not line:
            yield event
            event = []


# --- what several tell, together --------------------------------------------------------------------


# Each gets the answers by the numbers of the orchestrators, of which some may be missing.


def _workers(answers: Mapping[int, list[Row]]) -> list[Row]:
    found: dict[tuple[str, str], list[Row]] = {}
    for rows in answers.values():
        for row in rows:
            found.setdefault((row["address"]["name"], row["address"]["url"]), []).append(row)
    return [_worker(rows) for rows in found.values()]


def _worker(rows: Sequence[Row]) -> Row:
    first = next((row for row in rows if row["state"] != "ready"), rows[0])  # of one that is worse off
    summed: Row = {name: sum(row[name] for row in rows) for name in _SUMS if name in first}
    largest: Row = {
        name: max((row[name] for row in rows if row[name] is not None), default=None)
        for name in _LARGEST
        if name in first
    }
    return {**first, **summed, **largest}


def _concatenated(answers: Mapping[int, list[Row]]) -> list[Row]:
    return [{**row, "orchestrator": index} for index, rows in answers.items() for row in rows]


def _by_time(answers: Mapping[int, list[Row]]) -> list[Row]:
    return sorted(_concatenated(answers), key=lambda event: float(event.get("time", 0.0)))


def _requests(answers: Mapping[int, Row]) -> Row:
    found = _concatenated({index: answer["requests"] for index, answer in answers.items()})
    found.sort(key=lambda request: float(request["received"]), reverse=True)
    silent = [f"{index}.{name}" for index, answer in answers.items() for name in answer["unanswered"]]
    return {"requests": found, "unanswered": silent}


def _request(answers: Mapping[int, Row]) -> Row:
    """Return the newest of requests that have the same id, and say how many others there are."""
    index = max(answers, key=lambda index: float(answers[index].get("received", 0.0)))
    others = sum(answer.get("others_with_this_id", 0) for answer in answers.values()) + len(answers) - 1
    return {**answers[index], "others_with_this_id": others, "orchestrator": index}


def _wishes(answers: Mapping[int, list[Row]]) -> list[Row]:
    """Return what is wanted of each role by who wants the most: each sees the load of its own clients."""
    found: dict[tuple[str, str], Row] = {}
    for wish in (wish for wishes in answers.values() for wish in wishes):
        most = found.setdefault((wish["model"], wish["role"]), wish)
        if wish["wanted"] > most["wanted"]:
            found[wish["model"], wish["role"]] = wish
    return list(found.values())


_MERGED: Final[Mapping[str, Callable[[Any], Any]]] = {
    "/admin/workers": _workers,
    "/admin/processes": _concatenated,
    "/admin/events": _by_time,
    "/admin/requests": _requests,
    "/admin/requests/": _request,
    "/admin/scaling": _wishes,
}
