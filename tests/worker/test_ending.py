"""Ending a request in vLLM: against an engine that keeps to the order of its messages, as vLLM's does."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from orchestrator.wire.info import BEGUN_PATH, END_PATH
from tests.worker.asgi import Reply, call, post
from worker import ending

JSON = {"content-type": "application/json"}


class Core:
    """The engine behind the API server: takes messages in their order, and answers in that order."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.running: set[str] = set()

    async def abort_requests_async(self, names: list[str]) -> None:
        self.running -= set(names)

    def finish(self, name: str) -> None:
        """What it has made is on its way from now on."""
        self.running.remove(name)
        self._server.under_way.append(name)


class Server:
    """vLLM's `AsyncLLM`: it knows a request until it has handed out its answer."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={}, add_request=self._add)
        self.engine_core = Core(self)
        self.under_way: list[str] = []
        self.answered: dict[str, str] = {}
        self.added: asyncio.Queue[str] = asyncio.Queue()
        self.over: dict[str, asyncio.Event] = {}

    def _add(self, request: Any, prompt: str | None, *, index: int = 0) -> None:
        self.output_processor.request_states[request.request_id] = SimpleNamespace(is_prefilling=True)
        self.engine_core.running.add(request.request_id)
        self.over[request.request_id] = asyncio.Event()
        self.added.put_nowait(request.request_id)

    def add(self, name: str) -> str:
        self.output_processor.add_request(SimpleNamespace(request_id=name), None, index=1)
        return name

    async def is_sleeping(self) -> bool:
        """Answered behind all outputs that are under way; a task hands them out soon."""
        asyncio.get_running_loop().call_soon(self._hand_out)
        return False

    def _hand_out(self) -> None:
        for name in self.under_way:
            self._answer(name, "length")
        self.under_way.clear()

    async def abort(self, names: list[str], *, internal: bool) -> None:
        assert internal  # by the engine's own names, which are never given twice
        for name in names:
            self._answer(name, "abort")

    def _answer(self, name: str, reason: str) -> None:
        if self.output_processor.request_states.pop(name, None):
            self.answered[name] = reason
            self.over[name].set()


def test_requests_that_run_are_ended_and_answered() -> None:
    server = Server()
    names = [server.add("a-1"), server.add("a-2")]
    asyncio.run(ending.end(server, names))
    assert server.engine_core.running == set()
    assert server.answered == {"a-1": "abort", "a-2": "abort"}


def test_an_answer_that_is_under_way_arrives() -> None:
    server = Server()
    name = server.add("a-1")
    server.engine_core.finish(name)
    asyncio.run(ending.end(server, [name]))
    assert server.answered == {name: "length"}


def test_others_go_on() -> None:
    server = Server()
    other = server.add("a-2")
    asyncio.run(ending.end(server, ["a-1"]))
    assert server.engine_core.running == {other}
    assert server.answered == {}


def app(engine: Server | None) -> FastAPI:
    """An application that gives the engine two requests for each it is asked, while it streams its answer as
    vLLM does, and ends the answer when both are over.
    """
    made = FastAPI()
    ending.add_route(made)
    if engine is None:
        return made
    ending.follow(engine)
    setattr(made.state, ending.ENGINE_KEY, engine)
    count = itertools.count()

    @made.post("/serve")
    async def serve(request: Request) -> StreamingResponse:
        async def events() -> AsyncGenerator[bytes]:
            names = [engine.add(f"chatcmpl-{request.headers['x-request-id']}-{next(count)}") for _ in "ab"]
            await asyncio.gather(*(engine.over[name].wait() for name in names))
            yield ",".join(f"{name}:{engine.answered[name]}" for name in names).encode()

        return StreamingResponse(events())

    return made


def asked(name: str) -> bytes:
    return json.dumps({"request_id": name}).encode()


async def serves(app: FastAPI, engine: Server, **headers: str) -> asyncio.Task[Reply]:
    """A request that runs."""
    head = {name.replace("_", "-"): value for name, value in headers.items()}
    task = asyncio.create_task(call(app, "POST", "/serve", [b""], head))
    for _ in "ab":
        await engine.added.get()
    return task


@pytest.mark.parametrize("header", ["x_baton_leg", "x_request_id"])
def test_the_call_ends_all_requests_of_a_leg(header: str) -> None:
    async def main() -> None:
        server = Server()
        made = app(server)
        task = await serves(made, server, **{"x_request_id": "theirs", header: "leg-1"})
        assert (await call(made, "POST", END_PATH, [asked("leg-1")], JSON)).status == 202
        stem = "leg-1" if header == "x_request_id" else "theirs"
        assert (await task).body.decode() == f"chatcmpl-{stem}-0:abort,chatcmpl-{stem}-1:abort"

    asyncio.run(main())


def test_legs_whose_clients_call_them_alike_are_told_apart() -> None:
    async def main() -> None:
        server = Server()
        made = app(server)
        tasks = [
            await serves(made, server, x_request_id="same", x_baton_leg=leg) for leg in ("1", "2", "same")
        ]
        states = server.output_processor.request_states
        states["chatcmpl-same-2"].is_prefilling = False  # of the second leg
        begun = [await call(made, "POST", BEGUN_PATH, [asked(leg)], JSON) for leg in ("1", "2", "same")]
        assert [reply.json()["begun"] for reply in begun] == [False, True, False]
        await call(made, "POST", END_PATH, [asked("2")], JSON)
        assert (await tasks[1]).body == b"chatcmpl-same-2:abort,chatcmpl-same-3:abort"
        assert len(states) == 4
        for leg in ("same", "1"):
            await call(made, "POST", END_PATH, [asked(leg)], JSON)
        await asyncio.gather(*tasks)
        assert getattr(made.state, ending.LEGS_KEY) == {}

    asyncio.run(main())


def test_a_leg_that_is_sent_again_is_still_known_when_the_first_is_over() -> None:
    async def main() -> None:
        server = Server()
        made = app(server)
        first = await serves(made, server, x_request_id="leg")
        second = await serves(made, server, x_request_id="leg")
        for name in ("chatcmpl-leg-0", "chatcmpl-leg-1"):
            server._answer(name, "length")
        await first
        await call(made, "POST", END_PATH, [asked("leg")], JSON)
        assert (await second).body == b"chatcmpl-leg-2:abort,chatcmpl-leg-3:abort"

    asyncio.run(main())


@pytest.mark.parametrize("body", [b"", b"{}", b'{"request_id": 1}'])
def test_bad_input_gets_an_error(body: bytes) -> None:
    assert post(app(Server()), END_PATH, body, JSON).status == 400


def test_what_is_unknown_is_no_error() -> None:
    assert post(app(Server()), END_PATH, asked("nobody"), JSON).status == 202
    assert post(app(Server()), BEGUN_PATH, asked("nobody"), JSON).json() == {"begun": False}


def test_a_server_that_cannot_says_so() -> None:
    assert post(app(None), END_PATH, b'{"request_id": "a"}', JSON).status == 404


def test_an_engine_that_is_built_otherwise_is_left_alone() -> None:
    assert ending.can_end(Server())
    assert not ending.can_end(SimpleNamespace())
    assert not ending.can_end(
        SimpleNamespace(output_processor=SimpleNamespace(), engine_core=SimpleNamespace())
    )
