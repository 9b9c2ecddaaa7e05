"""Ending a request in vLLM: against an engine that keeps to the order of its messages, as vLLM's does."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from orchestrator.wire.info import BEGUN_PATH, END_PATH
from tests.worker.asgi import post
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
        self.output_processor = SimpleNamespace(external_req_ids={})
        self.engine_core = Core(self)
        self.under_way: list[str] = []
        self.answered: dict[str, str] = {}

    def add(self, name: str) -> str:
        internal = f"{name}-0f3a"
        self.output_processor.external_req_ids[name] = [internal]
        self.engine_core.running.add(internal)
        return internal

    async def is_sleeping(self) -> bool:
        """Answered behind all outputs that are under way; a task hands them out soon."""
        asyncio.get_running_loop().call_soon(self._hand_out)
        return False

    def _hand_out(self) -> None:
        for internal in self.under_way:
            self._answer(internal, "length")
        self.under_way.clear()

    async def abort(self, names: list[str]) -> None:
        for name in names:
            for internal in self.output_processor.external_req_ids.get(name, [])[:]:
                self._answer(internal, "abort")

    def _answer(self, internal: str, reason: str) -> None:
        name = internal.removesuffix("-0f3a")
        if self.output_processor.external_req_ids.pop(name, None):
            self.answered[name] = reason


@pytest.mark.parametrize("name", ["chatcmpl-a-1", "cmpl-a-1-0", "a-1_0"])
def test_a_request_that_runs_is_ended_and_answered(name: str) -> None:
    server = Server()
    server.add(name)
    asyncio.run(ending.end(server, "a-1"))
    assert server.engine_core.running == set()
    assert server.answered == {name: "abort"}


def test_an_answer_that_is_under_way_arrives() -> None:
    server = Server()
    server.engine_core.finish(server.add("chatcmpl-a-1"))
    asyncio.run(ending.end(server, "a-1"))
    assert server.answered == {"chatcmpl-a-1": "length"}


def test_others_go_on() -> None:
    server = Server()
    other = server.add("chatcmpl-a-2")
    asyncio.run(ending.end(server, "a-1"))
    assert server.engine_core.running == {other}
    assert server.answered == {}


def app(engine: object | None) -> FastAPI:
    made = FastAPI()
    ending.add_route(made)
    if engine is not None:
        setattr(made.state, ending.ENGINE_KEY, engine)
    return made


def test_the_call_ends_a_request() -> None:
    server = Server()
    server.add("chatcmpl-a-1")
    assert post(app(server), END_PATH, json.dumps({"request_id": "a-1"}).encode(), JSON).status == 202
    assert server.answered == {"chatcmpl-a-1": "abort"}


@pytest.mark.parametrize("body", [b"", b"{}", b'{"request_id": 1}'])
def test_bad_input_gets_an_error(body: bytes) -> None:
    assert post(app(Server()), END_PATH, body, JSON).status == 400


def test_a_server_that_cannot_says_so() -> None:
    assert post(app(None), END_PATH, b'{"request_id": "a"}', JSON).status == 404


def test_an_engine_that_is_built_otherwise_is_left_alone() -> None:
    assert ending.can_end(Server())
    assert not ending.can_end(SimpleNamespace())
    assert not ending.can_end(
        SimpleNamespace(output_processor=SimpleNamespace(), engine_core=SimpleNamespace())
    )


@pytest.mark.parametrize(("is_prefilling", "begun"), [(True, False), (False, True)])
def test_it_says_whether_a_request_has_begun(is_prefilling: bool, begun: bool) -> None:
    server = Server()
    internal = server.add("chatcmpl-mine")
    server.output_processor.request_states = {internal: SimpleNamespace(is_prefilling=is_prefilling)}
    for name, expected in (("mine", begun), ("other", False)):
        reply = post(app(server), BEGUN_PATH, json.dumps({"request_id": name}).encode(), JSON)
        assert (reply.status, reply.json()) == (200, {"begun": expected})
