"""One leg by itself: its place on the worker, what its end tells, how it is sent again, its hand-off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import (
    BatonError,
    WorkerAnswered,
    WorkerCutShort,
    WorkerGarbage,
    WorkerOut,
    WorkerUnfit,
    WorkerUnreachable,
)
from orchestrator.legs.connectors.base import Handoff, TokenIds
from orchestrator.legs.ledger import KvLease
from orchestrator.legs.leg import AnswerLeg, Leg, PrefillLeg, Question, ReleaseLeg
from orchestrator.telemetry.counters import FallbackReason, LeaseState
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from orchestrator.wire.info import TokenIdsForm
from orchestrator.workers.states import WorkerState
from tests.orchestrator.fakes import JSON, leg_name, read
from tests.orchestrator.legs.one_request import (
    LIMIT,
    NO_MODEL,
    TRUSTED,
    OneRequest,
    answers,
    cuts_short,
    hangs,
    header,
    run,
    says_garbage,
)

HANDOFF = b'{"do_remote_prefill":true}'
NO_FORM = b'{"detail":"There was an error parsing the body"}'
MOST_FORMS: tuple[TokenIdsForm, ...] = ("bin", "base64", "list")


def refuses(status: int, times: int, content: bytes = NO_MODEL) -> LegHandler:
    """It refuses so many legs, and serves the others."""
    left = [times]

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        left[0] -= 1
        reply.answer(status if left[0] >= 0 else 200, content, JSON)

    return worker


def _nothing() -> None: ...


def lease_of(one: OneRequest, token_ids: TokenIds | None = None) -> KvLease:
    return one.cluster.flow.ledger.lease(one.prefill, Handoff(HANDOFF, None, token_ids))


def decode_with(one: OneRequest, lease: KvLease) -> AnswerLeg:
    leg = AnswerLeg(one.legs, one.decode)
    leg.take(lease)
    return leg


async def ended_by(leg: Leg, error: type[BatonError], before: Callable[[], None] = _nothing) -> None:
    """Send a leg whose block this error leaves; `before` is called within the block, after the answer."""
    with pytest.raises(error), leg:
        await _read(leg, before)


async def _read(leg: Leg, before: Callable[[], None]) -> None:
    try:
        await leg.read(LIMIT)
    finally:
        before()


# --- its place ----------------------------------------------------------------------------------


def test_a_leg_has_a_place_on_its_worker_until_its_block_ends() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200, b"[1]"))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            assert one.decode.in_flight == 1
            assert await leg.read(LIMIT) == b"[1]"
            assert one.decode.in_flight == 1
        assert one.decode.in_flight == 0

    run(test)


@pytest.mark.parametrize(
    ("load", "others"),
    [(b"3,2,1,30,250,8,2", 3), (b"", 1), (b"?", 1), (None, 1)],
    ids=["told", "empty", "garbage", "absent"],
)
def test_an_answer_tells_what_others_have_on_its_worker(load: bytes | None, others: int) -> None:
    async def test(one: OneRequest) -> None:
        one.decode.note_others(1)
        told = {} if load is None else {b"x-baton-load": load}
        one.serve(one.decode, answers(200, b"[1]", JSON | told))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
            assert one.decode.in_flight == 1 + others
        one.decode.note_others(0)

    run(test)


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (cuts_short, WorkerCutShort),
        (says_garbage, WorkerGarbage),
        (answers(500), WorkerAnswered),
        (answers(200, b"x" * (LIMIT + 1)), WorkerGarbage),
    ],
)
def test_a_leg_that_fails_gives_its_place_back(handler: LegHandler, error: type[BatonError]) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, handler)
        await ended_by(AnswerLeg(one.legs, one.decode), error)
        assert one.decode.in_flight == 0

    run(test)


def test_a_leg_that_is_cancelled_gives_its_place_back_and_blames_nobody() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, hangs)
        leg = AnswerLeg(one.legs, one.decode)

        async def main() -> None:
            with leg:
                await leg.read(LIMIT)

        task = asyncio.create_task(main())
        await asyncio.sleep(1)
        assert one.decode.in_flight == 1
        task.cancel()
        await asyncio.wait([task])
        assert one.decode.in_flight == 0
        assert one.told_of(one.decode) == TRUSTED
        leg.abort()

    run(test)


def test_an_answer_is_given_up_as_often_as_one_likes() -> None:
    async def test(one: OneRequest) -> None:
        leg = AnswerLeg(one.legs, one.decode)
        leg.abort()
        one.serve(one.decode, hangs)
        task = asyncio.create_task(leg.read(LIMIT))
        await asyncio.sleep(1)
        leg.abort()
        leg.abort()
        with pytest.raises(WorkerCutShort):
            await task
        assert one.cluster.upstream.stats().busy == 0

    run(test)


def test_only_a_leg_that_was_written_has_an_answer() -> None:
    async def test(one: OneRequest) -> None:
        leg = AnswerLeg(one.legs, one.decode)
        with pytest.raises(RuntimeError, match="was not sent"):
            _ = leg.written

    run(test)


# --- what its end tells of the worker -----------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "error", "told"),
    [
        (cuts_short, WorkerCutShort, (WorkerState.SUSPECT, 0, True)),
        (answers(500, b"EngineCore encountered an issue"), WorkerAnswered, (WorkerState.SUSPECT, 0, True)),
        (says_garbage, WorkerGarbage, (WorkerState.READY, 1, True)),
        (answers(500), WorkerAnswered, (WorkerState.READY, 1, True)),
        (answers(503), WorkerAnswered, (WorkerState.READY, 0, False)),
        (answers(429), WorkerAnswered, (WorkerState.READY, 0, False)),
        (answers(404, NO_MODEL), WorkerAnswered, TRUSTED),
        (answers(404), WorkerUnfit, (WorkerState.SUSPECT, 0, True)),
        (answers(401, NO_MODEL), WorkerUnfit, (WorkerState.SUSPECT, 0, True)),
        (answers(307), WorkerUnfit, (WorkerState.SUSPECT, 0, True)),
    ],
    ids=["cut short", "engine ended", "garbage", "500", "503", "429", "404", "404 of others", "401", "307"],
)
def test_the_registry_is_told_what_a_leg_saw(handler: LegHandler, error: type[BatonError], told: Any) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, handler)
        await ended_by(AnswerLeg(one.legs, one.decode), error)
        assert one.told_of(one.decode) == told
        assert one.told_of(one.prefill)[:2] == TRUSTED[:2]
        assert one.legs.was_in_service

    run(test)


def test_a_worker_that_refuses_connections_is_gone() -> None:
    async def test(one: OneRequest) -> None:
        one.cluster.upstream.refuse(one.decode.origin)
        await ended_by(AnswerLeg(one.legs, one.decode), WorkerUnreachable)
        assert one.decode.state is WorkerState.GONE
        assert one.legs.was_in_service

    run(test)


@pytest.mark.parametrize(("event", "counts"), [("mark_gone", True), ("drain", False)])
def test_a_worker_that_others_have_seen_end_may_have_been_ended_by_this_leg(event: str, counts: bool) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, cuts_short)
        registry = one.cluster.registry

        def is_noticed() -> None:
            if event == "mark_gone":
                registry.judge.mark_gone(one.decode, "a probe was refused")
            else:
                registry.drain(one.decode)

        await ended_by(AnswerLeg(one.legs, one.decode), WorkerCutShort, is_noticed)
        assert one.legs.was_in_service is counts

    run(test)


def test_a_leg_of_an_earlier_epoch_tells_nothing_of_a_loss() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, cuts_short)
        leg = AnswerLeg(one.legs, one.decode)

        def comes_back() -> None:
            one.cluster.registry.judge.mark_gone(one.decode, "it has ended")
            one.cluster.registry.judge.mark_ready(one.decode)

        await ended_by(leg, WorkerCutShort, comes_back)
        assert leg.epoch < one.decode.epoch
        assert one.decode.state is WorkerState.READY

    run(test)


@pytest.mark.parametrize("error", [WorkerCutShort("no"), WorkerUnreachable("no"), WorkerAnswered(500, b"")])
def test_a_leg_that_was_not_sent_tells_nothing(error: BatonError) -> None:
    """The error is another leg's: that of the prefill within whose block it was raised."""

    async def test(one: OneRequest) -> None:
        with pytest.raises(type(error)), AnswerLeg(one.legs, one.decode):
            raise error
        assert one.told_of(one.decode) == TRUSTED
        assert not one.legs.was_in_service

    run(test)


@pytest.mark.parametrize("handler", [cuts_short, answers(500), answers(503)])
def test_a_leg_that_is_given_up_tells_nothing(handler: LegHandler) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, handler)
        leg = AnswerLeg(one.legs, one.decode)
        await ended_by(leg, BatonError, leg.give_up)
        assert one.told_of(one.decode) == TRUSTED

    run(test)


def test_an_error_that_is_no_workers_tells_nothing() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200))

        def ours() -> None:
            raise ValueError("ours")

        with pytest.raises(ValueError, match="ours"):
            await ended_by(AnswerLeg(one.legs, one.decode), BatonError, ours)
        assert one.told_of(one.decode) == TRUSTED

    run(test)


def test_a_worker_out_of_service_gets_no_leg_and_no_blame() -> None:
    async def test(one: OneRequest) -> None:
        one.cluster.registry.judge.mark_gone(one.decode, "it has ended")
        leg = AnswerLeg(one.legs, one.decode)
        assert not leg.is_in_service
        with pytest.raises(WorkerOut), leg:
            leg.check_in_service()
        assert one.legs.last is one.decode
        assert one.decode.state is WorkerState.GONE
        assert one.sent_to(one.decode) == []

    run(test)


@pytest.mark.parametrize("kind", ["release", "question"])
@pytest.mark.parametrize("handler", [answers(500), answers(503), answers(404, NO_MODEL)])
def test_answers_beside_a_request_say_nothing_of_health(kind: str, handler: LegHandler) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, handler)
        leg: Leg = Question(one.legs, one.decode, "/tokenize", b"{}")
        if kind == "release":
            leg = ReleaseLeg(one.legs, one.decode, one.legs.bodies, Handoff(HANDOFF))
        await ended_by(leg, WorkerAnswered)
        assert one.decode.state is WorkerState.READY
        assert one.decode.failures == 0

    run(test)


def test_a_release_that_reaches_nobody_tells_it_and_one_that_is_cut_short_does_not() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, cuts_short)
        await ended_by(ReleaseLeg(one.legs, one.decode, one.legs.bodies, Handoff(HANDOFF)), WorkerCutShort)
        assert one.decode.state is WorkerState.READY
        one.cluster.upstream.refuse(one.decode.origin)
        await ended_by(ReleaseLeg(one.legs, one.decode, one.legs.bodies, Handoff(HANDOFF)), WorkerUnreachable)
        assert one.decode.state is WorkerState.GONE

    run(test)


def test_a_leg_that_succeeds_forgives_failures() -> None:
    async def test(one: OneRequest) -> None:
        one.decode.failures = 2
        one.serve(one.decode, answers(200))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
            assert one.decode.failures == 2
            leg.succeed()
        assert one.decode.failures == 0
        assert one.decode.abilities.proven_epoch == one.decode.epoch

    run(test)


# --- a form that is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 415, 422])
def test_a_form_that_is_refused_is_sent_again_once_as_plain_json(status: int) -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, refuses(status, 1))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
            leg.succeed()
        first, second = one.sent_to(one.decode)
        assert [header(first, b"x-msgpack"), header(second, b"x-msgpack")] == [b"1", None]
        assert read(first) == read(second)
        assert one.fallbacks() == {FallbackReason.REFUSED: 1}
        assert one.decode.abilities.codec.name == "json"
        assert one.decode.abilities.proven_epoch != one.decode.epoch

    run(test, transport="msgpack")


@pytest.mark.parametrize("status", [400, 413])
@pytest.mark.parametrize("is_proven", [False, True])
def test_a_document_that_cannot_be_msgpack_says_nothing_of_the_worker(
    status: int, *, is_proven: bool
) -> None:
    """It goes as JSON, and the next request as msgpack again: a client decides about its own request only."""

    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        if is_proven:
            one.decode.abilities.proven_epoch = one.decode.epoch
        asked = 0

        async def refuses_it(request: MemoryRequest, reply: MemoryReply) -> None:
            nonlocal asked
            asked += 1
            content = b'{"error":{"message":"msgpack body refused: more than 262144 entries"}}'
            reply.answer(*(status, content, JSON) if asked == 1 else (200, b"{}", JSON))

        one.serve(one.decode, refuses_it)
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
            leg.succeed()
        assert [header(sent, b"x-msgpack") for sent in one.sent_to(one.decode)] == [b"1", None]
        assert one.fallbacks() == {FallbackReason.NOT_ENCODABLE: 1}
        assert one.decode.abilities.codec.name == "msgpack"

    run(test, transport="msgpack")


def test_a_worker_that_has_come_back_meanwhile_is_not_sent_the_same_hand_off_again() -> None:
    """It may be of another revision by now, and the hand-off is as good as before."""

    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")

        async def comes_back(request: MemoryRequest, reply: MemoryReply) -> None:
            one.cluster.registry.judge.mark_gone(one.decode, "it has ended")
            one.cluster.registry.judge.mark_ready(one.decode)
            one.announce(one.decode, "json", "msgpack")
            reply.answer(400, NO_FORM, JSON)

        one.serve(one.decode, comes_back)
        lease = lease_of(one)
        await ended_by(decode_with(one, lease), WorkerOut)
        assert len(one.sent_to(one.decode)) == 1
        assert one.legs.last is one.decode
        assert lease.state is LeaseState.HELD
        lease.release()

    run(test, transport="msgpack")


def test_what_is_refused_as_plain_json_too_is_the_requests_fault() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, answers(400))
        await ended_by(AnswerLeg(one.legs, one.decode), WorkerAnswered)
        assert len(one.sent_to(one.decode)) == 2
        assert one.fallbacks() == {}
        assert one.decode.abilities.codec.name == "msgpack"
        assert one.told_of(one.decode) == TRUSTED

    run(test, transport="msgpack")


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_other_errors_are_no_refusal_of_a_form(status: int) -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, refuses(status, 1))
        await ended_by(AnswerLeg(one.legs, one.decode), WorkerAnswered)
        assert len(one.sent_to(one.decode)) == 1

    run(test, transport="msgpack")


def test_a_form_that_was_taken_before_is_not_what_is_refused() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        one.decode.abilities.proven_epoch = one.decode.epoch
        one.serve(one.decode, refuses(400, 1))
        await ended_by(AnswerLeg(one.legs, one.decode), WorkerAnswered)
        assert len(one.sent_to(one.decode)) == 1

    run(test, transport="msgpack")


def test_plain_json_is_not_sent_again() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, refuses(400, 1))
        await ended_by(AnswerLeg(one.legs, one.decode), WorkerAnswered)
        assert len(one.sent_to(one.decode)) == 1

    run(test)


def test_a_leg_is_not_sent_again_to_a_worker_that_is_out_by_then() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")

        async def refuses_and_ends(request: MemoryRequest, reply: MemoryReply) -> None:
            one.cluster.registry.judge.mark_gone(one.decode, "it has ended")
            reply.answer(400, b"{}", JSON)

        one.serve(one.decode, refuses_and_ends)
        await ended_by(AnswerLeg(one.legs, one.decode), WorkerOut)
        assert len(one.sent_to(one.decode)) == 1

    run(test, transport="msgpack")


def test_a_body_that_msgpack_cannot_carry_goes_as_json_and_is_counted() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, answers(200))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
        assert [header(sent, b"x-msgpack") for sent in one.sent_to(one.decode)] == [None]
        assert one.fallbacks() == {FallbackReason.NOT_ENCODABLE: 1}

    run(test, transport="msgpack", document={"model": "m", "prompt": "hi", "logit_bias": 2**70})


# --- the hand-off -------------------------------------------------------------------------------


def test_a_hand_off_is_used_once_the_leg_is_written_and_consumed_by_its_success() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200))
        lease = lease_of(one)
        leg = decode_with(one, lease)
        assert lease.state is LeaseState.HELD
        with leg:
            await leg.read(LIMIT)
            assert lease.state is LeaseState.USED
            assert leg.settle_handoff() is lease  # nobody knows yet what became of it
            leg.succeed()
        assert lease.state is LeaseState.CONSUMED
        assert leg.settle_handoff() is None
        assert read(one.sent_to(one.decode)[0])["kv_transfer_params"] == json.loads(HANDOFF)

    run(test)


def test_a_hand_off_is_unused_if_nothing_was_written() -> None:
    async def test(one: OneRequest) -> None:
        one.cluster.upstream.refuse(one.decode.origin)
        lease = lease_of(one)
        leg = decode_with(one, lease)
        await ended_by(leg, WorkerUnreachable)
        assert leg.settle_handoff() is None
        assert lease.state is LeaseState.HELD

    run(test)


@pytest.mark.parametrize("status", [400, 404, 429, 503])
def test_a_hand_off_is_owed_again_if_the_leg_was_refused_unread(status: int) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(status, NO_MODEL))
        lease = lease_of(one)
        leg = decode_with(one, lease)
        await ended_by(leg, WorkerAnswered)
        assert lease.state is LeaseState.USED
        assert leg.settle_handoff() is None
        assert lease.state is LeaseState.HELD

    run(test)


@pytest.mark.parametrize(("handler", "error"), [(cuts_short, WorkerCutShort), (answers(500), WorkerAnswered)])
def test_a_hand_off_whose_leg_was_lost_stays_used(handler: LegHandler, error: type[BatonError]) -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, handler)
        lease = lease_of(one)
        leg = decode_with(one, lease)
        await ended_by(leg, error)
        assert leg.settle_handoff() is lease
        assert lease.state is LeaseState.USED

    run(test)


def test_a_leg_that_is_sent_again_uses_the_same_hand_off_without_token_ids() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "orjson", token_ids=("base64",))
        one.serve(one.decode, refuses(400, 1, b'{"error":{"message":"no ids","type":"Bad Request"}}'))
        lease = lease_of(one, TokenIds(json=b'"AQAAAA=="'))
        leg = decode_with(one, lease)
        with leg:
            await leg.read(LIMIT)
            assert lease.state is LeaseState.USED
            leg.succeed()
        first, second = [read(sent)["kv_transfer_params"] for sent in one.sent_to(one.decode)]
        assert first == json.loads(HANDOFF) | {"prompt_token_ids": "AQAAAA=="}
        assert second == json.loads(HANDOFF)
        assert lease.state is LeaseState.CONSUMED

    run(test, transport="orjson")


def test_a_leg_without_a_hand_off_is_the_whole_request() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200))
        leg = AnswerLeg(one.legs, one.decode)
        with leg:
            await leg.read(LIMIT)
            leg.succeed()
        assert leg.settle_handoff() is None
        assert "kv_transfer_params" not in read(one.sent_to(one.decode)[0])

    run(test)


# --- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "expected", "accept"),
    [
        (None, None, [b"text/plain"]),
        ("list", None, [b"text/plain"]),
        ("base64", b"base64", [b"text/plain"]),
        ("bin", b"bin", [b"application/msgpack", b"text/plain"]),
    ],
)
def test_the_head_of_a_prefill_names_the_form_of_the_ids(
    form: TokenIdsForm | None, expected: bytes | None, accept: list[bytes]
) -> None:
    async def test(one: OneRequest) -> None:
        leg = PrefillLeg(one.legs, one.prefill, one.decode, form)
        with leg:
            await leg.read(LIMIT)
        [sent] = one.sent_to(one.prefill)
        assert header(sent, b"x-token-ids") == expected
        assert [value for name, value in sent.headers if name == b"accept"] == accept
        assert read(sent).get("return_token_ids", False) == (form is not None)

    run(test)


def test_a_prefill_that_is_sent_again_asks_for_no_ids() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.prefill, "json", "msgpack", token_ids=MOST_FORMS)
        one.serve(one.prefill, refuses(422, 1))
        leg = PrefillLeg(one.legs, one.prefill, one.decode, "bin")
        with leg:
            await leg.read(LIMIT)
        first, second = one.sent_to(one.prefill)
        assert [header(first, b"x-token-ids"), header(second, b"x-token-ids")] == [b"bin", None]
        assert [read(first).get("return_token_ids"), read(second).get("return_token_ids")] == [True, None]

    run(test, transport="msgpack")


def test_every_leg_has_an_id_of_its_own() -> None:
    async def test(one: OneRequest) -> None:
        one.announce(one.decode, "json", "msgpack")
        one.serve(one.decode, refuses(400, 1))
        for legs in (one.legs, one.another()):
            for leg in (PrefillLeg(legs, one.prefill, one.decode, None), AnswerLeg(legs, one.decode)):
                with leg:
                    await leg.read(LIMIT)
                assert leg.id == f"{legs.id}-{legs.count}"
        ids = [header(sent, b"x-request-id") for sent in one.cluster.upstream.requests]
        assert len(ids) == 5  # one leg was sent twice
        assert None not in ids
        assert len(set(ids)) == 5

    run(test, transport="msgpack")


@pytest.mark.parametrize("client_id", [b"", b"x-request-id: same\r\n"])
def test_so_has_every_leg_whose_client_names_its_request(client_id: bytes) -> None:
    async def test(one: OneRequest) -> None:
        for legs in (one.legs, one.another()):
            legs.client_id = client_id
            for leg in (PrefillLeg(legs, one.prefill, one.decode, None), AnswerLeg(legs, one.decode)):
                with leg:
                    await leg.read(LIMIT)
        sent = one.cluster.upstream.requests
        assert len({leg_name(leg) for leg in sent}) == 4
        assert [header(leg, b"x-request-id") for leg in sent[1::2]] == [b"same" if client_id else None] * 2
        assert [header(leg, b"x-baton-leg") for leg in sent[::2]] == [None] * 2

    run(test)


def test_a_question_has_no_id_and_none_of_the_clients_headers() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200, b'{"tokens":[]}'))
        question = Question(one.legs, one.decode, "/tokenize", b'{"prompt":""}')
        with question:
            assert await question.read(LIMIT) == b'{"tokens":[]}'
        [sent] = one.sent_to(one.decode)
        assert (sent.target, sent.body) == ("/tokenize", b'{"prompt":""}')
        assert dict(sent.headers).keys() == {b"content-type", b"accept-encoding"}

    run(test)


def test_a_released_prompt_has_a_salt_of_its_own() -> None:
    async def test(one: OneRequest) -> None:
        one.serve(one.decode, answers(200))
        for legs in (one.legs, one.another()):
            leg = ReleaseLeg(legs, one.decode, legs.bodies, Handoff(HANDOFF))
            with leg:
                assert await leg.read(LIMIT, only_head=True) == b""
            leg.abort()
        salts = [read(sent)["cache_salt"] for sent in one.sent_to(one.decode)]
        assert len(set(salts)) == 2

    run(test)
