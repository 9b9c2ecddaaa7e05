"""Responses: what streams, answers and legs look like, and which worker an id names.
tests/orchestrator/test_sdks.py drives them.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.endpoints import ENDPOINTS, entry_of
from orchestrator.api.holders import mark_in, mark_of, response_id
from orchestrator.api.responses import CANCEL, RETRIEVE, ResponsesEndpoint, StoredResponses
from orchestrator.errors import UnknownResponse, WorkerCutShort
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Handoff
from orchestrator.legs.connectors.nixl import handoff_from
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.codec import JSON
from orchestrator.wire.judge import InvalidStream, WorkerFailed
from orchestrator.wire.usage import InvalidAnswer, Kv, tokens_in
from tests.orchestrator.api.named_streams import event, pieces, relayed
from tests.orchestrator.fakes import JSON as JSON_HEAD
from tests.orchestrator.fakes import FakeCluster, FakeExchange, params_of, read

PATH = "/v1/responses"
ENDPOINT = ResponsesEndpoint()
ASK: dict[str, Any] = {"model": "m", "input": "hi", "max_output_tokens": 9}
HANDOFF = Handoff(b'{"remote_host":"h"}', 16)


def usage(prompt: int, cached: int, written: int = 0) -> dict[str, Any]:
    details = {"cached_tokens": cached, "cache_write_tokens": written, "cached_tokens_per_turn": []}
    return {"input_tokens": prompt, "input_tokens_details": details, "output_tokens": 3}


def made(status: str = "completed", **fields: Any) -> dict[str, Any]:
    response = {"id": "resp_1", "object": "response", "status": status, "output": [], "model": "m"}
    return response | {"usage": usage(21, 21), "kv_transfer_params": None} | fields


CREATED = event("response.created", sequence_number=0, response=made("in_progress", usage=None))
IN_PROGRESS = event("response.in_progress", sequence_number=1, response=made("in_progress", usage=None))
ADDED = event("response.output_item.added", sequence_number=2, item={}) + event(
    "response.content_part.added", sequence_number=3, part={}
)
TEXT = event("response.output_text.delta", sequence_number=4, delta='é\n\n"sequence_number":99')
COMPLETED = event("response.completed", sequence_number=5, response=made())
OPENING = CREATED + IN_PROGRESS + ADDED
STREAM = OPENING + TEXT * 3 + COMPLETED


def view(**fields: Any) -> Any:
    return ENDPOINT.read(json.dumps(ASK | fields).encode(), FakeExchange(b""))


def reader(cached: int | None = None, created: int | None = None) -> Any:
    return ENDPOINT.events(view(), hides_usage=False, cached_tokens=cached, created_tokens=created)


# --- streams ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4000), max_size=6))
def test_a_stream_is_sent_as_it_is(places: list[int]) -> None:
    events = reader()
    assert relayed(events, pieces(STREAM, places)) == STREAM
    assert (events.has_begun, events.is_done, events.kv) == (True, True, Kv.TRANSFERRED)


@given(st.lists(st.integers(0, 4000), max_size=6))
def test_its_usage_is_the_prefill_workers(places: list[int]) -> None:
    sent = relayed(reader(cached=8, created=12), pieces(STREAM, places))
    assert sent.startswith(OPENING + TEXT * 3)
    last = json.loads(sent.split(b"\n\n")[-2].partition(b"data: ")[2])
    assert last["response"] == made(usage=usage(21, 8, 12))


def test_nothing_is_said_before_the_first_text() -> None:
    events = reader()
    assert events.feed(OPENING) == b""
    assert not events.has_begun
    assert events.feed(TEXT) == OPENING + TEXT


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        event("response.output_text.done", sequence_number=5),
        event("response.completed", sequence_number=5, response=made("cancelled")),
        event("response.completed", sequence_number=5, response=made("failed")),
        event("response.failed", sequence_number=5, response=made("failed", error={"message": "m"})),
        event("error", sequence_number=5, message="m"),
        b"event: response.completed\ndata: nonsense\n\n",
        b'data: {"error":{"message":"m"}}\n\n',
        COMPLETED[:-1],
    ],
)
def test_a_stream_that_ends_early_is_never_whole(rest: bytes) -> None:
    with pytest.raises(InvalidStream):
        relayed(reader(), [OPENING + TEXT, rest])


def test_a_stream_that_breaks_ends_as_a_failed_response() -> None:
    events = reader()
    events.feed(OPENING + TEXT)
    name, data = events.failure("cut").strip().split(b"\n")
    document = json.loads(data.removeprefix(b"data: "))
    assert name == b"event: response.failed"
    assert (document["type"], document["sequence_number"]) == ("response.failed", 5)
    assert document["response"]["id"] == "resp_1"
    assert document["response"]["status"] == "failed"
    assert document["response"]["error"] == {"code": "server_error", "message": "cut"}


def test_one_that_breaks_before_it_began_says_so_too() -> None:
    sent = ENDPOINT.error_event(WorkerCutShort("cut"))
    assert sent.startswith(b"event: response.failed\n")
    assert b'"sequence_number":0' in sent
    response = json.loads(sent.partition(b"data: ")[2])["response"]
    assert re.fullmatch(r"resp_[0-9a-f]{44}", response["id"])
    assert response["created_at"] > 1_700_000_000
    assert response["id"] not in ENDPOINT.error_event(WorkerCutShort("cut")).decode()


# --- whole answers ------------------------------------------------------------------------------


def whole(document: Any, cached: int | None = None, created: int | None = None) -> tuple[Kv, bytes]:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return ENDPOINT.whole(view(), content, cached_tokens=cached, created_tokens=created)[:2]


@pytest.mark.parametrize(
    ("counts", "kv"),
    [
        (usage(21, 21), Kv.TRANSFERRED),
        (usage(21, 0), Kv.RECOMPUTED),
        ({"input_tokens": 21}, Kv.UNKNOWN),
        (None, Kv.UNKNOWN),
    ],
)
def test_the_usage_is_the_evidence(counts: Any, kv: Kv) -> None:
    body = json.dumps(made(usage=counts)).encode()
    assert whole(body) == (kv, body)


def test_a_whole_response_tells_how_many_tokens_there_were() -> None:
    body = json.dumps(made(usage=usage(21, 8))).encode()
    *_, told = ENDPOINT.whole(view(), body, cached_tokens=8, created_tokens=None)
    assert tokens_in(told or 0) == (21, 3)


def test_a_whole_response_has_the_prefill_workers_numbers() -> None:
    _, content = whole(made(kv_transfer_params={"remote_host": "10.0.0.1"}), 8, 12)
    assert json.loads(content) == made(usage=usage(21, 8, 12))


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (b"nonsense", InvalidAnswer),
        ({"id": "1"}, InvalidAnswer),
        (made("cancelled"), InvalidStream),
        (made("failed", error={"message": "m"}), WorkerFailed),
        ({"error": {"message": "m"}}, WorkerFailed),
        ({"object": "error", "message": "m"}, WorkerFailed),
    ],
)
def test_what_is_no_whole_response(document: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        whole(document)


def test_a_stored_response_may_be_cancelled() -> None:
    body = json.dumps(made("cancelled", usage=None)).encode()
    stored = StoredResponses("GET")
    assert stored.whole(view(), body, cached_tokens=None, created_tokens=None) == (Kv.UNKNOWN, body, None)


# --- legs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"background": False, "truncation": "disabled", "previous_response_id": None}, None),
        ({"tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}]}, None),
        ({"background": True}, "background"),
        ({"background": "true"}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "function"}, {"type": "mcp"}]}, "tools that the worker calls"),
        ({"tools": [{"type": "web_search_preview"}]}, "tools that the worker calls"),
        ({"max_output_tokens": 0}, "no token asked for"),
        ({"max_output_tokens": -5}, "no token asked for"),
        ({"max_output_tokens": None}, None),
    ],
)
def test_what_one_worker_has_to_make(fields: dict[str, Any], reason: str | None) -> None:
    assert view(**fields).whole_reason == reason


def bodies(**fields: Any) -> LegBodies:
    made = LegBodies(view(**fields), PATH, form=ENDPOINT.form)
    made.call("resp_ours")
    return made


def test_a_prefill_leg_wants_one_token_and_is_not_stored() -> None:
    asked = {"stream": True, "store": True, "stop": ["x"], "request_id": "theirs", "top_p": 0.5}
    leg = json.loads(b"".join(bodies(**asked).prefill(JSON, "m")))
    assert leg.pop("kv_transfer_params")["do_remote_decode"]
    one = {"max_output_tokens": 1, "stream": False, "store": False, "ignore_eos": True}
    assert leg == {"model": "m", "input": "hi", "top_p": 0.5, "request_id": "resp_ours"} | one


def test_a_decode_leg_is_the_clients_document_with_our_name() -> None:
    made = bodies(request_id="theirs", stream=True, kv_transfer_params={"remote_host": "evil"})
    leg = json.loads(b"".join(made.decode(JSON, "m", HANDOFF)))
    assert leg == ASK | {
        "stream": True,
        "request_id": "resp_ours",
        "kv_transfer_params": {"remote_host": "h"},
    }
    assert json.loads(b"".join(made.whole(JSON, "m"))) == ASK | {"stream": True, "request_id": "resp_ours"}
    release = json.loads(b"".join(made.release(JSON, "m", HANDOFF, "salt")))
    assert (release["request_id"], release["cache_salt"], release["store"]) == ("resp_ours", "salt", False)


def test_a_prefill_answer_tells_what_was_added_to_the_cache() -> None:
    answer = made(usage=usage(21, 0, 16), kv_transfer_params=params_of("r"))
    assert handoff_from(json.dumps(answer).encode()).created_tokens() == 16


# --- who holds a response -----------------------------------------------------------------------


def test_an_id_names_its_worker() -> None:
    one, other = response_id("m/decode/0"), response_id("m/decode/0")
    assert one != other
    assert mark_in(one) == mark_in(other) == mark_of("m/decode/0") != mark_of("m/decode/1")
    assert "decode" not in one


@pytest.mark.parametrize("name", ["", "resp_", "resp_" + "g" * 44, "resp_" + "0" * 43, "RESP_" + "0" * 44])
def test_an_id_that_is_none_of_ours(name: str) -> None:
    assert mark_in(name) is None
    with pytest.raises(UnknownResponse):
        ENDPOINT.holder(view(previous_response_id=name), FakeExchange(b""))


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        *((path, path) for path in ENDPOINTS if "{" not in path),
        ("/v1/responses/resp_1", RETRIEVE),
        ("/v1/responses/resp_1/cancel", CANCEL),
        ("/v1/responses/", "/v1/responses"),
        ("/v1/responses/resp_1/", RETRIEVE),
        ("/v1/responses//", None),
        ("/v1/responses/../x", None),
        ("/v1/responses/a b", None),
        ("/v1/responses/resp_1/input_items", None),
        ("/v1/models", None),
    ],
)
def test_which_entry_a_path_has(path: str, entry: str | None) -> None:
    assert entry_of(path) == entry


heard: list[tuple[str, str]] = []


async def holds(request: MemoryRequest, reply: MemoryReply) -> None:
    """A decode worker that has every response."""
    heard.append((request.method, request.target))
    reply.answer(200, json.dumps(made()).encode(), JSON_HEAD)


def served(path: str, method: str, *, state: str = "ready", body: Any = None) -> FakeExchange:
    """What a client gets of a pair of decode workers."""

    async def main() -> FakeExchange:
        heard.clear()
        cluster = FakeCluster(roles=("prefill", "decode", "decode"))
        for name in ("decode/0", "decode/1"):
            cluster.upstream.serve(cluster.origin(name), holds)
        if state == "gone":
            cluster.registry.judge.mark_gone(cluster.worker("decode/1"), "refused")
        exchange = FakeExchange(b"" if body is None else json.dumps(body).encode(), path=path, method=method)
        await cluster.serve(exchange)
        await cluster.aclose()
        cluster.assert_at_rest()
        hosts = {request.origin for request in cluster.upstream.requests}
        assert hosts <= {cluster.origin("decode/1")}
        return exchange

    return asyncio.run(main())


KNOWN = f"resp_{'0' * 32}{mark_of('m/decode/1')}"
OF_NOBODY = f"resp_{'0' * 32}{mark_of('m/decode/7')}"


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("POST", "/cancel")])
def test_the_worker_that_holds_a_response_is_asked_for_it(method: str, suffix: str) -> None:
    path = f"{PATH}/{KNOWN}{suffix}"
    answer = served(path, method)
    assert (answer.status, json.loads(answer.sent)) == (200, made())
    assert heard == [(method, path)]
    assert served(f"{path}/", method).status == 200
    assert heard == [(method, path)]


def test_what_builds_on_a_response_goes_to_its_worker() -> None:
    answer = served(PATH, "POST", body=ASK | {"previous_response_id": KNOWN})
    assert answer.status == 200
    assert answer.answer_headers[b"x-baton-path"] == b"aggregated"


@pytest.mark.parametrize(
    ("name", "state", "status"),
    [
        (KNOWN, "gone", 503),
        (OF_NOBODY, "ready", 404),
        ("resp_theirs", "ready", 404),
    ],
)
def test_when_its_worker_cannot_be_asked(name: str, state: str, status: int) -> None:
    for answer in (
        served(f"{PATH}/{name}", "GET", state=state),
        served(f"{PATH}/{name}/cancel", "POST", state=state),
        served(PATH, "POST", state=state, body=ASK | {"previous_response_id": name}),
    ):
        assert answer.status == status
        assert json.loads(answer.sent)["error"]["message"]
        assert heard == []


@pytest.mark.parametrize(("method", "suffix"), [("POST", ""), ("GET", "/cancel"), ("DELETE", "")])
def test_other_methods(method: str, suffix: str) -> None:
    assert served(f"{PATH}/{KNOWN}{suffix}", method).status == 405


def test_each_leg_of_a_response_has_a_name_of_its_own() -> None:
    """It is in the body, where vLLM looks for it, and in the head, by which a leg is ended."""

    async def main() -> None:
        cluster = FakeCluster()
        cluster.upstream.serve(cluster.origin("decode/0"), consumes(cluster))
        answer = await cluster.ask(ASK, path=PATH)
        assert answer.status == 200
        await cluster.aclose()
        names = [read(request)["request_id"] for request in cluster.upstream.requests]
        assert names == [
            dict(request.headers)[b"x-request-id"].decode() for request in cluster.upstream.requests
        ]
        assert [mark_in(name) for name in names] == [mark_of("m/prefill/0"), mark_of("m/decode/0")]

    def consumes(cluster: FakeCluster) -> Any:
        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.workers.pinned.clear()
            reply.answer(200, json.dumps(made()).encode(), JSON_HEAD)

        return decode

    asyncio.run(main())
