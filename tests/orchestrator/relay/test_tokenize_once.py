"""The prompt's token ids go from the prefill worker to the decode worker; the prompt's text stays behind."""

from __future__ import annotations

import array
import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from orchestrator.telemetry.counters import FallbackReason
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import TokenIdsForm, WorkerInfo
from orchestrator.workers.introduction import Introduction
from tests.orchestrator.fakes import JSON, FakeCluster, params_of, read

IDS = [5, 70_000, 2**31 - 1]
PACKED = array.array("i", IDS).tobytes()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "What is prefill?"}], "temperature": 0}
COMPLETION = {"model": "m", "prompt": "What is prefill?", "temperature": 0}
FORMS: dict[str, list[TokenIdsForm]] = {
    "json": ["list"],
    "orjson": ["list", "base64"],
    "msgpack": ["list", "base64", "bin"],
}

Test = Callable[[FakeCluster], Awaitable[None]]


def run(test: Test, transport: str = "json", **options: Any) -> FakeCluster:
    async def main() -> FakeCluster:
        cluster = FakeCluster(transport=transport, **options)
        cluster.upstream.serve(cluster.origin("prefill/0"), prefill)
        for worker in cluster.registry.workers:
            cluster.registry.announce(worker, Introduction(announced(transport), None))
        await asyncio.wait_for(test(cluster), 60)
        await cluster.aclose()
        return cluster

    return asyncio.run(main())


def announced(transport: str, forms: list[TokenIdsForm] | None = None) -> WorkerInfo:
    return WorkerInfo(
        role="both",
        model="m",
        decodes=["json", transport] if transport != "json" else ["json"],
        engine="sim",
        engine_version="0",
        token_ids=FORMS[transport] if forms is None else forms,
    )


async def prefill(request: MemoryRequest, reply: MemoryReply) -> None:
    """Gives the ids as vLLM does, or packed as our plugin does."""
    document = read(request)
    answer: dict[str, Any] = {"choices": [{}], "kv_transfer_params": params_of("r0")}
    form = dict(request.headers).get(b"x-token-ids", b"list")
    if not document.get("return_token_ids"):
        reply.answer(200, json.dumps(answer).encode(), JSON)
    elif form == b"bin":
        packed = msgspec.msgpack.encode(answer | {"prompt_token_ids": PACKED})
        reply.answer(200, packed, {b"content-type": b"application/msgpack"})
    elif form == b"base64":
        encoded = base64.b64encode(PACKED).decode()
        reply.answer(200, json.dumps(answer | {"prompt_token_ids": encoded}).encode(), JSON)
    else:
        place = answer["choices"][0] if "prompt" in document else answer
        place["prompt_token_ids"] = IDS
        reply.answer(200, json.dumps(answer).encode(), JSON)


def kv_params(document: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = document["kv_transfer_params"]
    assert params["remote_request_id"] == "r0"
    return params


IN_EACH_FORM: dict[str, Any] = {"json": IDS, "orjson": base64.b64encode(PACKED).decode(), "msgpack": PACKED}


@pytest.mark.parametrize("transport", list(FORMS))
def test_a_chat_goes_on_with_its_ids_alone(transport: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT)).status == 200
        document = read(cluster.legs("decode")[0])
        assert kv_params(document)["prompt_token_ids"] == IN_EACH_FORM[transport]
        assert document["messages"] == [{"role": "user", "content": "-"}]
        assert document["temperature"] == 0
        assert "return_token_ids" not in document

    run(test, transport)


@pytest.mark.parametrize("transport", list(FORMS))
def test_a_completion_goes_on_with_its_ids_alone(transport: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(COMPLETION, path="/v1/completions")).status == 200
        document = read(cluster.legs("decode")[0])
        if transport == "json":  # as vLLM itself takes them
            assert document["prompt"] == IDS
            assert "prompt_token_ids" not in kv_params(document)
        else:
            assert "prompt" not in document
            assert kv_params(document)["prompt_token_ids"] == IN_EACH_FORM[transport]

    run(test, transport)


MEDIA = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TEXT = {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(
    ("content", "is_cut"),
    [
        ("text", True),
        (None, True),
        ([TEXT], True),
        ([], True),
        ([TEXT, MEDIA], False),
        ([{"image_url": {"url": "x"}}], False),
        (['"type":"text"'], False),
        ({"type": "text"}, False),
    ],
)
def test_messages_with_more_than_text_are_kept(content: Any, is_cut: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        document = CHAT | {"messages": [{"role": "user", "content": content}]}
        assert (await cluster.ask(document)).status == 200
        sent = read(cluster.legs("decode")[0])
        assert (sent["messages"] != document["messages"]) is is_cut
        assert kv_params(sent)["prompt_token_ids"] == IDS

    run(test)


@pytest.mark.parametrize(
    ("prefill_forms", "decode_forms", "sent"),
    [
        (["list", "base64", "bin"], ["list", "base64"], "orjson"),
        (["list", "base64"], ["list", "base64", "bin"], "orjson"),
        (["list"], ["list", "base64", "bin"], "json"),
        (["list", "base64", "bin"], [], None),
        ([], ["list"], None),
        (["base64"], ["list"], None),
    ],
)
def test_the_best_form_that_both_workers_announce_is_used(
    prefill_forms: list[TokenIdsForm], decode_forms: list[TokenIdsForm], sent: str | None
) -> None:
    async def test(cluster: FakeCluster) -> None:
        for name, forms in (("prefill/0", prefill_forms), ("decode/0", decode_forms)):
            cluster.registry.announce(cluster.worker(name), Introduction(announced("msgpack", forms), None))
        assert (await cluster.ask(CHAT)).status == 200
        document = read(cluster.legs("decode")[0])
        assert ("return_token_ids" in read(cluster.legs("prefill")[0])) is (sent is not None)
        expected = None if sent is None else IN_EACH_FORM[sent]
        assert kv_params(document).get("prompt_token_ids") == expected

    run(test, "msgpack")


@pytest.mark.parametrize(
    "field",
    [
        {"add_generation_prompt": False},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "call_0"}]}]},
    ],
)
def test_messages_that_say_more_than_the_prompt_are_kept(field: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        document = CHAT | field
        assert (await cluster.ask(document)).status == 200
        sent = read(cluster.legs("decode")[0])
        assert sent["messages"] == document["messages"]
        assert kv_params(sent)["prompt_token_ids"] == IDS

    run(test)


@pytest.mark.parametrize("field", ["suffix", "return_prompt_text", "return_token_offsets"])
def test_where_vllm_needs_the_text_there_are_no_ids(field: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(COMPLETION | {field: True}, path="/v1/completions")).status == 200
        assert "return_token_ids" not in read(cluster.legs("prefill")[0])
        assert read(cluster.legs("decode")[0])["prompt"] == COMPLETION["prompt"]

    run(test)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2]]])
def test_a_prompt_of_ids_needs_no_others(prompt: list[Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        document = {"model": "m", "prompt": prompt}
        assert (await cluster.ask(document, path="/v1/completions")).status == 200
        assert "return_token_ids" not in read(cluster.legs("prefill")[0])
        assert isinstance(read(cluster.legs("decode")[0])["prompt"], list)

    run(test)


def test_it_can_be_turned_off() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT)).status == 200
        assert "return_token_ids" not in read(cluster.legs("prefill")[0])
        assert read(cluster.legs("decode")[0])["messages"] == CHAT["messages"]

    run(test, tokenizes_once=False)


def test_the_clients_own_wish_for_ids_reaches_the_worker_that_answers() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT | {"return_token_ids": False})).status == 200
        assert read(cluster.legs("prefill")[0])["return_token_ids"] is True
        assert read(cluster.legs("decode")[0])["return_token_ids"] is False

    run(test)


def test_a_prefill_worker_that_gives_no_ids_is_no_failure() -> None:
    async def silent(request: MemoryRequest, reply: MemoryReply) -> None:
        answer = {"choices": [{}], "kv_transfer_params": params_of("r0"), "prompt_token_ids": None}
        reply.answer(200, json.dumps(answer).encode(), JSON)

    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("prefill/0"), silent)
        assert (await cluster.ask(CHAT)).status == 200
        assert read(cluster.legs("decode")[0])["messages"] == CHAT["messages"]

    run(test)


@pytest.mark.processes
def test_ids_of_a_large_request_go_as_base64_where_json_must() -> None:
    """A body that is too large for a transcode: the decode leg is small, but for what must stay in it."""

    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT | {"user": "x" * 1_100_000})).status == 200
        leg = cluster.legs("decode")[0]
        assert b"x-msgpack" not in dict(leg.headers)
        assert kv_params(read(leg))["prompt_token_ids"] == base64.b64encode(PACKED).decode()

    run(test, "msgpack")


# --- a worker that announces and then refuses ---------------------------------------------------


def refusing(status: int, then: Any) -> Any:
    """Takes plain JSON only, whatever was announced."""

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        headers, is_plain = dict(request.headers), b"x-msgpack" not in dict(request.headers)
        document = read(request)
        has_ids = "prompt_token_ids" in (document.get("kv_transfer_params") or {})
        if is_plain and b"x-token-ids" not in headers and not has_ids:
            await then(request, reply)
        else:
            reply.answer(status, b'{"error":{"message":"what is this?"}}', JSON)

    return worker


def packed(cluster: FakeCluster, role: str) -> list[bool]:
    """Which of the legs were msgpack."""
    return [b"x-msgpack" in dict(leg.headers) for leg in cluster.legs(role)]


@pytest.mark.parametrize("transport", ["orjson", "msgpack"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_it_gets_plain_json_from_then_on(transport: str, role: str, is_stream: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        then = prefill if role == "prefill" else cluster.workers.decode
        cluster.upstream.serve(cluster.origin(f"{role}/0"), refusing(400, then))
        for _ in range(2):
            assert (await cluster.ask(CHAT | {"stream": is_stream})).status == 200
        assert len(cluster.legs(role)) == 3
        assert read(cluster.legs(role)[-1])["messages"] == CHAT["messages"]

    cluster = run(test, transport)
    row, layout = cluster.telemetry.row, cluster.telemetry.layout
    assert row[layout.fallbacks + FallbackReason.REFUSED] == 1


def test_a_restarted_worker_is_believed_again() -> None:
    async def test(cluster: FakeCluster) -> None:
        worker = cluster.worker("decode/0")
        worker.distrust()
        assert worker.abilities.token_ids == ()
        cluster.registry.judge.mark_gone(worker, "test")
        cluster.registry.judge.mark_ready(worker)
        cluster.registry.announce(worker, Introduction(announced("msgpack"), None))
        assert worker.abilities.token_ids == ("bin", "base64", "list")

    run(test, "msgpack")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_error_of_a_worker_that_has_kept_its_word_is_the_clients(role: str) -> None:
    async def broken(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(400, b'{"error":{"message":"no such parameter"}}', JSON)

    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT)).status == 200
        cluster.upstream.serve(cluster.origin(f"{role}/0"), broken)
        assert (await cluster.ask(CHAT)).status == 400
        assert all(packed(cluster, role))

    run(test, "msgpack")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_error_that_plain_json_does_not_mend_is_no_refusal(role: str) -> None:
    async def broken(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(422, b'{"error":{"message":"no such parameter"}}', JSON)

    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin(f"{role}/0"), broken)
        assert (await cluster.ask(CHAT)).status == 422
        assert packed(cluster, role)[:2] == [True, False]
        assert cluster.worker(f"{role}/0").abilities.token_ids == ("bin", "base64", "list")

    run(test, "msgpack")
