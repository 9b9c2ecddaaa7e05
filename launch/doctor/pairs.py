"""These checks have real requests served by pairs: a hand-off of one token, then answers that must be equal.

Each request has a salt of its own, so that nothing is found in a prefix cache: the KV cache of a prompt that
a decode worker answers was handed over, or else computed again, which its usage shows.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from launch.doctor.asking import Client, Patient, Unanswered, said_in
from launch.doctor.findings import Finding, fail, ok, warn
from orchestrator.config.addresses import is_loopback
from orchestrator.legs.connectors.base import Connector, Handoff, InvalidHandoff

_PROMPTS = (
    "A prefill worker reads the whole prompt at once and keeps what it has computed for each token of it. "
    "A decode worker takes that over and",
    "The first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19, 23 and 29. The next ones are",
    "Once upon a time there was a baton that was handed from one runner to the next. One day",
)
_TOKENS = 8
_CONNECT_S = 3.0
_PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one prompt: its token ids if the worker tells them, else its text."""

    said: object
    text: str
    prompt_tokens: int | None
    cached_tokens: int | None


class HandoffFailed(Exception):
    """A pair could not answer; the message has the pair as its subject."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.advice = advice


class Pairs:
    """It tries the pairs of one model; what one worker answers alone is asked once for each prompt."""

    def __init__(self, client: Client, connector: Connector) -> None:
        self._client = client
        self._connector = connector
        self._alone: dict[tuple[str, str], Answer] = {}

    async def check(self, prefill: Patient, decode: Patient) -> list[Finding]:
        return [finding async for finding in self._check(prefill, decode)]

    async def _check(self, prefill: Patient, decode: Patient) -> AsyncIterator[Finding]:
        name = f"{prefill.name} -> {decode.name}"
        try:
            first = await self._together(prefill, decode, _PROMPTS[0], tokens=1)
            yield _transferred(name, decode, first)
            yield await self._compare(name, prefill, decode)
        except HandoffFailed as error:
            yield fail("handoff", name, str(error), error.advice)

    # --- both legs ------------------------------------------------------------------------------

    async def _together(self, prefill: Patient, decode: Patient, prompt: str, tokens: int) -> Answer:
        """Have a prompt answered by the pair. Raises `HandoffFailed`."""
        salt = uuid.uuid4().hex
        handoff = await self._prefill(prefill, _document(prefill, prompt, 1, salt))
        document = _document(decode, prompt, tokens, salt)
        document["kv_transfer_params"] = msgspec.Raw(handoff.params)
        try:
            answer = await self._client.post(decode, _PATH, document)
        except Unanswered as error:
            raise await self._undelivered(prefill, decode, handoff, str(error)) from error
        if answer.status_code != httpx.codes.OK:
            raise await self._undelivered(prefill, decode, handoff, said_in(answer))
        return _answer(answer)

    async def _prefill(self, worker: Patient, document: dict[str, Any]) -> Handoff:
        params = self._connector.prefill_params(uuid.uuid4().hex)
        document["kv_transfer_params"] = msgspec.Raw(params)
        try:
            answer = await self._client.post(worker, _PATH, document)
        except Unanswered as error:
            raise HandoffFailed(f"{worker.name} did not answer its leg ({error})", _LOG) from error
        if answer.status_code != httpx.codes.OK:
            raise HandoffFailed(f"{worker.name} answered its leg with {said_in(answer)}", _LOG)
        try:
            return self._connector.read(answer.content, is_packed=False, has_ids=False)
        except InvalidHandoff as error:
            advice = "start it with --kv-transfer-config, as `baton plan` shows it"
            raise HandoffFailed(f"{error} ({worker.name})", advice) from error

    async def _undelivered(
        self, prefill: Patient, decode: Patient, handoff: Handoff, said: str
    ) -> HandoffFailed:
        """Return why a decode worker did not get what a prefill worker keeps for it."""
        host, port = _side_channel(handoff)
        where = f"the side channel of {prefill.name}, {host}:{port},"
        if (
            host is not None
            and port is not None
            and is_loopback(host)
            and not is_loopback(decode.address.host)
        ):
            found = f"{where} is on loopback, where {decode.name} at {decode.address.host} cannot reach it"
            return HandoffFailed(found, _SIDE_CHANNEL)
        problem = None if host is None or port is None else await _connect_problem(host, port)
        if problem is not None:
            return HandoffFailed(f"{where} cannot be reached: {problem}", _SIDE_CHANNEL)
        found = f"{decode.name} did not take the KV cache over: {said}"
        return HandoffFailed(found, f"can its host reach {host}:{port}? {_LOG}, and that of {prefill.name}")

    # --- alone ----------------------------------------------------------------------------------

    async def _compare(self, name: str, prefill: Patient, decode: Patient) -> Finding:
        """Compare what the pair answers, greedily, with what its decode worker answers alone."""
        wrong: list[str] = []
        for prompt in _PROMPTS:
            together = await self._together(prefill, decode, prompt, _TOKENS)
            alone = await self._answer_alone(decode, prompt)
            if together.said != alone.said:
                wrong.append(_both(together, alone))
        if not wrong:
            return ok("equal", name, f"answers {len(_PROMPTS)} prompts as {decode.name} does alone")
        return await self._unequal(name, prefill, decode, wrong)

    async def _unequal(self, name: str, prefill: Patient, decode: Patient, wrong: Sequence[str]) -> Finding:
        found = (
            f"{len(wrong)} of {len(_PROMPTS)} answers differ from those of {decode.name} alone ({wrong[0]})"
        )
        of_prefill = [(await self._answer_alone(prefill, prompt)).said for prompt in _PROMPTS]
        of_decode = [(await self._answer_alone(decode, prompt)).said for prompt in _PROMPTS]
        if of_prefill != of_decode:
            advice = (
                f"{prefill.name} alone answers otherwise, too: do both load the same weights, in one dtype?"
            )
            return fail("equal", name, found, advice)
        if len(wrong) == 1:
            return warn(
                "equal", name, found, "one may be rounding; run it again, and compare answers of your own"
            )
        advice = "alone both answer the same: the KV cache is spoilt on its way; are the KV layouts equal?"
        return fail("equal", name, found, advice)

    async def _answer_alone(self, worker: Patient, prompt: str) -> Answer:
        """Return what one worker answers to a prompt. Raises `HandoffFailed`."""
        key = (worker.name, prompt)
        if key not in self._alone:
            self._alone[key] = await self._ask_alone(worker, prompt)
        return self._alone[key]

    async def _ask_alone(self, worker: Patient, prompt: str) -> Answer:
        document = _document(worker, prompt, _TOKENS, uuid.uuid4().hex)
        try:
            answer = await self._client.post(worker, _PATH, document)
        except Unanswered as error:
            raise HandoffFailed(f"{worker.name} alone did not answer ({error})", _LOG) from error
        if answer.status_code != httpx.codes.OK:
            raise HandoffFailed(f"{worker.name} alone answered {said_in(answer)}", _LOG)
        return _answer(answer)


_LOG = "the worker's own log says more"
_SIDE_CHANNEL = (
    "let VLLM_NIXL_SIDE_CHANNEL_HOST be an address of the prefill worker that the decode worker reaches, and "
    "open VLLM_NIXL_SIDE_CHANNEL_PORT (workers: [{host: ..., side_channel_port: ...}]) between them"
)


def _document(worker: Patient, prompt: str, tokens: int, salt: str) -> dict[str, Any]:
    return {
        "model": worker.address.served_model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "seed": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt,
    }


def _answer(answer: httpx.Response) -> Answer:
    """Read an answer. Raises `HandoffFailed` if it is none."""
    try:
        document = answer.json()
        choice, usage = document["choices"][0], document.get("usage") or {}
        text, ids = str(choice["text"]), choice.get("token_ids")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(text if ids is None else ids, text, usage.get("prompt_tokens"), cached)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HandoffFailed(f"an answer cannot be read ({type(error).__name__})", _LOG) from error


def _both(together: Answer, alone: Answer) -> str:
    return f"{together.text[:40]!r} and {alone.text[:40]!r}"


def _transferred(name: str, decode: Patient, answer: Answer) -> Finding:
    prompt, cached = answer.prompt_tokens, answer.cached_tokens
    if prompt is None or cached is None:
        advice = f"start {decode.name} with --enable-prompt-tokens-details, which shows it"
        return warn("handoff", name, "answered; whether the KV cache arrived is not known", advice)
    if cached < prompt:
        advice = (
            f"its KV cache did not arrive: {_LOG}; set kv_load_failure_policy to fail, so that it is an error"
        )
        return warn(
            "handoff", name, f"answered, but {prompt - cached} of {prompt} tokens were read again", advice
        )
    return ok("handoff", name, f"the KV cache of {prompt} tokens arrived, and one token was made of it")


def _side_channel(handoff: Handoff) -> tuple[str | None, int | None]:
    """Return where a hand-off says that the KV cache is to be asked for, if it does."""
    try:
        params: Mapping[str, Any] = msgspec.json.decode(handoff.params, type=dict[str, Any])
        return str(params["remote_host"]), int(params["remote_port"])
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return None, None


async def _connect_problem(host: str, port: int) -> str | None:
    """Return why nobody can be connected to there; None if somebody can."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"no answer within {_CONNECT_S:g} s"
    except (OSError, OverflowError, UnicodeError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)
    writer.close()
    return None
