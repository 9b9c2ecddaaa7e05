"""Speech: forms reach a worker in the client's own bytes, and nothing of a hand-off with them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.api.audio import PATHS
from orchestrator.wire.codec import CODECS
from tests.orchestrator.api.test_one_leg import EVENTS, Worker, run
from tests.orchestrator.fakes import SSE, FakeCluster
from tests.orchestrator.wire.test_forms import form

ANSWER = b'{"text":"hello"}'
TYPE = b"multipart/form-data; boundary=b0"
SOUND = ("file", b"RIFF\x00\xff\r\n--b\r\n" * 20_000, '; filename="a.wav"')
BOTH = pytest.mark.parametrize("path", PATHS)


def ask_with(cluster: FakeCluster, path: str, body: bytes, content_type: bytes = TYPE) -> Any:
    return cluster.ask(body, path=path, content_type=content_type)


@BOTH
@pytest.mark.parametrize("transport", ["json", "msgpack"])
def test_a_form_reaches_one_worker_as_it_is(path: str, transport: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        for at in cluster.registry.workers:
            at.abilities.codec = CODECS[transport]
        answer = await ask_with(cluster, path, body)
        assert (answer.status, answer.sent) == (200, ANSWER)
        (asked,) = worker.asked
        assert (asked.target, bytes(asked.body)) == (path, body)
        assert [value for name, value in asked.headers if name == b"content-type"] == [TYPE]
        assert b"x-msgpack" not in dict(asked.headers)

    body, worker = form(SOUND, ("model", b"m", ""), ("language", b"en", "")), Worker(answer=ANSWER)
    run(test, worker, transport=transport)


def test_the_worker_gets_its_own_name_of_the_model() -> None:
    async def test(cluster: FakeCluster) -> None:
        at = cluster.worker("decode/0")
        at.address = replace(at.address, served_model="own/name")
        assert (await ask_with(cluster, PATHS[0], form(("model", b"m", ""), SOUND))).status == 200
        assert bytes(worker.asked[0].body) == form(("model", b"own/name", ""), SOUND)

    worker = Worker(answer=ANSWER)
    run(test, worker)


def test_the_only_model_needs_no_name() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await ask_with(cluster, PATHS[0], form(SOUND))).status == 200
        assert bytes(worker.asked[0].body) == form(SOUND)

    worker = Worker(answer=ANSWER)
    run(test, worker)


def test_a_stream_is_relayed() -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await ask_with(cluster, PATHS[0], form(("model", b"m", ""), ("stream", b"True", ""), SOUND))
        assert (answer.status, answer.sent) == (200, EVENTS)

    run(test, Worker(answer=EVENTS, headers=SSE))


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (("kv_transfer_params", b"{}", ""), "kv_transfer_params"),
        (("ec_transfer_params", b"", ""), "ec_transfer_params"),
        (("vllm_xargs", b'{"kv_transfer_params":""}', ""), "vllm_xargs"),
        (("vllm_xargs", b'{"kv_transfer_param\\u0073":""}', ""), "vllm_xargs"),
        (("stream", b"perhaps", ""), "stream"),
        (("model", b"n", ""), None),
        (("model", b"\xff", ""), None),
    ],
)
def test_what_no_client_may_say_reaches_no_worker(field: Any, param: str | None) -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await ask_with(cluster, PATHS[0], form(("model", b"m", ""), SOUND, field))
        assert (answer.status, json.loads(answer.sent)["error"]["param"]) == (400, param)
        assert not worker.asked

    worker = Worker(answer=ANSWER)
    run(test, worker)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form(SOUND)[:-6], TYPE),
        (form(SOUND), b"multipart/form-data"),
        (b"", TYPE),
        (b'{"model":"m"}', b"application/json"),
        (b"file=a&model=m", b"application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_form_is_the_clients_mistake(body: bytes, content_type: bytes) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await ask_with(cluster, PATHS[0], body, content_type)).status == 400
        assert not worker.asked

    worker = Worker(answer=ANSWER)
    run(test, worker)


def test_a_model_that_hears_nothing_says_so() -> None:
    async def test(cluster: FakeCluster) -> None:
        answer = await ask_with(cluster, PATHS[0], form(("model", b"m", ""), SOUND))
        assert answer.status == 404
        assert {worker.state.value for worker in cluster.registry.workers} == {"ready"}

    run(test, Worker(404, b'{"detail":"Not Found"}'))
