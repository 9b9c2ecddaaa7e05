"""A client cannot tell by which encoding its request goes to workers, whatever its document says."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import Encoding, WorkerInfo
from orchestrator.workers.introduction import Introduction
from tests.orchestrator.fakes import JSON, FakeCluster, params_of
from worker import msgpack_body, token_ids
from worker.info import decodes
from worker.info import token_ids as forms_of

TRANSPORTS: tuple[Encoding, ...] = ("json", "orjson", "msgpack")
LIMITS = token_ids.Limits(vocab_size=1000, max_tokens=1000)
IDS = [5, 7, 900]


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


_ODD = st.sampled_from(
    ["1" * 30, "-" + "1" * 30, "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "18446744073709551615"]
    + [
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        "1" * 4301,
        "1.0",
        "1e5",
        "-0.0",
    ]
    + [
        "0.1e-400",
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\u0000"',
        '"é"',
        "{}",
        "[]",
        "null",
        "true",
        '{"a":1,"a":2}',
    ]
    + [_nested(levels) for levels in (125, 126, 127, 128, 129, 130, 200, 978, 5000)]
)
_VALUES = _ODD | st.builds("[{0},{1}]".format, _ODD, _ODD) | st.builds('{{"k":{0}}}'.format, _ODD)
_NAMES = [
    "stop",
    "min_tokens",
    "max_tokens",
    "seed",
    "vllm_xargs",
    "tools",
    "x",
    "n",
    "stream_options",
    "prompt_logprobs",
]
_FIELDS = st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=3)
_CHAT = ("/v1/chat/completions", {"messages": '[{"role":"user","content":"hi"}]'})
_COMPLETION = ("/v1/completions", {"prompt": '"hi"'})


class Worker:
    """It decodes as our plugin does with this transport, and takes every document that it can decode."""

    def __init__(self, transport: Encoding) -> None:
        self.transport = transport
        self.seen: list[Any] = []

    async def prefill(self, request: MemoryRequest, reply: MemoryReply) -> None:
        document = self._document(request, reply)
        if document is None:
            return
        answer: dict[str, Any] = {"choices": [], "kv_transfer_params": params_of("r")}
        form = dict(request.headers).get(b"x-token-ids", b"").decode()
        if form:
            packed = token_ids.pack(IDS)
            body, kind = token_ids.encode_answer(answer, "bin" if form == "bin" else "base64", packed)
            reply.answer(200, body, {b"content-type": kind.encode()})
        else:
            listed = {"prompt_token_ids": IDS} if document.get("return_token_ids") else {}
            reply.answer(200, json.dumps(answer | listed).encode(), JSON)

    async def decode(self, request: MemoryRequest, reply: MemoryReply) -> None:
        if self._document(request, reply) is not None:
            reply.answer(200, b'{"choices":[{"index":0,"text":"","finish_reason":"stop"}]}', JSON)

    def _document(self, request: MemoryRequest, reply: MemoryReply) -> dict[str, Any] | None:
        try:
            document = self._decoded(request)
        except ValueError as error:  # as vLLM answers what `json` cannot read
            reply.answer(
                400, json.dumps({"error": {"message": f"msgpack body refused: {error}"}}).encode(), JSON
            )
            return None
        token_ids.unpack_in(document, LIMITS, is_completion=request.target == "/v1/completions")
        self.seen.append(document)
        return document

    def _decoded(self, request: MemoryRequest) -> dict[str, Any]:
        if dict(request.headers).get(b"x-msgpack") == b"1":
            return msgpack_body.decode(request.body, takes_ids=True)
        if self.transport != "orjson":
            return json.loads(request.body)
        try:
            return orjson.loads(request.body)
        except orjson.JSONDecodeError:
            return json.loads(request.body)


async def _ask(transport: Encoding, path: str, body: bytes) -> tuple[int, list[str], list[str]]:
    """Return the status, what the workers saw, and in which encodings they take requests afterwards."""
    cluster = FakeCluster(transport=transport)
    worker = Worker(transport)
    for member in cluster.registry.workers:
        info = WorkerInfo(
            role="both",
            model="m",
            decodes=decodes(transport),
            engine="vllm",
            engine_version="0",
            token_ids=forms_of(transport),
        )
        cluster.registry.announce(member, Introduction(info, None))
        is_prefill = member.address.role == "prefill"
        cluster.upstream.serve(member.origin, worker.prefill if is_prefill else worker.decode)
    answer = await cluster.ask(body, path=path)
    taken = [member.abilities.codec.name for member in cluster.registry.workers]
    await cluster.aclose()
    return answer.status, [_said(document) for document in worker.seen], taken


def _said(document: dict[str, Any]) -> str:
    """Return a document as text. orjson has no integers of more than 64 bits: `worker/msgpack_route.py`."""
    document.pop("return_token_ids", None)  # asked where ids are packed, or the worker lists them
    return json.dumps(_without_large(document), sort_keys=True)


def _without_large(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_large(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_large(inner) for inner in value]
    is_large = type(value) is int and not -(2**63) <= value < 2**64
    return float(value) if is_large else value


@given(endpoint=st.sampled_from([_CHAT, _COMPLETION]), fields=_FIELDS, other=_VALUES)
@example(endpoint=_COMPLETION, fields={"stop": "1" * 30}, other="1")
@example(endpoint=_CHAT, fields={"min_tokens": "1e400"}, other="1")
@example(endpoint=_CHAT, fields={"tools": _nested(127)}, other=_nested(127))
@example(endpoint=_CHAT, fields={"tools": _nested(128)}, other="1")
@example(endpoint=_CHAT, fields={"stop": _nested(980)}, other="1")
@example(
    endpoint=_CHAT, fields={"messages": f'[{{"content":[{{"type":"text","x":{_nested(977)}}}]}}]'}, other="1"
)
def test_all_encodings_are_one_to_the_client(
    endpoint: tuple[str, dict[str, str]], fields: dict[str, str], other: str
) -> None:
    path, common = endpoint
    written = {"model": '"m"', **common, "metadata": other, **fields}
    body = "{" + ",".join(f'"{name}":{value}' for name, value in written.items()) + "}"

    async def test() -> None:
        answers = {transport: await _ask(transport, path, body.encode()) for transport in TRANSPORTS}
        statuses = {transport: status for transport, (status, _, _) in answers.items()}
        assert len(set(statuses.values())) == 1, statuses
        assert statuses["json"] in (200, 400)
        seen = {transport: documents for transport, (_, documents, _) in answers.items()}
        assert seen["json"] == seen["orjson"] == seen["msgpack"]
        assert answers["msgpack"][2] == ["msgpack", "msgpack"]  # they are trusted as before

    asyncio.run(test())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("levels", [129, 963, 980, 100_000])
def test_a_document_that_is_too_deep_reaches_no_worker(transport: Encoding, levels: int) -> None:
    async def test() -> None:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            cluster = FakeCluster(transport=transport)
            answer = await cluster.ask(f'{{"model":"m","x":{_nested(levels - 1)}}}'.encode(), path=path)
            assert answer.status == 400
            message = json.loads(answer.sent)["error"]["message"]
            assert message == "the request body is nested more than 128 levels deep"
            assert cluster.upstream.requests == []
            await cluster.aclose()

    asyncio.run(test())
