"""`baton up` asks and changes the workers of its own orchestrator, at the admin listener."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import httpx

from launch.local.control import CommandFailed
from launch.plan import ProcessSpec

TIMEOUT_S: Final = 10.0
_PATH: Final = "/admin/workers"


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
    """A registrar is a client of the admin listener. What goes wrong is a `CommandFailed`."""

    def __init__(self, client: httpx.AsyncClient, url: str | None, key: str) -> None:
        self._client = client
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"}

    @property
    def has_listener(self) -> bool:
        """Return whether there is an admin listener: without one no worker comes or goes."""
        return self._url is not None

    async def rows(self) -> Sequence[Row]:
        """Return all workers."""
        return [_row(document) for document in await self._ask("GET", _PATH)]

    async def add(self, spec: ProcessSpec, model: str, served_model: str | None, zone: str | None) -> str:
        """Add a worker, and return the name that it gets."""
        more = {"served_model": served_model, "zone": zone}
        document = {"model": model, "role": spec.role, "url": spec.url, **more}
        return _row(await self._ask("POST", _PATH, document)).name

    async def wanted(self) -> Sequence[Wanted]:
        """Return how many workers are wanted of each role of each model."""
        wishes = await self._ask("GET", "/admin/scaling")
        return [Wanted(wish["model"], wish["role"], wish["wanted"], wish["why"]) for wish in wishes]

    async def drain(self, name: str) -> None:
        await self._ask("POST", f"{_PATH}/{quote(name, safe='/')}/drain")

    async def undrain(self, name: str) -> None:
        await self._ask("POST", f"{_PATH}/{quote(name, safe='/')}/undrain")

    async def remove(self, name: str) -> None:
        """Have a worker removed once its last leg has ended."""
        await self._ask("DELETE", f"{_PATH}/{quote(name, safe='/')}")

    async def _ask(self, method: str, path: str, document: object = None) -> Any:
        answer = await self._answer(method, path, document)
        try:
            content = answer.json()
        except ValueError as error:
            raise CommandFailed(f"somebody else answers at {self._url}: no JSON") from error
        if answer.status_code >= 400:
            raise CommandFailed(f"the orchestrator refuses {method} {path}: {content['error']['message']}")
        return content

    async def _answer(self, method: str, path: str, document: object) -> httpx.Response:
        if self._url is None:
            raise CommandFailed("there is no admin listener to change workers at: set orchestrator.admin")
        try:
            return await self._client.request(
                method, self._url + path, headers=self._headers, json=document, timeout=TIMEOUT_S
            )
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise CommandFailed(f"the orchestrator does not answer at {self._url}: {why}") from error


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
