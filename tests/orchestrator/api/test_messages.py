"""Messages: what streams, answers, errors and legs look like. tests/orchestrator/test_sdks.py drives them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.messages import MessagesEndpoint
from orchestrator.errors import TooBusy, Unauthorized, WorkerAnswered, WorkerCutShort
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Handoff
from orchestrator.legs.connectors.nixl import handoff_from
from orchestrator.wire.codec import CODECS, JSON
from orchestrator.wire.judge import InvalidStream, WorkerFailed
from orchestrator.wire.sse import Events
from orchestrator.wire.usage import InvalidAnswer, Kv, tokens_in
from tests.orchestrator.api.named_streams import event, pieces, relayed
from tests.orchestrator.fakes import FakeExchange, params_of

ENDPOINT = MessagesEndpoint()
ASK: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
HANDOFF = Handoff(b'{"remote_host":"h"}', 16)
TOOLS = [{"name": "f", "input_schema": {}}]


def usage(fresh: int, read: int | None = None, created: int | None = None) -> dict[str, Any]:
    counts = {"cache_creation_input_tokens": created, "cache_read_input_tokens": read}
    known = {name: value for name, value in counts.items() if value is not None}
    return {"input_tokens": fresh, "output_tokens": 3, **known}


START = event("message_start", message={"id": "1", "usage": usage(21)})
BLOCK = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
TEXT = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "é\n\nevent: error\n"})
OPENING = START + BLOCK
STOP = event("content_block_stop", index=0)
END = event("message_stop")


def delta(counts: dict[str, Any], reason: str | None = "end_turn") -> bytes:
    return event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=counts)


STREAM = OPENING + TEXT * 3 + STOP + delta(usage(0, 21, 0)) + END


def reader(cached: int | None = None, created: int | None = None) -> Events:
    view = ENDPOINT.read(json.dumps(ASK).encode(), FakeExchange(b""))
    return ENDPOINT.events(view, hides_usage=False, cached_tokens=cached, created_tokens=created)


# --- streams ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4000), max_size=6))
def test_a_stream_is_sent_as_it_is(places: list[int]) -> None:
    events = reader()
    assert relayed(events, pieces(STREAM, places)) == STREAM
    assert events.has_begun
    assert events.is_done
    assert events.kv is Kv.TRANSFERRED


@given(st.lists(st.integers(0, 4000), max_size=6))
def test_its_usage_is_the_prefill_workers(places: list[int]) -> None:
    events = reader(cached=8, created=12)
    sent = relayed(events, pieces(STREAM, places))
    mended = usage(1, 8, 12)
    assert sent.startswith(OPENING + TEXT * 3 + STOP)
    assert json.loads(sent.split(b"\n\n")[-3].partition(b"data: ")[2])["usage"] == mended


@pytest.mark.parametrize(
    ("counts", "kv"),
    [
        (usage(0, 21, 0), Kv.TRANSFERRED),
        (usage(5, 0, 16), Kv.RECOMPUTED),
        (usage(1, 20, 0), Kv.RECOMPUTED),
        (usage(21), Kv.UNKNOWN),
    ],
)
def test_the_usage_is_the_evidence(counts: dict[str, Any], kv: Kv) -> None:
    events = reader()
    relayed(events, [OPENING, TEXT, STOP + delta(counts) + END])
    assert events.kv is kv
    content = {"type": "message", "stop_reason": "end_turn", "usage": counts}
    view = ENDPOINT.read(json.dumps(ASK).encode(), FakeExchange(b""))
    body = json.dumps(content).encode()
    found, sent, told = ENDPOINT.whole(view, body, cached_tokens=None, created_tokens=None)
    assert (found, sent) == (kv, body)
    assert tokens_in(told or 0) == tokens_in(events.usage() or 0) == (21, 3)


def test_nothing_is_said_before_the_first_text() -> None:
    events = reader()
    assert events.feed(START) == b""
    assert events.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert events.feed(BLOCK + event("ping")) == b""
    assert not events.has_begun
    assert events.feed(TEXT) == START + BLOCK + event("ping") + TEXT
    assert events.has_begun


@pytest.mark.parametrize("said", [b"", TEXT])
def test_an_error_of_the_worker_is_none_of_its_words(said: bytes) -> None:
    events = reader()
    events.feed(OPENING + said)
    with pytest.raises(WorkerFailed) as caught:
        events.feed(event("error", error={"type": "internal_error", "message": "no"}))
    assert caught.value.status == 500


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        STOP,
        STOP + delta(usage(0, 21, 0)),
        END,
        STOP + delta(usage(0, 21, 0), reason=None) + END,
        b"event: message_delta\ndata: nonsense\n\n",
        STOP + b"event: message_st",
    ],
)
def test_a_stream_that_ends_early_is_never_whole(rest: bytes) -> None:
    with pytest.raises(InvalidStream):
        relayed(reader(), [OPENING + TEXT, rest])


def test_what_comes_behind_the_end_is_dropped() -> None:
    assert relayed(reader(), [STREAM, TEXT]) == STREAM


# --- whole answers ------------------------------------------------------------------------------


def whole(document: Any, cached: int | None = None, created: int | None = None) -> tuple[Kv, bytes]:
    view = ENDPOINT.read(json.dumps(ASK).encode(), FakeExchange(b""))
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return ENDPOINT.whole(view, content, cached_tokens=cached, created_tokens=created)[:2]


MESSAGE = {"type": "message", "content": [], "stop_reason": "end_turn", "usage": usage(0, 21, 0)}


@pytest.mark.parametrize(
    ("cached", "created", "told"), [(0, 16, (5, 16, 0)), (16, 0, (5, 0, 16)), (8, None, (13, 0, 8))]
)
def test_the_numbers_of_a_whole_message_add_up(
    cached: int, created: int | None, told: tuple[int, int, int]
) -> None:
    kv, content = whole(MESSAGE, cached, created)
    found = json.loads(content)["usage"]
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert tuple(found[name] for name in names) == told
    assert kv is Kv.TRANSFERRED


def test_what_is_for_engines_does_not_reach_the_client() -> None:
    _, content = whole(MESSAGE | {"kv_transfer_params": {"remote_host": "10.0.0.1"}}, 0, 0)
    assert b"10.0.0.1" not in content


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (b"nonsense", InvalidAnswer),
        (b"[]", InvalidAnswer),
        ({"id": "1"}, InvalidAnswer),
        (MESSAGE | {"stop_reason": None}, InvalidStream),
        ({name: value for name, value in MESSAGE.items() if name != "stop_reason"}, InvalidStream),
        ({"type": "error", "error": {"type": "t", "message": "no"}}, WorkerFailed),
        ({"object": "error", "message": "no"}, WorkerFailed),
    ],
)
def test_what_is_no_whole_message(document: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        whole(document)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message", "kind"),
    [
        (b'{"type":"error","error":{"type":"own","message":"m"}}', "m", "own"),
        (b'{"error":{"message":"m","type":"t","code":400}}', "m", "invalid_request_error"),
        (b'{"error":"Unauthorized"}', "the worker answered 400", "invalid_request_error"),
        (b'{"object":"error","message":"m"}', "m", "invalid_request_error"),
        (b'{"detail":"Not Found"}', "the worker answered 400", "invalid_request_error"),
        (b"<html>", "the worker answered 400", "invalid_request_error"),
    ],
)
def test_a_workers_error_has_anthropics_form(content: bytes, message: str, kind: str) -> None:
    headers, body = ENDPOINT.error(WorkerAnswered(400, content))
    assert json.loads(body) == {"type": "error", "error": {"type": kind, "message": message}}
    assert dict(headers)[b"content-type"] == b"application/json"


def test_our_own_errors_have_it_too() -> None:
    headers, body = ENDPOINT.error(TooBusy("later", retry_after_s=3))
    assert dict(headers)[b"retry-after"] == b"3"
    assert json.loads(body)["error"] == {"type": "rate_limit_error", "message": "later"}
    assert b"www-authenticate" in dict(ENDPOINT.error(Unauthorized("no"))[0])
    sent = ENDPOINT.error_event(WorkerCutShort("cut"))
    assert sent.startswith(b'event: error\ndata: {"type":"error","error":{"type":"api_error"')
    assert sent.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("headers", "credential"),
    [
        ([], None),
        ([(b"x-api-key", b"k")], b"Bearer k"),
        ([(b"authorization", b"Bearer a")], b"Bearer a"),
        ([(b"x-api-key", b"k"), (b"authorization", b"Bearer a")], b"Bearer a"),
    ],
)
def test_where_the_key_is(headers: list[tuple[bytes, bytes]], credential: bytes | None) -> None:
    assert ENDPOINT.credential(FakeExchange(b"", headers=headers)) == credential


# --- legs ---------------------------------------------------------------------------------------


def bodies(**fields: Any) -> LegBodies:
    view = ENDPOINT.read(json.dumps(ASK | fields).encode(), FakeExchange(b""))
    return LegBodies(view, "/v1/messages", form=ENDPOINT.form)


def prefill(made: LegBodies) -> dict[str, Any]:
    return dict(json.loads(b"".join(made.prefill(JSON, "m"))))


def test_a_prefill_leg_wants_one_token() -> None:
    leg = prefill(bodies(stream=True, stop_sequences=["x"], tools=TOOLS, top_k=5))
    assert (leg["max_tokens"], leg["stream"], leg["top_k"], leg["tools"]) == (1, False, 5, TOOLS)
    assert leg["kv_transfer_params"]["do_remote_decode"]
    assert not leg.keys() & {"stop_sequences", "ignore_eos", "stream_options"}


@pytest.mark.parametrize(
    ("limit", "reason"),
    [(9, None), (0, "no token asked for"), (-1, "no token asked for"), (None, "no token asked for")],
)
def test_nothing_is_prefilled_for_a_message_of_no_tokens(limit: Any, reason: str | None) -> None:
    asked = {name: value for name, value in ASK.items() if name != "max_tokens"}
    document = asked if limit is None else asked | {"max_tokens": limit}
    assert ENDPOINT.read(json.dumps(document).encode(), FakeExchange(b"")).whole_reason == reason


@pytest.mark.parametrize(
    ("choice", "stops"), [("auto", None), ("any", None), ("none", None), ("tool", ["{"])]
)
def test_one_token_is_not_read_as_the_arguments_of_a_tool(choice: str, stops: Any) -> None:
    made = bodies(tools=TOOLS, tool_choice={"type": choice, "name": "f"})
    assert prefill(made).get("stop_sequences") == stops
    release = json.loads(b"".join(made.release(JSON, "m", HANDOFF, "salt")))
    assert release.get("stop_sequences") == stops


@pytest.mark.parametrize("kind", ["enabled", "disabled", "adaptive"])
def test_a_release_leg_has_no_budget_for_thinking(kind: str) -> None:
    thinking = {"type": kind, "budget_tokens": 1024}
    release = json.loads(
        b"".join(bodies(thinking=thinking, cache_salt="mine").release(JSON, "m", HANDOFF, "ours"))
    )
    assert ("thinking" in release) == (kind != "enabled")
    assert release["cache_salt"] == "ours"


def test_a_decode_leg_is_the_clients_document_with_the_handoff() -> None:
    made = bodies(stream=True, kv_transfer_params={"remote_host": "evil"}, thinking={"type": "disabled"})
    leg = json.loads(b"".join(made.decode(JSON, "served", HANDOFF)))
    expected = ASK | {"stream": True, "thinking": {"type": "disabled"}, "model": "served"}
    assert leg == expected | {"kv_transfer_params": {"remote_host": "h"}}
    assert not made.takes_ids
    assert not made.asks_hidden_usage


def test_the_same_in_msgpack() -> None:
    made = bodies()
    assert b"do_remote_decode" in b"".join(made.prefill(CODECS["msgpack"], "m"))


def test_a_prefill_answer_tells_what_was_added_to_the_cache() -> None:
    answer = {"type": "message", "usage": usage(5, 0, 16), "kv_transfer_params": params_of("r")}
    handoff = handoff_from(json.dumps(answer).encode())
    assert (handoff.prefill_cached_tokens, handoff.created_tokens()) == (16, 16)
    assert handoff.prompt_tokens() == 21
