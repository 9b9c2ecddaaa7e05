"""Simulated workers: vLLM's prefill/decode behaviour in the small, and what an injected fault makes of it.

A prefill leg pins blocks for a lease and answers where they are. A decode leg pulls them, which frees them,
also if its connection is dropped meanwhile; then it streams. After the lease it pulls what is there by then,
of another prompt, and answers from that as if all were well. A pull that fails is a 500, on a stream a 200
whose first event is the error. A leg whose connection is dropped before its engine has it is forgotten.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from orchestrator.transport.base import Origin
from orchestrator.transport.memory import MemoryReply, MemoryRequest, MemoryUpstream
from orchestrator.wire.info import BEGUN_PATH, END_PATH, Begun, EndRequest
from tests.simulation.language import answer_token, continuation, number_of, text_of, tokens_of
from tests.simulation.schedule import DEFAULT_COMPLETION_TOKENS, LegFault, PlannedFault, WorkerSpec
from tests.simulation.trace import Trace

MAX_MODEL_LEN = 4096

_JSON = {b"content-type": b"application/json"}
_SSE = {b"content-type": b"text/event-stream; charset=utf-8"}
_DONE = b"data: [DONE]\n\n"
_AT_ONCE = frozenset(
    {
        LegFault.REFUSE_400,
        LegFault.BUSY_429,
        LegFault.FAIL_500,
        LegFault.BUSY_503,
        LegFault.RESET,
        LegFault.HANG,
        LegFault.NOT_HTTP,
        LegFault.NOT_JSON,
    }
)
QUESTIONS = frozenset({END_PATH, BEGUN_PATH, "/metrics"})  # beside the legs
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True, eq=False)
class Handoff:
    """The blocks of one finished prefill, and what became of them."""

    name: str
    engine: Engine
    engine_id: str
    tokens: list[int]
    pinned: float
    is_told: bool = False  # the answer reached the orchestrator
    is_odd: bool = False  # the leg that made it had a fault
    pulls: int = 0
    is_stale: bool = False  # it was pulled after its lease

    @property
    def is_lost(self) -> bool:
        """The worker has been restarted since."""
        return self.engine.engine_id != self.engine_id


@dataclass(slots=True, eq=False)
class Leg:
    """One request to a worker, as the worker sees it."""

    engine: Engine
    kind: str  # prefill, decode, release, whole, tokenize
    number: int  # of the client's request
    handoff: Handoff | None  # that it was sent with
    began: float
    reply: MemoryReply
    id: str = ""  # its x-request-id
    task: asyncio.Task[None] | None = None  # while it can be ended
    is_asked_to_end: bool = False
    has_head: bool = False
    spoke: float | None = None  # began its answer, which a role is not
    ended: float | None = None
    is_refused_unread: bool = False  # answered so that the hand-off is still good
    fault: LegFault | None = None
    is_served: bool = False  # to its end
    seated: float | None = None  # when its turn came
    is_pulled: bool = False
    is_stale: bool = False  # what it says is of another prompt
    has_token: bool = False
    said: list[float] = field(default_factory=list)  # when pieces of its stream were sent

    @property
    def name(self) -> str:
        return f"{self.kind} of {self.number}"


@dataclass(slots=True)
class World:
    """What the workers of a cluster share. Everything in it is in the order in which it happened."""

    random: Random
    trace: Trace
    upstream: MemoryUpstream
    engines: dict[str, Engine] = field(default_factory=dict)
    legs: list[Leg] = field(default_factory=list)
    handoffs: dict[str, Handoff] = field(default_factory=dict)
    on_step: Callable[[int], None] = lambda number: None  # a leg of that request got on


class Engine:
    """One worker. `serve` is a handler of the in-memory transport."""

    def __init__(
        self, spec: WorkerSpec, origin: Origin, world: World, faults: Iterable[PlannedFault]
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.origin = origin
        self.engine_id = f"{spec.name}-0"
        self.is_up = True
        self.is_awake = asyncio.Event()
        self.gets_on = asyncio.Event()  # its engine; the server answers all the same
        self.slowness = 1.0
        self.troubled: list[tuple[float, float]] = []  # from, until
        self.pinned: dict[str, Handoff] = {}
        self._world = world
        self._loop = asyncio.get_running_loop()
        self._faults = deque(sorted(faults, key=lambda fault: fault.at))
        self._fault_after = 0
        self._sickness: LegFault | None = None
        self._seats = asyncio.Semaphore(spec.seats)
        self._restarts = 0
        self._open: list[Leg] = []
        self.is_awake.set()
        self.gets_on.set()
        world.engines[spec.name] = self
        world.upstream.serve(origin, self.serve)

    # --- trouble --------------------------------------------------------------------------------

    def crash(self, seconds: float) -> None:
        self.note_trouble("crashes", seconds)
        self.is_up = False
        self._restarts += 1
        self.engine_id = f"{self.name}-{self._restarts}"
        self.pinned.clear()
        self._world.upstream.refuse(self.origin)
        for leg in list(self._open):
            leg.reply.cut_short()
            self._end(leg, "lost in the crash")
        self._loop.call_later(seconds, self._come_back, self._restarts)

    def stop(self, seconds: float) -> None:
        self.note_trouble("stops", seconds)
        self.is_awake.clear()
        self._loop.call_later(seconds, self.is_awake.set)

    def freeze(self, seconds: float) -> None:
        self.note_trouble("freezes", seconds)
        self.gets_on.clear()
        self._loop.call_later(seconds, self.gets_on.set)

    def fall_sick(self, seconds: float) -> None:
        self.note_trouble("falls sick", seconds)
        self._sickness = self._world.random.choice((LegFault.FAIL_500, LegFault.BUSY_503))
        self._loop.call_later(seconds, self._recover)

    def slow_down(self, seconds: float) -> None:
        self.note_trouble("slows down", seconds)
        self.slowness = 20.0
        self._loop.call_later(seconds, self._speed_up)

    def _come_back(self, restarts: int) -> None:
        if restarts == self._restarts:
            self._say(f"comes back as {self.engine_id}")
            self.is_up = True
            self._world.upstream.serve(self.origin, self.serve)

    def _recover(self) -> None:
        self._sickness = None

    def _speed_up(self) -> None:
        self.slowness = 1.0

    def note_trouble(self, what: str, seconds: float) -> None:
        now = self._loop.time()
        self.troubled.append((now, now + seconds))
        self._say(f"{what} for {seconds:g} s")

    # --- legs -----------------------------------------------------------------------------------

    async def serve(self, request: MemoryRequest, reply: MemoryReply) -> None:
        if request.target in QUESTIONS:
            await self.is_awake.wait()
            await self._answer_question(request, reply)
            return
        document = read(request)
        tokens = prompt_of(document)
        leg = self._begin(kind_of(request.target, document), document, tokens, reply)
        headers = dict(request.headers)
        leg.id = (headers.get(b"x-baton-leg") or headers.get(b"x-request-id", b"")).decode()
        try:
            await self._serve(leg, request, document, tokens)
            leg.is_served = leg.fault is None and leg.ended is None and not leg.is_asked_to_end
        except asyncio.CancelledError:
            if not leg.is_asked_to_end or reply.is_over:
                self._end(leg, "dropped by the orchestrator")
                raise
            await self._answer_ended(leg)
        finally:
            self._end(leg, "over")

    async def _answer_question(self, request: MemoryRequest, reply: MemoryReply) -> None:
        if request.target == "/metrics":
            reply.answer(200, f'vllm:nixl_num_kv_expired_reqs_total{{engine="0"}} {self._expired()}'.encode())
            return
        if not self.spec.ends_legs:  # plain vLLM
            reply.answer(404, _encode(_error(404, "not found")), _JSON)
            return
        leg_id = msgspec.json.decode(request.body, type=EndRequest).request_id
        if request.target == BEGUN_PATH:
            has_begun = any(leg.id == leg_id and leg.has_token for leg in self._open)
            reply.answer(200, _encode(Begun(has_begun)), _JSON)
        else:
            reply.answer(202, b"")
            await self.gets_on.wait()
            self._end_legs(leg_id)

    def _expired(self) -> int:
        """How many leases have run out."""
        over = self._loop.time() - self.spec.lease_s
        mine = [each for each in self._world.handoffs.values() if each.engine is self]
        return sum(each.pinned <= over and (each.is_stale or not each.pulls) for each in mine)

    def _end_legs(self, leg_id: str) -> None:
        for leg in self._open:
            if leg.id == leg_id and leg.task is not None and not leg.is_asked_to_end:
                leg.is_asked_to_end = True
                leg.task.cancel()

    async def _answer_ended(self, leg: Leg) -> None:
        asyncio.current_task().uncancel()  # type: ignore[union-attr]
        if leg.has_head:
            await leg.reply.chunk(_DONE)
        else:
            leg.reply.answer(200, _encode({"choices": [{"finish_reason": "abort"}]}), _JSON)

    def _begin(self, kind: str, document: dict[str, Any], tokens: list[int], reply: MemoryReply) -> Leg:
        number, handoff = number_of(tokens), self._world.handoffs.get(handoff_name(document) or "")
        leg = Leg(self, kind, number, handoff, self._loop.time(), reply, fault=self._next_fault())
        self._world.legs.append(leg)
        self._open.append(leg)
        self._step(leg.number, f"gets {leg.name}" + (f", which meets {leg.fault.name}" if leg.fault else ""))
        return leg

    def _end(self, leg: Leg, how: str) -> None:
        if leg.ended is None:
            leg.ended = self._loop.time()
            self._open.remove(leg)
            self._step(leg.number, f"{leg.name} is {how}")

    def _next_fault(self) -> LegFault | None:
        if self._faults and self._faults[0].at <= self._loop.time():
            planned = self._faults.popleft()
            self._fault_after = planned.after
            return planned.fault
        return self._sickness

    async def _serve(
        self, leg: Leg, request: MemoryRequest, document: dict[str, Any], tokens: list[int]
    ) -> None:
        after = self._fault_after
        if self.spec.intake_s:
            await asyncio.sleep(self.spec.intake_s)
        if leg.fault is None:
            leg.task = asyncio.current_task()
        is_pulled = None if leg.fault in _AT_ONCE else self._start_pull(leg, document, tokens)
        await self.is_awake.wait()
        if leg.fault in _AT_ONCE:
            await self._fail(leg, leg.fault)
            return
        if leg.kind == "tokenize":
            leg.seated = self._loop.time()
            leg.reply.answer(200, _encode({"tokens": tokens, "max_model_len": MAX_MODEL_LEN}), _JSON)
            return
        async with self._seats:
            leg.seated = self._loop.time()
            if leg.kind == "prefill":
                await self._prefill(leg, request, document, tokens)
            else:
                await self._decode(leg, document, tokens, is_pulled, after)

    async def _fail(self, leg: Leg, fault: LegFault) -> None:
        reply = leg.reply
        if fault is LegFault.RESET:
            reply.cut_short()
        elif fault is LegFault.HANG:
            await reply.hang()
        elif fault is LegFault.NOT_HTTP:
            reply.garbage()
        elif fault is LegFault.NOT_JSON:
            reply.answer(200, b"<html>", {b"content-type": b"text/html"})
        else:
            leg.is_refused_unread = fault is not LegFault.FAIL_500 and not reply.is_over
            reply.answer(fault.value, _encode(_error(fault.value, fault.name)), _JSON)

    # --- prefill --------------------------------------------------------------------------------

    async def _prefill(
        self, leg: Leg, request: MemoryRequest, document: dict[str, Any], tokens: list[int]
    ) -> None:
        await self._work(self.spec.prefill_s)
        if leg.reply.is_over:
            return  # a prefill whose connection is gone keeps nothing
        handoff = self._pin(leg, tokens)
        handoff.is_odd = leg.fault is not None
        leg.task = None
        if self.spec.answer_delay_s:
            await asyncio.sleep(self.spec.answer_delay_s)
        if leg.fault is LegFault.LOSE_BLOCKS:
            self.pinned.pop(handoff.name, None)
        elif leg.fault is not None:
            leg.reply.cut_short()
            return
        handoff.is_told = not leg.reply.is_over
        answer: dict[str, Any] = {"choices": [{}], "kv_transfer_params": self._params(handoff)}
        if document.get("return_token_ids"):
            place = answer if "messages" in document else answer["choices"][0]
            place["prompt_token_ids"] = tokens
        leg.reply.answer(200, _encode(answer), _JSON)

    def _pin(self, leg: Leg, tokens: list[int]) -> Handoff:
        name = f"h{len(self._world.handoffs)}"
        handoff = Handoff(name, self, self.engine_id, tokens, self._loop.time())
        self._world.handoffs[name] = self.pinned[name] = handoff
        self._step(leg.number, f"pins {name} for {leg.number}")
        return handoff

    def _params(self, handoff: Handoff) -> dict[str, Any]:
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": handoff.engine_id,
            "remote_block_ids": [[1]],
            "remote_request_id": handoff.name,
            "remote_host": self.name,
            "remote_port": 5600,
            "remote_prefill_cached_tokens": 0,
        }

    # --- pulls ----------------------------------------------------------------------------------

    def _start_pull(
        self, leg: Leg, document: dict[str, Any], tokens: list[int]
    ) -> asyncio.Future[bool] | None:
        """Begins before anybody can drop the leg, and goes on when somebody does."""
        if leg.handoff is None:
            return None
        is_pulled: asyncio.Future[bool] = self._loop.create_future()
        self._pull_later(leg.handoff, document, tokens, self.engine_id, is_pulled)
        return is_pulled

    def _pull_later(
        self,
        handoff: Handoff,
        document: dict[str, Any],
        tokens: list[int],
        puller: str,
        is_pulled: asyncio.Future[bool],
    ) -> None:
        args = (handoff, document, tokens, puller, is_pulled)
        self._loop.call_later(self.spec.pull_s * self.slowness, self._pull, *args)

    def _pull(
        self,
        handoff: Handoff,
        document: dict[str, Any],
        tokens: list[int],
        puller: str,
        is_pulled: asyncio.Future[bool],
    ) -> None:
        if puller != self.engine_id:
            return  # this worker crashed meanwhile
        if not (self._pulls() and handoff.engine._pulls()):
            self._loop.call_later(0.05, self._pull, handoff, document, tokens, puller, is_pulled)
            return
        is_right = handoff.engine.take(handoff, document["kv_transfer_params"]["remote_engine_id"])
        self._step(tokens[0], f"pulls {handoff.name}" if is_right else f"cannot pull {handoff.name}")
        if not is_pulled.done():
            is_pulled.set_result(is_right and handoff.tokens == tokens)

    def take(self, handoff: Handoff, engine_id: str) -> bool:
        """Somebody pulls blocks: they are free then. False if they are not here (any more)."""
        handoff.pulls += 1
        is_known = engine_id == self.engine_id and self.pinned.pop(handoff.name, None) is not None
        handoff.is_stale = self._loop.time() >= handoff.pinned + self.spec.lease_s
        return self.is_up and is_known

    def _pulls(self) -> bool:
        return self.is_awake.is_set() and self.gets_on.is_set()

    # --- decode ---------------------------------------------------------------------------------

    async def _decode(
        self,
        leg: Leg,
        document: dict[str, Any],
        tokens: list[int],
        is_pulled: asyncio.Future[bool] | None,
        fault_after: int,
    ) -> None:
        if is_pulled is not None:
            leg.is_pulled = await is_pulled
            if not leg.is_pulled and not self.spec.recomputes:
                await self._fail_pull(leg, document)
                return
        await self.gets_on.wait()
        leg.has_token = True
        answer = _Answer(len(self._world.legs), document, tokens, len(tokens) if leg.is_pulled else 0)
        leg.is_stale = leg.is_pulled and leg.handoff is not None and leg.handoff.is_stale
        if leg.is_stale:
            answer.tokens = [answer_token(0, 0)] * len(answer.tokens)
        if document.get("stream"):
            await self._stream(leg, answer, fault_after)
        else:
            await self._answer_whole(leg, answer)

    async def _fail_pull(self, leg: Leg, document: dict[str, Any]) -> None:
        failed = _error(500, "KV load failed")
        if document.get("stream"):
            leg.reply.head(200, _SSE)
            leg.has_head = True
            await leg.reply.chunk(_event(failed))
            await leg.reply.chunk(_DONE)
        else:
            leg.reply.answer(500, _encode(failed), _JSON)

    async def _answer_whole(self, leg: Leg, answer: _Answer) -> None:
        await self._work(self.spec.token_s * len(answer.tokens))
        body = answer.whole()
        if leg.fault is None:
            leg.reply.answer(200, body, _JSON)
            return
        leg.reply.head(200, _JSON)
        await leg.reply.chunk(body[: len(body) // 2])
        if leg.fault is LegFault.HANG_MIDWAY:
            await leg.reply.hang()
        leg.reply.cut_short()

    async def _stream(self, leg: Leg, answer: _Answer, fault_after: int) -> None:
        leg.reply.head(200, _SSE)
        leg.has_head = True
        for count, event in enumerate(answer.events()):
            if leg.fault is not None and count >= fault_after:
                await self._break(leg)
                return
            await self._work(self.spec.token_s)
            if leg.reply.is_over:
                return
            if b'"role"' not in event:
                leg.spoke = leg.spoke or self._loop.time()
            await self._send(leg, event)
        if leg.fault is not None:
            await self._break(leg)
        else:
            await self._send(leg, _DONE)

    async def _send(self, leg: Leg, data: bytes) -> None:
        leg.said.append(self._loop.time())
        if self.spec.slices:
            at = self._world.random.randrange(len(data))
            await leg.reply.chunk(data[:at])
            data = data[at:]
        await leg.reply.chunk(data)

    async def _break(self, leg: Leg) -> None:
        """The leg's fault, in the middle of its stream."""
        if leg.fault is LegFault.HANG_MIDWAY:
            await leg.reply.hang()
        elif leg.fault is LegFault.RESET_MIDWAY:
            leg.reply.cut_short()
        elif leg.fault is LegFault.ERROR_MIDWAY:
            await leg.reply.chunk(_event(_error(500, "the engine failed")))
            await leg.reply.chunk(_DONE)

    async def _work(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self.slowness)
        await self.gets_on.wait()
        await self.is_awake.wait()

    def _step(self, number: int, what: str) -> None:
        self._say(what)
        self._world.on_step(number)

    def _say(self, what: str) -> None:
        self._world.trace.add(self.name, what)


class _Answer:
    """What a decode worker says to one document."""

    def __init__(
        self, document_id: int, document: dict[str, Any], prompt: list[int], cached_tokens: int
    ) -> None:
        said = continuation(prompt)
        self._is_chat = "messages" in document
        limit = document.get("max_tokens", None if self._is_chat else DEFAULT_COMPLETION_TOKENS)
        self.tokens = said if limit is None else said[:limit]
        self._finish = "stop" if limit is None or len(said) < limit else "length"
        self._has_usage = bool((document.get("stream_options") or {}).get("include_usage"))
        self._has_ids = bool(document.get("return_token_ids"))
        self._prompt = prompt
        self._id = f"cmpl-{document_id}"
        self._usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(self.tokens),
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def whole(self) -> bytes:
        text = "".join(map(text_of, self.tokens))
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return self._json([{"index": 0, **said, "finish_reason": self._finish}], usage=self._usage)

    def events(self) -> Iterable[bytes]:
        """All but [DONE]."""
        if self._is_chat:
            more = {"prompt_token_ids": self._prompt} if self._has_ids else {}
            yield _sse(self._json([{"index": 0, "delta": {"role": "assistant", "content": ""}}], **more))
        for index, token in enumerate(self.tokens):
            yield self._token(token, is_first=index == 0)
        last = {"delta": {}} if self._is_chat else {"text": ""}
        yield _sse(self._json([{"index": 0, **last, "finish_reason": self._finish}]))
        if self._has_usage:
            yield _sse(self._json([], usage=self._usage))

    def _token(self, token: int, *, is_first: bool) -> bytes:
        text = text_of(token)
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": text}} if self._is_chat else {"text": text}
        if self._has_ids:
            choice["token_ids"] = [token]
            if is_first and not self._is_chat:
                choice["prompt_token_ids"] = self._prompt
        return _sse(self._json([choice]))

    def _json(self, choices: list[Any], **more: Any) -> bytes:
        return _encode({"id": self._id, "created": 1, "model": "m", "choices": choices, **more})


# --- documents ----------------------------------------------------------------------------------


def read(request: MemoryRequest) -> dict[str, Any]:
    """A leg's document, as a worker decodes it."""
    is_packed = (b"x-msgpack", b"1") in request.headers
    document: dict[str, Any] = (msgspec.msgpack if is_packed else msgspec.json).decode(request.body)
    return document


def kind_of(target: str, document: dict[str, Any]) -> str:
    if target == "/tokenize":
        return "tokenize"
    params = document.get("kv_transfer_params") or {}
    if params.get("do_remote_decode"):
        return "prefill"
    if not params:
        return "whole"
    return "release" if document.get("ignore_eos") else "decode"


def handoff_name(document: dict[str, Any]) -> str | None:
    return (document.get("kv_transfer_params") or {}).get("remote_request_id")


def prompt_of(document: dict[str, Any]) -> list[int]:
    """A document's prompt, tokenised unless its ids go along."""
    packed = (document.get("kv_transfer_params") or {}).get("prompt_token_ids")
    if isinstance(packed, str):
        packed = base64.b64decode(packed)
    if isinstance(packed, bytes):
        return list(struct.unpack(f"<{len(packed) // 4}i", packed))
    if packed is not None:
        return list(packed)
    prompt = document.get("prompt")
    if isinstance(prompt, list):
        return prompt
    return tokens_of(prompt or "".join(message["content"] for message in document["messages"]))


def _error(code: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _event(document: Any) -> bytes:
    return _sse(_encode(document))


def _sse(data: bytes) -> bytes:
    return b"data: %b\n\n" % data
