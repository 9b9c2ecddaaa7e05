"""What legs are sent with, and what workers are asked beside them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from orchestrator.errors import WorkerAnswered, WorkerUnreachable
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.legs.leg import AnswerLeg
from orchestrator.loop.offload import Offload
from orchestrator.telemetry.counters import FallbackReason
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from orchestrator.wire.codec import MAX_INLINE_BYTES, NotEncodable, TooLarge
from orchestrator.wire.headers import fields_of
from orchestrator.wire.info import END_PATH
from orchestrator.workers.states import WorkerState
from tests.orchestrator.fakes import read
from tests.orchestrator.legs.one_request import (
    CHAT,
    LIMIT,
    TRUSTED,
    OneRequest,
    answers,
    cuts_short,
    header,
    run,
    says_garbage,
)

LARGE = CHAT | {"metadata": {"note": "x" * MAX_INLINE_BYTES}}


class InPlace(Offload):
    """It does at once what else has a process of its own, and counts that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    async def run(self, function: Callable[..., Any], data: bytes, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return function(data, *args, **kwargs)


def dispatcher_of(one: OneRequest) -> Dispatcher:
    return one.cluster.core.dispatcher


def serve_ends(one: OneRequest, handler: LegHandler) -> None:
    """The decode worker can be asked to end legs."""
    one.cluster.upstream.serve(one.decode.origin, handler, ends_legs=True)


def offloads_in_place(one: OneRequest) -> InPlace:
    offload, core = InPlace(), one.cluster.core
    dispatcher = Dispatcher(
        one.cluster.registry,
        one.cluster.upstream,
        offload,
        one.cluster.telemetry,
        core.ids,
        None,
        dispatcher_of(one).time,
    )
    one.legs.dispatcher = dispatcher
    return offload


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("credential", [None, "secret"])
def test_the_heads_of_legs_are_made_once_and_have_the_workers_key(credential: str | None) -> None:
    async def test(one: OneRequest) -> None:
        key = [] if credential is None else [(b"authorization", b"Bearer secret")]
        heads = {name: fields_of(block) for name, block in dispatcher_of(one).headers.items()}
        content_type = (b"content-type", b"application/json")
        encoding = (b"accept-encoding", b"identity")
        assert heads == {
            "form": [encoding, *key],
            "json": [content_type, encoding, *key],
            "msgpack": [content_type, (b"x-msgpack", b"1"), encoding, *key],
        }

    run(test, credential=credential)


def test_a_question_has_the_workers_key() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200, b"[]"))
        answer = await dispatcher_of(one).ask(one.decode, "/tokenize", b"{}")
        assert await answer.read(LIMIT) == b"[]"
        [sent] = one.sent_to(one.decode)
        assert (sent.method, sent.target, sent.body) == ("POST", "/tokenize", b"{}")
        assert header(sent, b"authorization") == b"Bearer secret"

    run(test, credential="secret")


def test_no_leg_and_no_question_has_the_key_where_the_worker_is_not_to_get_it() -> None:
    async def test(one: OneRequest) -> None:
        one.decode.gets_credential = False
        one.serve(one.decode, answers(200, b"{}"))
        answer = await dispatcher_of(one).ask(one.decode, "/tokenize", b"{}")
        await answer.read(LIMIT)
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
        sent = one.sent_to(one.decode)
        assert len(sent) == 2
        assert [header(leg, b"authorization") for leg in sent] == [None, None]

    run(test, credential="secret")


# --- the end of a leg ---------------------------------------------------------------------------


def test_a_worker_is_asked_to_end_a_leg_by_its_id() -> None:
    async def test(one: OneRequest) -> None:
        serve_ends(one, answers(202, b""))
        assert await dispatcher_of(one).end_leg(one.decode, "id-1")
        [sent] = one.sent_to(one.decode)
        assert sent.target == END_PATH
        assert json.loads(sent.body) == {"request_id": "id-1"}
        assert one.decode.abilities.unendable_epoch != one.decode.epoch

    run(test)


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_worker_that_cannot_end_legs_is_asked_once_until_it_comes_back(status: int) -> None:
    async def test(one: OneRequest) -> None:
        serve_ends(one, answers(status))
        assert not await dispatcher_of(one).end_leg(one.decode, "id-1")
        assert not await dispatcher_of(one).end_leg(one.decode, "id-2")
        assert len(one.sent_to(one.decode)) == 1
        assert one.told_of(one.decode) == TRUSTED
        one.cluster.registry.judge.mark_gone(one.decode, "it has ended")
        one.cluster.registry.judge.mark_ready(one.decode)
        serve_ends(one, answers(202, b""))
        assert await dispatcher_of(one).end_leg(one.decode, "id-3")

    run(test)


async def says_too_much(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(202)
    reply.chunk_nowait(b"x" * 100_000)
    await reply.hang()


@pytest.mark.parametrize("handler", [cuts_short, says_garbage, says_too_much])
def test_a_worker_that_fails_to_end_a_leg_is_asked_for_the_next_one(handler: LegHandler) -> None:
    async def test(one: OneRequest) -> None:
        serve_ends(one, handler)
        assert not await dispatcher_of(one).end_leg(one.decode, "id-1")
        assert not await dispatcher_of(one).end_leg(one.decode, "id-2")
        assert len(one.sent_to(one.decode)) == 2
        assert one.told_of(one.decode) == TRUSTED
        assert one.cluster.upstream.stats().busy == 0

    run(test)


def test_a_worker_that_is_not_there_ends_nothing() -> None:
    async def test(one: OneRequest) -> None:
        one.cluster.upstream.refuse(one.decode.origin)
        assert not await dispatcher_of(one).end_leg(one.decode, "id-1")
        assert one.told_of(one.decode) == TRUSTED  # a leg will tell, if there is one

    run(test)


# --- forms --------------------------------------------------------------------------------------


def test_a_large_body_is_made_elsewhere_once_for_all_legs() -> None:
    async def test(one: OneRequest) -> None:
        offload = offloads_in_place(one)
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, answers(200))
        for _ in range(2):
            leg = AnswerLeg(one.legs, one.decode)
            with leg:
                await leg.read(LIMIT)
        assert offload.calls == 1
        assert [header(sent, b"x-msgpack") for sent in one.sent_to(one.decode)] == [b"1", b"1"]
        assert [read(sent) for sent in one.sent_to(one.decode)] == [LARGE, LARGE]
        assert one.fallbacks() == {}

    run(test, transport="msgpack", document=LARGE)


def test_a_large_body_that_msgpack_cannot_carry_goes_as_json() -> None:
    async def test(one: OneRequest) -> None:
        offload = offloads_in_place(one)
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, answers(200))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
        assert offload.calls == 1
        assert [header(sent, b"x-msgpack") for sent in one.sent_to(one.decode)] == [None]
        assert leg.id.endswith("-1")
        assert one.fallbacks() == {FallbackReason.NOT_ENCODABLE: 1}

    run(test, transport="msgpack", document=LARGE | {"logit_bias": 2**70})


def test_what_is_transcoded_is_the_document_as_msgpack() -> None:
    async def test(one: OneRequest) -> None:
        offloads_in_place(one)
        packed = await one.legs.dispatcher.transcode(b'{"a": [1, "b"]}')
        assert packed is not None
        assert msgspec.msgpack.decode(packed) == {"a": [1, "b"]}
        assert await one.legs.dispatcher.transcode(b"[%d]" % 2**70) is None

    run(test)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(NotEncodable("no"), FallbackReason.NOT_ENCODABLE), (TooLarge("no"), FallbackReason.TOO_LARGE)],
)
def test_what_goes_as_json_is_counted_by_its_reason(error: NotEncodable, reason: FallbackReason) -> None:
    async def test(one: OneRequest) -> None:
        dispatcher_of(one).note_not_encodable(error)
        assert one.fallbacks() == {reason: 1}

    run(test)


def test_a_worker_that_refused_its_form_gets_plain_json_until_it_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack", token_ids=("bin",))
        with caplog.at_level(logging.WARNING, "baton.dispatch"):
            dispatcher_of(one).note_refused_form(one.decode)
        assert one.decode.name in caplog.text
        assert (one.decode.abilities.codec.name, one.decode.abilities.token_ids) == ("json", ())
        assert one.fallbacks() == {FallbackReason.REFUSED: 1}
        one.cluster.registry.judge.mark_gone(one.decode, "it has ended")
        one.cluster.registry.judge.mark_ready(one.decode)
        one.announce(one.decode, "json", "msgpack", token_ids=("bin",))
        assert (one.decode.abilities.codec.name, one.decode.abilities.token_ids) == ("msgpack", ("bin",))

    run(test, transport="msgpack")


# --- workers that are not reached ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "state"),
    [
        (None, WorkerState.GONE),
        (ConnectionRefusedError("refused"), WorkerState.GONE),
        (TimeoutError("too slow"), WorkerState.SUSPECT),
    ],
)
def test_a_refused_connection_is_certain_and_a_slow_one_a_suspicion(
    cause: Exception | None, state: WorkerState
) -> None:
    async def test(one: OneRequest) -> None:
        error = WorkerUnreachable("no connection")
        error.__cause__ = cause
        dispatcher_of(one).note_unreachable(one.decode, error)
        assert one.decode.state is state
        assert repr(cause or error) in str(one.decode.last_error)

    run(test)


# --- errors of workers --------------------------------------------------------------------------


def test_a_workers_own_error_keeps_its_head() -> None:
    async def test(one: OneRequest) -> None:
        head = {b"content-type": b"text/plain", b"retry-after": b"7"}
        one.serve(one.decode, answers(503, b"busy", head))
        with pytest.raises(WorkerAnswered) as raised:
            await AnswerLeg(one.legs, one.decode).read(LIMIT)
        error = raised.value
        assert (error.status, error.content, error.content_type) == (503, b"busy", b"text/plain")
        assert error.retry_after_s == 7

    run(test)
