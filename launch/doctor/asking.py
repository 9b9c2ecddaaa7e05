"""The doctor asks workers as the orchestrator would, with its key."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx
import msgspec

from orchestrator.config.addresses import WorkerAddress, ranks_of
from orchestrator.wire.info import WorkerInfo

# A server makes its Date anew each second, of whole seconds, and later if it is busy. The freshest of answers
# over more than a second lies no further behind its clock than this.
DATE_LATE_S = 1.0
_ENGINES_AT_MOST = 64  # of a worker are known that says by itself how many it has


class Unanswered(Exception):
    """A worker gave no answer. Its cause is what the client library or the socket said."""


@dataclass
class Offset:
    """How far a worker's clock is ahead of ours, in seconds.

    Each answer narrows the range from below. From above the freshest Date counts: a busy server makes them
    late.
    """

    least: float = float("-inf")
    freshest: float = float("-inf")  # of Dates, by when they were asked for

    def note(self, date: str | None, sent: float, received: float) -> None:
        """Take an answer's Date, which was made between these moments; `time.time()`."""
        try:
            said = parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return
        self.least = max(self.least, said - received)
        self.freshest = max(self.freshest, said - sent)

    @property
    def is_known(self) -> bool:
        return self.least > float("-inf")

    @property
    def surely_s(self) -> float:
        """Return by how much the clocks differ at least, negative if the worker's is behind."""
        return self.least if self.least > 0 else min(self.freshest + DATE_LATE_S, 0.0)


@dataclass
class Patient:
    """A patient is a worker, or one of its data-parallel engines, and what is known of it so far."""

    address: WorkerAddress
    size: int = 1  # so many data-parallel engines it has by the config
    info: WorkerInfo | None = None
    max_model_len: int | None = None
    models: tuple[str, ...] = ()  # that it lists; the beginnings of their names
    is_well: bool = False  # it can be asked for answers
    engines: list[Patient] = field(default_factory=list)  # each by itself; empty if it has only one
    offset: Offset = field(default_factory=Offset)

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def parts(self) -> list[Patient]:
        """Return what requests can be sent to: its engines, or itself."""
        return self.engines or [self]

    def divide(self) -> None:
        """Know each of its engines by itself, of which it has as many as the config or else it says."""
        announced = (self.info.data_parallel_size if self.info is not None else None) or self.size
        count = self.size if self.size > 1 else min(announced, _ENGINES_AT_MOST)
        if count > 1:
            self.engines = [
                replace(self, address=address, is_well=self.is_well and rank < announced, offset=Offset())
                for rank, address in enumerate(ranks_of(self.address, count))
            ]


class Client:
    """It asks workers with the key that the orchestrator would send. Enter it to use it."""

    def __init__(self, key: str | None, timeout_s: float) -> None:
        self.key = key
        self.timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def get(self, patient: Patient, path: str, *, with_key: bool = True) -> httpx.Response:
        """Ask for a page. Raises `Unanswered`."""
        return await self._ask(patient, "GET", path, None, with_key=with_key)

    async def post(self, patient: Patient, path: str, document: Any) -> httpx.Response:
        """Ask for an answer. Raises `Unanswered`."""
        return await self._ask(patient, "POST", path, msgspec.json.encode(document), with_key=True)

    async def _ask(
        self, patient: Patient, method: str, path: str, content: bytes | None, *, with_key: bool
    ) -> httpx.Response:
        headers = {"content-type": "application/json"} if content is not None else {}
        if with_key and self.key:
            headers["authorization"] = f"Bearer {self.key}"
        if patient.address.rank is not None:
            headers["x-data-parallel-rank"] = str(patient.address.rank)
        sent, url = time.time(), patient.address.url + path
        try:
            answer = await self._http.request(method, url, content=content, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from error
        patient.offset.note(answer.headers.get("date"), sent, time.time())
        return answer


def said_in(answer: httpx.Response) -> str:
    """Return in short what an answer that is no success says."""
    text = answer.text.strip()
    try:
        error = answer.json()
        error = error.get("error", error)
        text = str(error.get("message", text)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return f"{answer.status_code} {text[:200]}".strip()
