"""Workers answer what none should: what the client gets, who else is asked, what becomes of the worker."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.workers.states import WorkerState
from tests.orchestrator.fakes import FakeExchange
from tests.orchestrator.scripted import ScriptedWorker, Site, of_json, page, refused, run, site, sse

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
HTML = b"<html><script>alert(1)</script></html>"
ERROR = {"message": "its words", "type": "BadRequestError", "param": None, "code": 400}
READY, SUSPECT, UNFIT = WorkerState.READY, WorkerState.SUSPECT, WorkerState.UNFIT


@dataclass(frozen=True)
class Case:
    """What a worker answers to a whole chat, and to all else but `/health`."""

    answer: bytes
    status: int  # that the client gets if there is no other worker
    is_elsewhere: bool  # another worker is asked, and the client has its answer
    state: WorkerState  # of the worker, once a probe has looked at it if that is due


def line(status: str, content: bytes = b"", fields: str = "") -> bytes:
    return page(content, status, fields)


def denied(answer: bytes, status: int = 502) -> Case:
    """It is about the worker, and a probe sees that, too."""
    return Case(answer, status, is_elsewhere=True, state=UNFIT)


def clients(answer: bytes, status: int) -> Case:
    """It is about the request: no other worker is asked."""
    return Case(answer, status, is_elsewhere=False, state=READY)


def failed(answer: bytes, status: int = 502) -> Case:
    """It counts against the worker, whose health is well; one such answer is not enough."""
    return Case(answer, status, is_elsewhere=True, state=READY)


def error(code: int, **fields: Any) -> dict[str, Any]:
    return {"error": ERROR | {"code": code} | fields}


PATHLESS = {"detail": "Not Found"}
CASES: dict[str, Case] = {
    # About the key, or whoever stands before the worker.
    "401 as vLLM": denied(of_json({"error": "Unauthorized"}, "401 Unauthorized")),
    "401 as OpenAI": denied(refused("Incorrect API key", "401 Unauthorized", code="invalid_api_key")),
    "401 empty": denied(line("401 Unauthorized", fields="www-authenticate: Bearer\r\n")),
    "401 html": denied(line("401 Unauthorized", HTML, "content-type: text/html\r\n")),
    "402": denied(line("402 Payment Required")),
    "403 empty": denied(line("403 Forbidden")),
    "403 as OpenAI": denied(refused("no", "403 Forbidden")),
    "403 html": denied(line("403 Forbidden", HTML, "content-type: text/html\r\n")),
    "407": denied(line("407 Proxy Authentication Required", fields="proxy-authenticate: Basic\r\n")),
    "408": denied(line("408 Request Timeout")),
    "421": denied(line("421 Misdirected Request")),
    "426": denied(line("426 Upgrade Required", fields="upgrade: h2c\r\n")),
    "505": denied(line("505 HTTP Version Not Supported"), 502),
    "511": denied(line("511 Network Authentication Required", HTML)),
    # No model server answers so.
    "201": denied(of_json({"id": 1}, "201 Created")),
    "202": denied(line("202 Accepted")),
    "203": denied(of_json({"choices": []}, "203 Non-Authoritative Information")),
    "204": denied(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "204 with a body": denied(b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\nhi"),
    "205": denied(line("205 Reset Content")),
    "206": denied(of_json({"choices": []}, "206 Partial Content")),
    "226": denied(line("226 IM Used")),
    "299": denied(line("299 Odd")),
    "300": denied(line("300 Multiple Choices")),
    "301": denied(line("301 Moved Permanently", fields="location: http://evil.example/\r\n")),
    "301 without location": denied(line("301 Moved Permanently")),
    "302": denied(line("302 Found", HTML, "location: /login\r\n")),
    "303": denied(line("303 See Other", fields="location: /\r\n")),
    "304": denied(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "307 to itself": denied(line("307 Temporary Redirect", fields="location: /v1/chat/completions\r\n")),
    "308": denied(line("308 Permanent Redirect", fields="location: //x\r\n")),
    "399": denied(line("399 Odd")),
    "600": denied(of_json(error(600), "600 Odd")),
    "799": denied(line("799 Odd")),
    "999": denied(line("999 Request denied", HTML)),
    # 404 and 405, by their bodies.
    "404 of a model": clients(
        refused("The model `x` does not exist.", "404 Not Found", type="NotFoundError"), 404
    ),
    "404 in vLLM's older words": clients(
        of_json(
            {"object": "error", "message": "no such adapter", "type": "NotFoundError", "code": 404}, "404 No"
        ),
        404,
    ),
    "404 of FastAPI": denied(of_json(PATHLESS, "404 Not Found")),
    "404 of a path, as OpenAI": denied(refused("Not Found", "404 Not Found", type="Not Found")),
    "404 html": denied(line("404 Not Found", HTML, "content-type: text/html\r\n")),
    "404 empty": denied(line("404 Not Found")),
    "404 {}": denied(of_json({}, "404 Not Found")),
    "404 a list": denied(of_json([error(404)], "404 Not Found")),
    "404 an error without type": denied(of_json({"error": {"message": "?"}}, "404 Not Found")),
    "404 an error without message": denied(of_json({"error": {"type": "x", "code": 404}}, "404 Not Found")),
    "404 a message that is no text": denied(of_json({"error": {"message": 1, "code": 1}}, "404 Not Found")),
    "404 deep": denied(line("404 Not Found", b"[" * 20_000)),
    "404 no UTF-8": denied(line("404 Not Found", b'{"error":{"message":"\xff","code":1}}')),
    "404 in gzip": denied(
        line("404 Not Found", gzip.compress(json.dumps(error(404)).encode()), "content-encoding: gzip\r\n")
    ),
    "405 of FastAPI": denied(of_json({"detail": "Method Not Allowed"}, "405 Method Not Allowed")),
    "405 empty": denied(line("405 Method Not Allowed", fields="allow: GET\r\n")),
    "405 as OpenAI": clients(refused("this model does not chat", "405 Method Not Allowed"), 405),
    # Other 4xx: the client's if they explain themselves, or if vLLM has them.
    "400 as vLLM": clients(refused("max_tokens is too large"), 400),
    "400 html": clients(line("400 Bad Request", HTML, "content-type: text/html\r\n"), 400),
    "400 empty": clients(line("400 Bad Request"), 400),
    "400 deep": clients(line("400 Bad Request", b'{"a":' * 20_000), 400),
    "400 huge": clients(of_json(error(400, message="x" * 300_000), "400 Bad Request"), 400),
    "400 in gzip": clients(line("400 Bad Request", gzip.compress(HTML), "content-encoding: gzip\r\n"), 400),
    "400 a list": clients(of_json([1], "400 Bad Request"), 400),
    "400 null": clients(of_json(None, "400 Bad Request"), 400),
    "400 as SGLang": clients(of_json({"object": "error", "message": "no", "code": 400}, "400 Bad"), 400),
    "400 in words": clients(of_json({"error": "it is too long"}, "400 Bad Request"), 400),
    "409 as OpenAI": clients(refused("conflict", "409 Conflict"), 409),
    "409 empty": denied(line("409 Conflict")),
    "410 empty": denied(line("410 Gone")),
    "411": denied(line("411 Length Required")),
    "413": clients(line("413 Content Too Large", HTML), 413),
    "414": denied(line("414 URI Too Long")),
    "415 empty": denied(line("415 Unsupported Media Type")),
    "415 as OpenAI": clients(refused("no such image", "415 Unsupported Media Type"), 415),
    "417": denied(line("417 Expectation Failed")),
    "418": denied(line("418 I'm a teapot")),
    "422 of FastAPI": clients(
        of_json({"detail": [{"loc": ["body"], "msg": "Field required"}]}, "422 Unprocessable Entity"), 422
    ),
    "431": denied(line("431 Request Header Fields Too Large")),
    "451 as OpenAI": clients(refused("no", "451 Unavailable"), 451),
    "499": denied(line("499 Odd")),
    # Busy, and ill.
    "429": failed(line("429 Too Many Requests", HTML, "retry-after: 7\r\n"), 429),
    "429 with a script": failed(line("429 Too Many Requests", fields="retry-after: <script>\r\n"), 429),
    "503": failed(refused("starting", "503 Service Unavailable"), 503),
    "500 html": failed(line("500 Internal Server Error", HTML, "content-type: text/html\r\n"), 500),
    "500 as vLLM": failed(refused("oops", "500 Internal Server Error"), 500),
    "502 of a proxy": failed(line("502 Bad Gateway", HTML), 502),
    "504 of a proxy": failed(line("504 Gateway Timeout", HTML), 504),
    "599": failed(line("599 Odd"), 599),
    # Encodings that nobody asked for.
    "200 in gzip": failed(page(gzip.compress(b'{"choices":[]}'), fields="content-encoding: gzip\r\n")),
    "200 in br": failed(page(b"\x0b\x02\x80", fields="content-encoding: br\r\n")),
    "200 in two": failed(page(b"x", fields="content-encoding: gzip, gzip\r\n")),
    "200 in transfer gzip": failed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    # Framing.
    "no HTTP": failed(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a TLS alert": failed(b"\x15\x03\x01\x00\x02\x02\x46"),
    "HTTP/2": failed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2.0 200": failed(b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n"),
    "ICE": failed(b"ICE/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}"),
    "RTSP": failed(b"RTSP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}"),
    "101": failed(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"),
    "an endless head": failed(b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 20_000),
    "an endless header": failed(b"HTTP/1.1 200 OK\r\nx-a: " + b"b" * 200_000),
    "many 100": failed(b"HTTP/1.1 100 Continue\r\n\r\n" * 5_000),
    "many 103": failed(b"HTTP/1.1 103 Early Hints\r\nlink: <x>\r\n\r\n" * 5_000),
    "two lengths": failed(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    "length and chunks": failed(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
    "a negative length": failed(b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"),
    "a length that is none": failed(b"HTTP/1.1 200 OK\r\ncontent-length: 0x2\r\n\r\n{}"),
    "a bad chunk": failed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
    # Closed early: a probe, due at once, finds it well.
    "nothing": failed(b""),
    "half a head": failed(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "half a body": failed(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"),
    "half of the chunks": failed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"),
    # 200 with garbage.
    "200 html": failed(page(HTML, fields="content-type: text/html\r\n")),
    "200 empty": failed(page(b"")),
    "200 deep": failed(page(b"[" * 20_000)),
}


async def settled(made: Site, worker: ScriptedWorker, state: WorkerState) -> None:
    """Wait for a probe that is due; a state that needs none is there already."""
    assert await made.wait_state(worker, state) is state


def assert_is_openai_error(answer: FakeExchange) -> None:
    """An error of a form that clients know, without a word of markup, and nothing of the worker's head."""
    said = json.loads(answer.sent)["error"]
    assert isinstance(said["message"], str)
    assert said["type"]
    assert b"<script>" not in answer.sent
    assert answer.answer_headers[b"content-type"] == b"application/json"
    assert (
        not {b"location", b"www-authenticate", b"content-encoding", b"set-cookie"}
        & answer.answer_headers.keys()
    )
    retry_after = answer.answer_headers.get(b"retry-after", b"1")
    assert retry_after.isdigit()


# Bodies that say nothing wrong of themselves are judged by content; what a stream is has a suite of its own.
@pytest.mark.parametrize("name", CASES)
def test_what_the_client_gets_if_there_is_no_other_worker(name: str) -> None:
    case = CASES[name]

    async def scenario() -> None:
        async with site("both") as (made, [worker]):
            worker.spoil(case.answer)
            answer = await made.ask(CHAT)
            assert answer.status == case.status
            assert_is_openai_error(answer)
            await settled(made, worker, case.state)
            assert made.known(worker).in_flight == 0

    run(scenario)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", CASES)
def test_whether_another_worker_is_asked(name: str, is_stream: bool) -> None:
    case = CASES[name]

    async def scenario() -> None:
        async with site("both", "both") as (made, [worker, other]):
            worker.spoil(case.answer)
            asked = 0
            while not worker.asked("/v1/chat/completions"):
                answer = await made.ask(CHAT | {"stream": is_stream})
                asked += 1
            assert answer.status == (200 if case.is_elsewhere else case.status)
            assert worker.asked("/v1/chat/completions") == 1
            assert other.asked("/v1/chat/completions") == (asked if case.is_elsewhere else asked - 1)
            await settled(made, worker, case.state)
            assert made.known(other).state is READY

    run(scenario)


@pytest.mark.parametrize("code", [401, 403, 407])
def test_a_stream_that_begins_with_an_error_about_the_worker_goes_elsewhere(code: int) -> None:
    async def scenario() -> None:
        async with site("both", "both") as (made, [worker, _]):
            worker.spoil(sse(error(code)))
            while not worker.asked("/v1/chat/completions"):
                assert (await made.ask(CHAT | {"stream": True})).status == 200

    run(scenario)


def test_a_stream_that_begins_with_an_error_about_the_request_is_the_clients() -> None:
    async def scenario() -> None:
        async with site("both") as (made, [worker]):
            worker.spoil(sse(error(404, message="The model `x` does not exist.")))
            answer = await made.ask(CHAT | {"stream": True})
            assert (answer.status, json.loads(answer.sent)["error"]["code"]) == (404, 404)

    run(scenario)


# --- every kind of leg --------------------------------------------------------------------------

DENIALS = {
    name: CASES[name] for name in ("401 as vLLM", "403 html", "204", "307 to itself", "404 html", "600")
}


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("name", DENIALS)
def test_a_denied_leg_of_two_goes_elsewhere(name: str, role: str, is_stream: bool) -> None:
    async def scenario() -> None:
        async with site("prefill", "prefill", "decode", "decode") as (made, workers):
            worker = next(worker for worker in workers if worker.role == role)
            worker.spoil(DENIALS[name].answer)
            while not worker.asked("/v1/chat/completions"):
                assert (await made.ask(CHAT | {"stream": is_stream})).status == 200
            await settled(made, worker, UNFIT)
            assert made.known(worker).reason

    run(scenario)


@pytest.mark.parametrize("name", DENIALS)
def test_a_denied_embedding_goes_elsewhere(name: str) -> None:
    async def scenario() -> None:
        async with site("both", "both") as (made, [worker, _]):
            worker.spoil(DENIALS[name].answer)
            while not worker.asked("/v1/embeddings"):
                assert (await made.ask({"input": "a"}, "/v1/embeddings")).status == 200
            await settled(made, worker, UNFIT)

    run(scenario)


@pytest.mark.parametrize("name", DENIALS)
def test_a_release_that_is_denied_goes_elsewhere(name: str) -> None:
    """Decode refuses the request, so its blocks are to be freed; the worker that is asked to denies that."""

    async def scenario() -> None:
        async with site("prefill", "decode", "decode") as (made, [_, *decode]):
            released: list[ScriptedWorker] = []

            def refuses(worker: ScriptedWorker) -> Callable[[bytes], bytes]:
                def answer(body: bytes) -> bytes:
                    if b"cache_salt" not in body:  # the client's, or a probe's
                        return refused("no") if not released else DENIALS[name].answer
                    released.append(worker)
                    return DENIALS[name].answer if len(released) == 1 else of_json({"choices": []})

                return answer

            for worker in decode:
                worker.script["/v1/chat/completions"] = refuses(worker)
            assert (await made.ask(CHAT)).status == 400
            await made.core.flow.aclose()
            first, second = released
            assert first is not second
            assert not made.core.flow.ledger.open
            assert made.known(first).is_denied

    run(scenario)


# --- what a client can cause --------------------------------------------------------------------


@pytest.mark.parametrize("phrase", [PATHLESS, error(404, message="Not Found")], ids=["FastAPI", "as OpenAI"])
def test_a_path_that_the_model_has_not_is_the_clients_mistake(phrase: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with site("both", "both") as (made, workers):
            for worker in workers:
                worker.script["/v1/embeddings"] = of_json(phrase, "404 Not Found")
            for _ in range(10):
                answer = await made.ask({"input": "a"}, "/v1/embeddings")
                assert answer.status == 404
                assert "do not serve /v1/embeddings" in json.loads(answer.sent)["error"]["message"]
            assert [known.state for known in made.registry.workers] == [READY, READY]
            assert [known.failures for known in made.registry.workers] == [0, 0]

    run(scenario)


def test_a_client_that_is_blocked_by_a_filter_takes_no_worker_out() -> None:
    """A proxy before all workers refuses what it finds in a prompt: a probe is served, so nobody is unfit."""

    async def scenario() -> None:
        async with site("both", "both") as (made, workers):
            for worker in workers:
                worker.script["/v1/chat/completions"] = refused("blocked", "403 Forbidden")
            for _ in range(20):
                assert (await made.ask(CHAT)).status == 502
            for worker in workers:
                await settled(made, worker, READY)
            assert [known.failures for known in made.registry.workers] == [0, 0]

    run(scenario)


def test_a_path_that_only_one_worker_denies_counts_against_it() -> None:
    """A probe sees nothing wrong, for other paths are served; but others serve what it denies."""

    async def scenario() -> None:
        health = {"consecutive_errors": 3}
        async with site("both", "both", health=health) as (made, [worker, other]):
            worker.script["/v1/chat/completions"] = line("404 Not Found", HTML)
            while made.known(worker).state is not WorkerState.EJECTED:
                assert (await made.ask(CHAT)).status == 200
            assert made.known(worker).failures == 3
            assert "404" in str(made.known(worker).last_error)
            assert made.known(other).state is READY

    run(scenario)
