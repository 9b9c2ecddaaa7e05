"""These checks ask each worker by itself: is it there, is it the right one, does its engine compute."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import get_args

import httpx
import msgspec

from launch.doctor.asking import Client, Patient, Unanswered, said_in
from launch.doctor.findings import Finding, fail, ok, warn
from launch.doctor.settings import judged_delay
from launch.doctor.software import judged_version
from launch.plan import Plan
from orchestrator.wire.compatibility import OTHER_ROLE_ADVICE, is_for
from orchestrator.wire.info import (
    DEFAULT_TRANSPORT,
    STREAMS_ENV,
    TRANSPORT_ENV,
    WORKER_KEY_ENV,
    Encoding,
    WorkerInfo,
)
from orchestrator.workers.troubles import FEWER_ENGINES, OTHER_MODEL, Trouble, answered, trouble_of

CLOCK_S = 1.0  # clocks may differ by so much
_FRONT_S = 10.0
_LOOKS, _LOOK_S = 11, 0.1  # a second and a little more
_NAME = 60  # characters of a model's name that are looked at
_LOGS = "the worker's own log says more"


async def examine(client: Client, patient: Patient) -> list[Finding]:
    """Ask a worker all that concerns it alone; what it says of itself is noted with it."""
    return [finding async for finding in _examine(client, patient)]


async def _examine(client: Client, patient: Patient) -> AsyncIterator[Finding]:
    try:
        async for finding in _introduced(client, patient):
            yield finding
        patient.divide()
        for part in patient.parts:
            if part.is_well:
                yield await _computes(client, part)
        for finding in await _clock(client, patient):
            yield finding
    except Unanswered as error:
        patient.is_well = False
        yield _troubled(patient, trouble_of(error), str(error))


async def _introduced(client: Client, patient: Patient) -> AsyncIterator[Finding]:
    health = await client.get(patient, "/health")
    if health.status_code != httpx.codes.OK:
        yield _troubled(patient, answered(health.status_code), f"/health answers {said_in(health)}")
        return
    yield ok("health", patient.name, f"answers at {patient.address.url}")
    yield await _known(client, patient)
    for finding in await _announced(client, patient):
        yield finding


def _troubled(patient: Patient, trouble: Trouble, details: str) -> Finding:
    return fail("health", patient.name, f"{trouble.what} ({details})", trouble.advice or _LOGS)


# --- its name and key -------------------------------------------------------------------------------


async def _known(client: Client, patient: Patient) -> Finding:
    """Check that the worker takes our key, and has the model."""
    answer = await client.get(patient, "/v1/models")
    if answer.status_code != httpx.codes.OK:
        trouble = answered(answer.status_code)
        return fail("key", patient.name, f"it {trouble.what}", trouble.advice)
    models = _models(answer)
    patient.models = tuple(models)
    if patient.address.served_model not in models:
        names = ", ".join(map(repr, [*models][:5])) or "nothing"
        return fail(
            "model", patient.name, f"serves {names}, not {patient.address.served_model!r}", OTHER_MODEL.advice
        )
    patient.is_well, patient.max_model_len = True, models[patient.address.served_model]
    return await _guarded(client, patient)


def _models(answer: httpx.Response) -> dict[str, int | None]:
    """Return the context length of each model in a list; nothing if it is none."""
    try:
        cards = answer.json()["data"]
        return {str(card["id"])[:_NAME]: card.get("max_model_len") for card in cards}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


async def _guarded(client: Client, patient: Patient) -> Finding:
    """Check that a worker asks for the key if there is one."""
    if client.key is None:
        return ok("key", patient.name, "takes requests without a key, and none is set")
    answer = await client.get(patient, "/v1/models", with_key=False)
    if answer.status_code != httpx.codes.OK:
        return ok("key", patient.name, "takes our key, and nobody without it")
    return fail(
        "key",
        patient.name,
        f"takes requests without a key, though {WORKER_KEY_ENV} is set here",
        "start it with the same key (--api-key or VLLM_API_KEY), so that nobody goes past the orchestrator",
    )


# --- what it says of itself -------------------------------------------------------------------------


async def _announced(client: Client, patient: Patient) -> list[Finding]:
    answer = await client.get(patient, "/baton/info")
    if answer.status_code != httpx.codes.OK:
        return [_plain(patient, f"announces nothing ({answer.status_code} at /baton/info)")]
    try:
        info = patient.info = msgspec.json.decode(answer.content, type=WorkerInfo)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return [_plain(patient, f"announces what cannot be read: {error}")]
    return [*of_info(patient, info)]


def _plain(patient: Patient, found: str) -> Finding:
    return warn(
        "announces",
        patient.name,
        f"{found}: it is taken for plain vLLM, gets plain JSON, and what it would have to fit is not known",
        "install Baton beside its vLLM and start it with VLLM_PLUGINS=baton, or leave it so",
    )


def of_info(patient: Patient, info: WorkerInfo) -> Iterator[Finding]:
    """Yield what follows from a worker's announcement alone."""
    facts = {"dtype": info.dtype, "block_size": info.block_size, "tp": info.tp, "revision": info.revision}
    said = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    yield ok("announces", patient.name, f"{info.engine} {info.engine_version}, {said}")
    yield from _role(patient, info)
    yield from _named(patient, info)
    yield from _ranks(patient, info)
    yield from _transport(patient, info)
    yield from _streams(patient, info)
    if info.engine == "vllm":
        yield judged_version(patient.name, info.engine_version)
    if info.nixl_delay_us is not None and patient.address.role != "both":
        yield judged_delay(patient.name, info.nixl_delay_us)


def _role(patient: Patient, info: WorkerInfo) -> Iterator[Finding]:
    role = patient.address.role
    if not is_for(info, role):
        found = f"was started as a {info.role} worker, and the config has it as one for {role}"
        yield fail("role", patient.name, found, OTHER_ROLE_ADVICE.format(role=role))


def _named(patient: Patient, info: WorkerInfo) -> Iterator[Finding]:
    if patient.models and info.model[:_NAME] not in patient.models:
        found = f"announces {info.model[:_NAME]!r}, which it does not list"
        yield fail("model", patient.name, found, OTHER_MODEL.advice)


def _ranks(patient: Patient, info: WorkerInfo) -> Iterator[Finding]:
    if info.data_parallel_size is not None and info.data_parallel_size < patient.size:
        found = f"has {info.data_parallel_size} data-parallel engines, and {patient.size} by the config"
        yield fail("ranks", patient.name, found, FEWER_ENGINES.advice)


def _transport(patient: Patient, info: WorkerInfo) -> Iterator[Finding]:
    wanted = os.environ.get(TRANSPORT_ENV) or DEFAULT_TRANSPORT
    if wanted in get_args(Encoding) and wanted not in info.decodes:  # another value was told before
        found = f"does not decode {wanted!r} and is sent plain JSON"
        yield warn("transport", patient.name, found, f"set {TRANSPORT_ENV} the same on both sides")


def _streams(patient: Patient, info: WorkerInfo) -> Iterator[Finding]:
    if os.environ.get(STREAMS_ENV) == "mux" and "mux" not in info.streams:
        found = "announces no shared connection and gets each request on one of its own"
        yield warn("transport", patient.name, found, f"set {STREAMS_ENV} the same on both sides")


# --- its engine and its clock -----------------------------------------------------------------------


async def _computes(client: Client, patient: Patient) -> Finding:
    """Have one token made: a server can be well while its engine is not."""
    model = patient.address.served_model
    document = {"model": model, "prompt": "Is anybody there?", "max_tokens": 1, "temperature": 0}
    try:
        answer = await client.post(patient, "/v1/completions", document)
        if patient.address.role == "both" and answer.status_code in (400, 404):
            answer = await client.post(
                patient, "/v1/embeddings", {"model": model, "input": "Is anybody there?"}
            )
    except Unanswered as error:
        return _stands_still(client, patient, error)
    if answer.status_code != httpx.codes.OK:
        patient.is_well = False
        return fail("answer", patient.name, f"answers a small request with {said_in(answer)}", _LOGS)
    return ok("answer", patient.name, "computes one token")


def _stands_still(client: Client, patient: Patient, error: Unanswered) -> Finding:
    patient.is_well = False
    if isinstance(error.__cause__, httpx.TimeoutException):
        found = f"answers probes, but not a small request within {client.timeout_s:g} s"
        return fail(
            "answer", patient.name, found, f"its engine stands still or is overloaded: {_LOGS}; restart it"
        )
    return fail(
        "answer", patient.name, f"lost a small request ({error})", f"its engine may have died: {_LOGS}"
    )


async def _clock(client: Client, patient: Patient) -> list[Finding]:
    """Compare clocks over the time in which a server's Date changes, which tells more than one moment."""
    offset = patient.offset
    if not offset.is_known:
        return []
    for _ in range(_LOOKS):
        await client.get(patient, "/health")
        await asyncio.sleep(_LOOK_S)
    return [_judged_clock(patient, offset.surely_s)]


def _judged_clock(patient: Patient, seconds: float) -> Finding:
    if abs(seconds) <= CLOCK_S:
        return ok("clock", patient.name, "agrees with the one here")
    found = (
        f"its clock is at least {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the one here"
    )
    return fail(
        "clock", patient.name, found, "let both machines follow a time server (timedatectl set-ntp true)"
    )


async def check_front(plan: Plan) -> Finding:
    """Ask an orchestrator that runs whether it can serve its models."""
    name, url = plan.orchestrator.name, f"{plan.url}/ready"
    try:
        async with httpx.AsyncClient(timeout=_FRONT_S, trust_env=False, verify=False) as http:  # noqa: S501  # our own
            answer = await http.get(url)
    except httpx.HTTPError as error:
        return fail("ready", name, f"does not answer {url} ({type(error).__name__})", "its log says more")
    if answer.status_code != httpx.codes.OK:
        return fail(
            "ready", name, f"cannot serve every model: {answer.text.strip()[:300]}", "mend the workers first"
        )
    return ok("ready", name, "can serve every model")


async def examine_all(client: Client, patients: list[Patient], at_once: int) -> list[Finding]:
    """Examine several workers, some of them at the same time; findings come in the workers' order."""
    seats = asyncio.Semaphore(at_once)

    async def seated(patient: Patient) -> list[Finding]:
        async with seats:
            return await examine(client, patient)

    return [finding for found in await asyncio.gather(*map(seated, patients)) for finding in found]
