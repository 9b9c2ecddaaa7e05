"""`baton up` asks and changes the workers of its own orchestrators, at their admin listeners."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote

import httpx

from launch.local.control import CommandFailed
from launch.plan import ProcessSpec

TIMEOUT_S: Final = 10.0
_PATH: Final = "/admin/workers"


class Refused(CommandFailed):
    """An orchestrator has refused it with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Row:
    """A row is one worker as the orchestrator sees it; a data-parallel engine has one of its own."""

    name: str
    model: str
    role: str
    url: str
    state: str
    in_flight: int
    is_drained: bool
    is_managed: bool
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many workers of a pool are wanted."""

    model: str
    role: str
    count: int
    why: str


class Registrar:
    """A registrar is a client of the admin listeners of all orchestrators, which know nothing of each other.

    What goes wrong is a `CommandFailed`, which names the listener.
    """

    def __init__(self, client: httpx.AsyncClient, urls: Sequence[str], key: str) -> None:
        self._client = client
        self._listeners = [_Listener(client, url, key) for url in urls]

    is_discovering = False  # the orchestrator finds by itself which workers come and go

    @property
    def has_listener(self) -> bool:
        """Return whether there is an admin listener: without one no worker comes or goes."""
        return bool(self._listeners)

    async def is_serving(self, url: str) -> bool:
        """Return whether the orchestrator at `url` can serve every model."""
        try:
            return (await self._client.get(f"{url}/ready", timeout=TIMEOUT_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def rows(self) -> Sequence[Row]:
        """Return all workers; of several orchestrators what is true of a worker in all of them."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for rows in await self._ask("GET", _PATH):
            with _understood():
                for row in map(_row, rows):
                    found.setdefault((row.role, row.url, row.name), []).append(row)
        return [_merged(rows) for rows in found.values()]

    async def add(self, spec: ProcessSpec, model: str, served_model: str | None, zone: str | None) -> str:
        """Add a worker, and return the name that it gets."""
        more = {"served_model": served_model, "zone": zone}
        document = {"model": model, "role": spec.role, "url": spec.url, **more}
        first, *_ = await self._ask("POST", _PATH, document)
        with _understood():
            return _row(first).name

    async def wanted(self) -> Sequence[Wanted]:
        """Return how many workers are wanted of each role of each model, by who wants the most."""
        found: dict[tuple[str, str], Wanted] = {}
        for wishes in await self._ask("GET", "/admin/scaling"):
            for wanted in _wanted(wishes):
                most = found.setdefault((wanted.model, wanted.role), wanted)
                if wanted.count > most.count:
                    found[wanted.model, wanted.role] = wanted
        return list(found.values())

    async def drain(self, name: str) -> None:
        await self._ask("POST", f"{_PATH}/{quote(name, safe='/')}/drain")

    async def undrain(self, name: str) -> None:
        await self._ask("POST", f"{_PATH}/{quote(name, safe='/')}/undrain")

    async def remove(self, name: str) -> None:
        """Have a worker removed once its last leg has ended."""
        await self._ask("DELETE", f"{_PATH}/{quote(name, safe='/')}")

    async def _ask(self, method: str, path: str, document: object = None) -> list[Any]:
        """Return the answers of all, in their order; the first failure is raised when all have answered."""
        if not self._listeners:
            raise CommandFailed("there is no admin listener to change workers at: set orchestrator.admin")
        asked = (listener.ask(method, path, document) for listener in self._listeners)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


class _Listener:
    """A listener is the admin listener of one orchestrator."""

    def __init__(self, client: httpx.AsyncClient, url: str, key: str) -> None:
        self._client = client
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"}

    async def ask(self, method: str, path: str, document: object) -> Any:
        answer = await self._answer(method, path, document)
        try:
            content = answer.json()
        except ValueError as error:
            raise CommandFailed(f"somebody else answers at {self._url}: no JSON") from error
        if answer.status_code >= 400:
            with _understood():
                why = content["error"]["message"]
            told = f"the orchestrator at {self._url} refuses {method} {path}: {why}"
            raise Refused(answer.status_code, told)
        return content

    async def _answer(self, method: str, path: str, document: object) -> httpx.Response:
        try:
            return await self._client.request(
                method, self._url + path, headers=self._headers, json=document, timeout=TIMEOUT_S
            )
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise CommandFailed(f"the orchestrator does not answer at {self._url}: {why}") from error


def _merged(rows: Sequence[Row]) -> Row:
    """Return one row for a worker as several orchestrators see it: the state of one that is worse off."""
    states = [row.state for row in rows]
    worst = "draining" if "draining" in states else next((s for s in states if s != "ready"), "ready")
    return replace(
        rows[0],
        state=worst,
        in_flight=sum(row.in_flight for row in rows),
        is_drained=all(row.is_drained for row in rows),
        last_error=next((row.last_error for row in rows if row.last_error), None),
    )


@contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CommandFailed(f"an admin listener answers as none of this version does: {error!r}") from error


def _wanted(wishes: Any) -> Sequence[Wanted]:
    with _understood():
        return [Wanted(wish["model"], wish["role"], int(wish["wanted"]), wish["why"]) for wish in wishes]


def _row(document: Any) -> Row:
    address = document["address"]
    return Row(
        name=address["name"],
        model=address["model"],
        role=address["role"],
        url=address["url"],
        state=document["state"],
        in_flight=document["in_flight"],
        is_drained=document["is_drained"],
        is_managed=address["is_managed"],
        last_error=document["last_error"],
    )
