from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import httpx
import pytest

from orchestrator.config.options import Config
from orchestrator.control.admin import admin_app
from orchestrator.control.state import RouteAnswer, RouteQuestion
from tests.orchestrator.control.fakes import CONFIG, KEY, RING, FakeState, ask, error_code


@dataclass
class Asked(FakeState):
    questions: list[RouteQuestion] = field(default_factory=list)

    async def explain(self, question: RouteQuestion) -> RouteAnswer:
        self.questions.append(question)
        return RouteAnswer(200, b'{"plan":null}')


def post(state: FakeState, path: str = "/admin/explain", **options: object) -> httpx.Response:
    return ask(admin_app(state), path, "POST", **options)  # type: ignore[arg-type]


def test_what_the_process_tells_is_the_answer() -> None:
    state = Asked()
    response = post(state, body={"model": "m"}, headers={"x-session-id": "a", "authorization": "Bearer x"})
    assert (response.status_code, response.json()) == (200, {"plan": None})
    (question,) = state.questions
    assert (question.path, question.body) == ("/v1/chat/completions", b'{"model":"m"}')
    assert (question.avoid, question.process) == ((), None)
    headers = dict(question.headers)
    assert headers[b"x-session-id"] == b"a"
    assert headers[b"content-type"] == b"application/json"
    assert headers.keys().isdisjoint({b"authorization", b"host", b"content-length"})


def test_the_query_says_what_is_not_in_the_body() -> None:
    state = Asked()
    post(state, "/admin/explain?path=/v1/completions&avoid=m/decode/0&avoid=m/decode/1&process=3", body={})
    (question,) = state.questions
    assert question.path == "/v1/completions"
    assert question.avoid == ("m/decode/0", "m/decode/1")
    assert question.process == 3


@pytest.mark.parametrize("process", ["", "x", "-1", "1.5", "9" * 40, "\u0661"])
def test_an_index_is_a_number(process: str) -> None:
    response = post(Asked(), f"/admin/explain?process={process}", body={})
    assert response.status_code == 400
    assert error_code(response) == "invalid_request"


@pytest.mark.parametrize("query", ["proces=1", "path=/v1/completions&path=/v1/embeddings"])
def test_a_query_that_is_not_understood_is_refused(query: str) -> None:
    response = post(Asked(), f"/admin/explain?{query}", body={})
    assert (response.status_code, error_code(response)) == (400, "invalid_request")


def test_a_body_has_a_limit() -> None:
    limits = {"orchestrator": {"limits": {"max_body_bytes": 2000}}}
    config = Config.model_validate({**CONFIG.model_dump(), **limits})
    state = Asked(config=config)
    assert post(state, body={"prompt": "x" * 1000}).status_code == 200
    assert post(state, body={"prompt": "x" * 3000}).status_code == 413
    assert len(state.questions) == 1


def test_it_needs_a_key_if_there_are_keys() -> None:
    assert post(Asked(keys=RING), body={}).status_code == 401
    assert post(Asked(keys=RING), body={}, headers=KEY).status_code == 200


def test_a_form_of_another_site_is_refused() -> None:
    async def form() -> httpx.Response:
        transport = httpx.ASGITransport(admin_app(Asked()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
            return await client.post("/admin/explain", data={"a": "b"})

    response = asyncio.run(form())
    assert (response.status_code, error_code(response)) == (400, "unsupported_media_type")


def test_it_is_asked_with_post() -> None:
    assert ask(admin_app(Asked()), "/admin/explain").status_code == 405
