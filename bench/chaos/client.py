"""Clients know the right answer: each request is on a connection of its own, judged when it has ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle
from random import Random
from types import TracebackType
from typing import Any

import httptools

from bench.shared.bodies import MODEL, text
from bench.shared.processes import Failed
from worker.sim.questions import Outcome, Question, WrongAnswer, chat, completion, judge, judge_part

PATIENCE_S = 30.0  # with a whole request: longer than any silence after which somebody is given up
CHUNK = 65536  # bytes
HEAD = "{} {} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
FIGURES = "/health?verbose"  # says which process answers
PROMPT = 240  # characters: 80 tokens of the simulated model


class Answer:
    """An answer comes in pieces; a parser calls the methods."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.is_complete = False

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True


class Connection:
    """A connection has one request at a time. Whoever opened it closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Raises `OSError`."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def close(self) -> None:
        self._writer.transport.abort()

    async def ask(
        self, path: str, body: bytes = b"", method: str = "", *, into: Answer | None = None
    ) -> Answer:
        """Return the answer, or what came of it before the connection ended. `into` is filled meanwhile."""
        answer = into or Answer()
        if self._writer.is_closing():  # the other side has ended it
            return answer
        head = HEAD.format(method or ("POST" if body else "GET"), path, len(body))
        self._writer.write(head.encode() + body)
        parser = httptools.HttpResponseParser(answer)
        while not answer.is_complete and (data := await self._read()):
            parser.feed_data(data)
            answer.status = parser.get_status_code()
        return answer

    async def _read(self) -> bytes:
        """Return nothing at the end, however it comes."""
        try:
            return await self._reader.read(CHUNK)
        except ConnectionError:
            return b""


async def fetch(port: int, path: str, body: bytes = b"", method: str = "") -> Answer:
    """Ask on a connection of its own. Raises `Failed` if no answer comes."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            connection = await Connection.open(port)
            try:
                answer = await connection.ask(path, body, method)
            finally:
                connection.close()
    except (OSError, TimeoutError) as error:
        raise Failed(f"{path} on port {port}: {error!r}") from error
    if not answer.is_complete:
        raise Failed(f"{path} on port {port}: cut short")
    return answer


async def fetch_json(port: int, path: str) -> Any:
    """Decode the answer. Raises `Failed` for anything but 200."""
    answer = await fetch(port, path)
    if answer.status != 200:
        raise Failed(f"{path} on port {port}: HTTP {answer.status} {answer.text[:200]}")
    return json.loads(answer.body)


# --- questions and what came of them ------------------------------------------------------------


def questions(random: Random, tokens: int) -> Iterator[Question]:
    """Yield chats and completions in turn, half of them streams, without end and no two alike."""
    kinds = cycle([(make, is_stream) for make in (chat, completion) for is_stream in (False, True)])
    for make, is_stream in kinds:
        yield make(text(random, PROMPT), tokens, is_stream=is_stream, model=MODEL)


class End(StrEnum):
    """A request ends in one of these ways."""

    RIGHT = "right"
    ERROR = "an error"
    CUT = "cut short"
    GIVEN_UP = "given up"
    REFUSED = "no connection"
    WRONG = "wrong"


_ENDS = {outcome: End[outcome.name] for outcome in Outcome}


@dataclass(frozen=True)
class Result:
    """This came of one request. Times are the event loop's."""

    began: float
    ended: float
    end: End
    why: str = ""  # if it is not right
    process: int | None = None  # that it was in: its pid, where that was asked

    @property
    def has_failed(self) -> bool:
        return self.end is not End.RIGHT


async def ask(port: int, question: Question, *, asks_process: bool = False) -> Result:
    """Ask, and judge; with `asks_process`, ask first which process has the connection."""
    loop = asyncio.get_running_loop()
    began, answer, process = loop.time(), Answer(), None

    def result(end: End, why: object = "") -> Result:
        return Result(began, loop.time(), end, str(why), process)

    try:
        connection = await Connection.open(port)
    except OSError as error:
        return result(End.REFUSED, error)
    try:
        async with asyncio.timeout(PATIENCE_S):
            if asks_process:
                process = json.loads((await connection.ask(FIGURES)).body or b'{"pid": null}')["pid"]
            await connection.ask(question.path, json.dumps(question.body).encode(), into=answer)
    except TimeoutError:
        return result(*_judged(question, answer, End.GIVEN_UP))
    finally:
        connection.close()
    return result(*_judged(question, answer, End.CUT))


def _judged(question: Question, answer: Answer, if_incomplete: End) -> tuple[End, str]:
    try:
        if answer.is_complete:
            end = _ENDS[judge(question, answer.status, answer.text)]
            return end, "" if end is End.RIGHT else f"HTTP {answer.status} {answer.text[-300:]}"
        judge_part(question, answer.text)
    except WrongAnswer as error:
        return End.WRONG, str(error)
    return if_incomplete, f"after {len(answer.body)} bytes"


class Load:
    """So many clients ask one question after another while the block runs; at its end they have ended."""

    def __init__(
        self, port: int, asked: Iterable[Question], clients: int, *, asks_process: bool = False
    ) -> None:
        self._port = port
        self._questions = iter(asked)
        self._clients = clients
        self._asks_process = asks_process
        self._has_ended = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.results: list[Result] = []
        self.begun = 0

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._clients)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=error is not None)

    @property
    def open(self) -> int:
        """Count the requests that have no answer yet."""
        return self.begun - len(self.results)

    async def reach(self, count: int) -> None:
        """Return once so many requests have ended. Raises `Failed` if there are no more."""
        while len(self.results) < count:
            if all(task.done() for task in self._tasks):
                raise Failed(f"only {len(self.results)} requests have ended, not {count}")
            self._has_ended.clear()
            await self._has_ended.wait()

    def stop(self) -> None:
        """Ask no more; what is open is waited for on leaving."""
        self._questions = iter(())

    async def _client(self) -> None:
        while question := next(self._questions, None):
            self.begun += 1
            result = await ask(self._port, question, asks_process=self._asks_process)
            self.results.append(result)
            self._has_ended.set()
