"""The simulated worker is a FastAPI application: it has vLLM's endpoints, and `/sim/...` for tests."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from hashlib import sha256
from http import HTTPStatus
from random import Random
from typing import Annotated, Any

import msgspec
import orjson
from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.wire.info import BEGUN_PATH, END_PATH, EndRequest, KvEventsInfo, WorkerInfo
from orchestrator.wire.load import DRAIN_PATH, READY_PATH, UNDRAIN_PATH
from worker.info import announced_streams, decodes, deployment_from_env, token_ids, zone_from_env
from worker.load import Figures, LegCounting, LoadMeter, Sender
from worker.msgpack_route import route_class
from worker.ready import reported
from worker.sim import audio, faults, frames, messages, protocol, responses, text
from worker.sim.delivery import GenerationResponse, ProbeResponse
from worker.sim.embeddings import EmbeddingJob, EmbeddingRequest, EmbeddingResponse, embedding_job
from worker.sim.engine import Engine
from worker.sim.faults import Fault, FaultBox, Leg, Plan
from worker.sim.journal import Entry, Journal
from worker.sim.links import TRANSPORT_KEY, SimStreams
from worker.sim.metrics import Metrics
from worker.sim.protocol import ChatRequest, CompletionRequest, Job, Malformed, Refused
from worker.sim.settings import Publishing, Settings
from worker.streams import add_streams
from worker.token_ids import LIMITS_KEY, Limits, requested_by

REFUSE_KEY = "refuse"  # in `app.state`, set by `SimServer`: its `refuse`

_GUARDED = ("/v1", DRAIN_PATH, UNDRAIN_PATH)
_Body = Annotated[dict[str, Any], Body()]
_JobMaker = Callable[[Any, Settings, str | None], Job | EmbeddingJob]
_Respond = Callable[[Engine, Any, Plan, Entry], Response]


def create_app(settings: Settings) -> FastAPI:
    """Make the application. Its lifespan opens the side channel, so a hand-off needs one that runs."""
    sim = Sim(settings)
    app = FastAPI(title="Baton simulated worker", lifespan=sim.lifespan, exception_handlers=_HANDLERS)
    app.state.sim = sim
    setattr(app.state, LIMITS_KEY, Limits(text.VOCAB_SIZE, settings.context_tokens))
    app.include_router(_json_routes(sim))
    app.include_router(_messages_routes(sim))
    app.include_router(_responses_routes(sim))
    app.include_router(_plain_routes(sim))
    app.include_router(_control_routes(sim))
    if not settings.announced.is_plain:
        app.add_middleware(LegCounting, meter=lambda: sim.meter)
        if settings.announced.streams == "mux":
            add_streams(app, SimStreams)
    app.add_middleware(RequireKey, keys=sim.keys)
    if settings.defects.clock_offset_s:
        app.add_middleware(WrongClock, offset_s=settings.defects.clock_offset_s)
    return app


class Sim:
    """One worker holds all this."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engines = [_engine(settings, rank) for rank in range(settings.data_parallel_size)]
        self.engine = self.engines[0]
        self.keys = Keys(settings.api_keys)
        self.faults = FaultBox((), Random(settings.seed))  # noqa: S311  # no secret
        self.commit(settings.faults)
        self.journal = Journal(settings.record)
        self.store = responses.Store(settings.stores_responses)
        self.started = int(time.time())
        self.meter = LoadMeter(self.figures, settings.announced.revision)

    def figures(self, rank: int | None) -> Figures:
        """Return how busy the engine of a rank is, or all of them together."""
        if rank is not None and rank < len(self.engines):
            return self.engines[rank].figures()
        running, waiting, tokens, kv, seats = zip(*(each.figures() for each in self.engines), strict=True)
        return Figures(sum(running), sum(waiting), sum(tokens), max(kv), sum(filter(None, seats)))

    def commit(self, found: Sequence[Fault]) -> None:
        """Commit faults: at once, or when requests come. Who listens sees to refusals."""
        for fault in found:
            if isinstance(fault, faults.Rekey):
                self.keys.change(fault.keys)
            elif isinstance(fault, faults.Freeze):
                for engine in self.engines:
                    engine.pulse.stop(fault.seconds)
        self.faults.add([fault for fault in found if not isinstance(fault, faults.AT_ONCE)])

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as serving:
            for engine in self.engines:
                await serving.enter_async_context(engine.serving())
            yield

    async def accept(
        self,
        request: Request,
        body: dict[str, Any],
        kind: type[Any],
        make: _JobMaker,
        respond: _Respond,
        refusal: Callable[[Refused], bytes] | None = None,
    ) -> Response:
        """Take a request for the engine, which gets to work when the response is sent. `refusal` is the
        endpoint's form of errors.
        """
        entry = await self.journal.add(request, body)
        entry.leg = leg_of(body)
        plan = self.faults.draw(entry.leg)
        if plan.deadly:
            _die_of(body, plan.deadly)
        try:
            entry.rank = rank = self._rank(request)
            engine = self.engines[rank]
            job = self._job(engine, body, kind, make, request.headers.get("x-request-id"))
        except Refused as refused:
            entry.outcome = f"refused: {refused.message}"
            return _encoded((refusal or _refusal_body)(refused), refused.status)
        if self.settings.scheduling_policy == "priority" and isinstance(job, Job):
            job = protocol.prioritized(job, _priority_of(request, body))
        entry.answer_id = job.request_id
        return respond(engine, job, plan, entry)

    def _rank(self, request: Request) -> int:
        """Return the engine that the header names, or else the one with the least to do, as in vLLM. Raises
        `Refused`.
        """
        given, ranks = request.headers.get("x-data-parallel-rank", ""), range(len(self.engines))
        if not given.lstrip("-").isdecimal():
            return min(ranks, key=lambda rank: len(self.engines[rank].under_way))
        if int(given) not in ranks:
            raise Refused(f"data_parallel_rank {given} is out of range [0, {len(ranks)}).")
        return int(given)

    def _job(
        self, engine: Engine, body: dict[str, Any], kind: type[Any], make: _JobMaker, header_id: str | None
    ) -> Job | EmbeddingJob:
        """Make the job of a request. Raises `Refused`; a hand-off is given up then, as in vLLM, except for a
        body of the wrong type.
        """
        request = protocol.parse(body, kind)
        try:
            return make(request, self.settings, header_id)
        except Malformed:
            raise
        except Refused:
            engine.give_up(request.kv_transfer_params)
            raise

    def info(self) -> WorkerInfo:
        settings, announced = self.settings, self.settings.announced
        return WorkerInfo(
            role=settings.role,
            model=settings.model_name,
            decodes=decodes(settings.transport),
            engine="sim",
            engine_version=announced.engine_version or frames.VERSION,
            block_size=settings.block_size,
            dtype=announced.dtype,
            path=announced.path or settings.model_name,
            revision=announced.revision,
            kv_dtype=announced.kv_dtype,
            tp=announced.tp,
            connector=announced.connector,
            kv_tokens=announced.kv_tokens or settings.block_size * settings.num_blocks,
            data_parallel_size=settings.data_parallel_size if settings.data_parallel_size > 1 else None,
            max_model_len=settings.context_tokens,
            token_ids=token_ids(settings.transport),
            kv_events=_events_info(settings.kv_events),
            kv_lease_s=settings.lease_s,
            zone=zone_from_env(),
            deployment=deployment_from_env(),
            streams=announced_streams(announced.streams),
        )

    def ledger(self, now: float) -> dict[str, Any]:
        """Describe the first engine, and of several each of the others as well."""
        first, *others = [self._engine_ledger(engine, now) for engine in self.engines]
        requests = {"requests": self.journal.summaries()}
        return {**first, **({"others": others} if others else {}), **requests}

    def _engine_ledger(self, engine: Engine, now: float) -> dict[str, Any]:
        return {
            "engine_id": engine.engine_id,
            "role": self.settings.role,
            "running": engine.running,
            "waiting": engine.waiting,
            "sending": engine.sending,
            "in_flight": engine.running + engine.waiting + engine.sending,
            "aborted": engine.aborted,
            "blocks_used": engine.pool.used,
            **engine.ledger.describe(now),
        }

    def metrics(self) -> bytes:
        """Return the page of all engines; the words about a metric are there once."""
        first, *others = [engine.metrics.render() for engine in self.engines]
        lines = [line for page in others for line in page.splitlines(keepends=True)]
        return first + b"".join(line for line in lines if not line.startswith(b"#"))


def _engine(settings: Settings, rank: int) -> Engine:
    """Make the engine of a rank, whose side channel is so many ports behind that of the first."""
    first = settings.side_channel_port
    own = replace(settings, side_channel_port=first + rank if first else 0)
    return Engine(own, Metrics(settings.model_name, rank))


def _die_of(body: dict[str, Any], deadly: list[str]) -> None:
    said = json.dumps(body, default=repr)
    if any(text in said for text in deadly):
        os.kill(os.getpid(), signal.SIGKILL)


def leg_of(body: dict[str, Any]) -> Leg:
    kv = body.get("kv_transfer_params")
    if isinstance(kv, dict) and kv.get("do_remote_decode"):
        return "prefill"
    return "decode" if isinstance(kv, dict) and kv.get("do_remote_prefill") else "aggregated"


def _priority_of(request: Request, body: dict[str, Any]) -> int:
    """Return the priority of a request: its header goes before its field, as in vLLM."""
    for value in (request.headers.get("x-vllm-priority"), body.get("priority")):
        try:
            return int(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return 0


async def require_json(request: Request) -> None:
    """Refuse all but JSON, as vLLM does. It is async, for FastAPI calls other dependencies in a thread."""
    kind = request.headers.get("content-type", "").lower().partition(";")[0]
    if kind != "application/json":
        raise Malformed("Unsupported Media Type: Only 'application/json' is allowed")


def _json_routes(sim: Sim) -> APIRouter:
    router = APIRouter(route_class=route_class(sim.settings.transport), dependencies=[Depends(require_json)])
    settings = sim.settings

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request, body: _Body) -> Response:
        respond = partial(GenerationResponse, wanted=requested_by(request.state))
        return await sim.accept(request, body, ChatRequest, protocol.chat_job, respond)

    @router.post("/v1/completions")
    async def create_completion(request: Request, body: _Body) -> Response:
        respond = partial(GenerationResponse, wanted=requested_by(request.state))
        return await sim.accept(request, body, CompletionRequest, protocol.completion_job, respond)

    @router.post("/v1/embeddings")
    async def create_embedding(request: Request, body: _Body) -> Response:
        return await sim.accept(request, body, EmbeddingRequest, embedding_job, EmbeddingResponse)

    @router.post("/tokenize")
    async def tokenize(body: _Body) -> Response:
        asked = protocol.parse(body, protocol.TokenizeRequest)
        tokens = protocol.tokens_to_count(asked, settings)
        strings = [text.decode([token]) for token in tokens] if asked.return_token_strs else None
        return _json(
            {
                "count": len(tokens),
                "max_model_len": settings.context_tokens,
                "tokens": tokens,
                "token_strs": strings,
            }
        )

    @router.post("/detokenize")
    async def detokenize(body: _Body) -> Response:
        asked = protocol.parse(body, protocol.DetokenizeRequest)
        return _json({"prompt": protocol.tokens_to_text(asked, settings)})

    return router


def _messages_routes(sim: Sim) -> APIRouter:
    router = APIRouter(route_class=route_class(sim.settings.transport), dependencies=[Depends(require_json)])
    respond = partial(GenerationResponse, form=messages.MessagesAnswer)

    @router.post("/v1/messages")
    async def create_message(request: Request, body: _Body) -> Response:
        kind, make = messages.MessagesRequest, messages.job
        return await sim.accept(request, body, kind, make, respond, messages.refusal)

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request, body: _Body) -> Response:
        await sim.journal.add(request, body)
        try:
            return _json(messages.count(protocol.parse(body, messages.CountRequest), sim.settings))
        except Refused as refused:
            return _encoded(messages.refusal(refused), refused.status)

    return router


def _responses_routes(sim: Sim) -> APIRouter:
    router = APIRouter()
    json_router = APIRouter(
        route_class=route_class(sim.settings.transport), dependencies=[Depends(require_json)]
    )
    store = sim.store

    def respond(engine: Engine, job: Job, plan: Plan, entry: Entry) -> Response:
        if job.asked.background and not job.is_stream:
            return responses.in_background(engine, job, plan, entry, store)
        return GenerationResponse(
            engine, job, plan, entry, form=partial(responses.ResponsesAnswer, store=store)
        )

    @json_router.post("/v1/responses")
    async def create_response(request: Request, body: _Body) -> Response:
        make = partial(responses.job, store=store)
        return await sim.accept(request, body, responses.ResponsesRequest, make, respond)

    @router.get("/v1/responses/{response_id}")
    async def retrieve_response(request: Request, response_id: str, stream: bool = False) -> Response:
        await sim.journal.add(request)
        found = store.find(response_id)
        if not stream:
            return _json(found)
        if response_id not in store.events:
            raise Refused(f"Unknown response_id: {response_id}", param="response_id")
        return Response(b"".join(store.events[response_id]), media_type="text/event-stream")

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        await sim.journal.add(request)
        return _json(store.cancel(response_id))

    router.include_router(json_router)
    return router


def _events_info(published: Publishing) -> KvEventsInfo | None:
    return None if published.endpoint is None else KvEventsInfo(published.endpoint, published.replay)


def _plain_routes(sim: Sim) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        return ProbeResponse(sim.faults.draw("health"))

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> Response:
        return Response()

    @router.get("/v1/models")
    async def models() -> Response:
        card = _model_card(sim)
        own = [{"id": name, "root": name, "parent": card["id"]} for name in sim.settings.adapters]
        return _json({"object": "list", "data": [card, *(card | adapter for adapter in own)]})

    @router.post(audio.PATHS[0])
    @router.post(audio.PATHS[1])
    async def hear(request: Request) -> Response:
        return await audio.heard(request, sim.settings.model_name)

    @router.get("/version")
    async def version() -> Response:
        return _json({"version": frames.VERSION})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(sim.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    @router.get("/baton/info")
    async def info() -> Response:
        if sim.settings.announced.is_plain:
            return _json_error(HTTPStatus.NOT_FOUND)
        return _encoded(msgspec.json.encode(sim.info()))

    if sim.settings.announced.is_plain:
        return router

    @router.get(READY_PATH)
    async def ready(request: Request) -> Response:
        sender = Sender.of(request.headers.raw)
        sim.meter.note_asked(sender)
        report = sim.meter.report(sender)
        status = HTTPStatus.SERVICE_UNAVAILABLE if report.is_draining else HTTPStatus.OK
        return ProbeResponse(sim.faults.draw("health"), msgspec.json.encode(report), status)

    @router.post(DRAIN_PATH)
    async def drain(request: Request) -> Response:
        sim.meter.drain()
        return reported(sim.meter, Sender.of(request.headers.raw), HTTPStatus.ACCEPTED)

    @router.post(UNDRAIN_PATH)
    async def undrain(request: Request) -> Response:
        sim.meter.undrain()
        return reported(sim.meter, Sender.of(request.headers.raw), HTTPStatus.ACCEPTED)

    @router.post(END_PATH)
    async def end(request: Request) -> Response:
        asked = await _asked_for(request)
        for engine in sim.engines:
            engine.under_way.get(asked, _nothing)()
        return Response(status_code=202)

    @router.post(BEGUN_PATH)
    async def begun(request: Request) -> Response:
        asked = await _asked_for(request)
        return _json({"begun": any(asked in engine.begun for engine in sim.engines)})

    return router


async def _asked_for(request: Request) -> str:
    """Return the id of the request that is meant. Raises `Refused`."""
    try:
        return msgspec.json.decode(await request.body(), type=EndRequest).request_id
    except msgspec.MsgspecError as error:
        raise Refused(str(error)) from error


def _nothing() -> None:
    """Do nothing at the end of an unknown request."""


def _control_routes(sim: Sim) -> APIRouter:
    router = APIRouter(prefix="/sim")

    @router.get("/faults")
    async def show_faults() -> Response:
        return _json(sim.faults.describe())

    @router.post("/faults")
    async def add_faults(request: Request) -> Response:
        try:
            found = faults.parse(await request.body())
        except msgspec.MsgspecError as error:
            raise Refused(str(error)) from error
        refusals = [fault for fault in found if isinstance(fault, faults.Refuse)]
        sim.commit(found)
        if refusals:
            _refuse(request, refusals[-1].seconds)
        return _json(sim.faults.describe())

    @router.delete("/faults")
    async def clear_faults() -> Response:
        sim.faults.clear()
        for engine in sim.engines:
            engine.pulse.go_on()
        return _json([])

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        return _json({"success": all(engine.reset_prefix_cache() for engine in sim.engines)})

    @router.get("/ledger")
    async def ledger() -> Response:
        return _json(sim.ledger(asyncio.get_running_loop().time()))

    @router.get("/requests")
    async def requests() -> Response:
        # Recorded bodies hold what orjson refuses: integers of any size, lone surrogates.
        return _encoded(json.dumps(sim.journal.recorded(), default=repr).encode())

    return router


def _refuse(request: Request, seconds: float) -> None:
    refuse = getattr(request.app.state, REFUSE_KEY, None)
    if refuse is None:
        raise Refused("refuse needs a real listener: run the app with worker.sim.server")
    refuse(seconds, spared=request.scope["state"][TRANSPORT_KEY])


def _model_card(sim: Sim) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{sim.engine.engine_id[:8]}",
        "object": "model_permission",
        "created": sim.started,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": sim.settings.model_name,
        "object": "model",
        "created": sim.started,
        "owned_by": "baton-sim",
        "root": sim.settings.model_name,
        "parent": None,
        "max_model_len": sim.settings.context_tokens,
        "permission": [permission],
    }


def _json_error(status: HTTPStatus) -> Response:
    return _encoded(orjson.dumps({"detail": status.phrase}), status)


def _json(content: object) -> Response:
    return _encoded(orjson.dumps(content))


def _encoded(content: bytes, status: int = 200) -> Response:
    return Response(content, status, media_type="application/json")


def _refusal(refused: Refused) -> Response:
    return _encoded(_refusal_body(refused), refused.status)


def _refusal_body(refused: Refused) -> bytes:
    return frames.error_body(refused.message, refused.kind, refused.status, refused.param)


async def _answer_refused(request: Request, error: Refused) -> Response:
    return _refusal(error)


async def _answer_invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer that FastAPI could not make a document of the body; the words are vLLM's."""
    first = dict(error.errors()[0])
    place = ".".join(map(str, first.get("loc", ())))
    shown = {"type": first["type"], "loc": place, "msg": first["msg"]}
    return _refusal(Malformed(str(shown), param=place))


_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    Refused: _answer_refused,
    RequestValidationError: _answer_invalid,
}


class WrongClock:
    """The Date of all answers is that of a clock that is wrong by so much."""

    def __init__(self, app: ASGIApp, offset_s: float) -> None:
        self._app = app
        self._offset_s = offset_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = formatdate(time.time() + self._offset_s, usegmt=True).encode()
                message["headers"] = [*message.get("headers", ()), (b"date", date)]
            await send(message)

        await self._app(scope, receive, send_dated)


class Keys:
    """These keys are asked for; without any, none is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.change(keys)

    def change(self, keys: Iterable[str]) -> None:
        """Ask for other keys from now on."""
        self.digests = [sha256(key.encode()).digest() for key in keys]


class RequireKey:
    """It is vLLM's `--api-key`: everything under `/v1` needs one of the keys as a bearer token; so
    does what our plugin guards.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_guarded = self._keys.digests and scope["type"] == "http" and scope["path"].startswith(_GUARDED)
        if is_guarded and not self._has_key(scope):
            refusal = _encoded(b'{"error":"Unauthorized"}', HTTPStatus.UNAUTHORIZED)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = sha256(key).digest()
        return scheme.lower() == b"bearer" and any(
            hmac.compare_digest(digest, one) for one in self._keys.digests
        )
