"""Requests to one endpoint, over the connections of the project's own pool."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Sequence

from launch.bench.endpoint import Endpoint
from launch.bench.sample import Sample
from launch.bench.stream import TokenClock, error_text
from orchestrator.errors import WorkerCutShort, WorkerError, WorkerGarbage, WorkerUnreachable
from orchestrator.transport.base import Answer, Part, Upstream, request
from orchestrator.wire.headers import Fields, header_block
from orchestrator.wire.judge import InvalidStream

_MAX_ANSWER = 16 * 1024 * 1024  # of one that is no stream
_LISTING_S = 10.0  # for what takes no model

# The transport's errors speak of workers; here the other side is the endpoint.
_KINDS: dict[type[WorkerError], tuple[str, str]] = {
    WorkerUnreachable: ("no connection", "no connection"),
    WorkerCutShort: ("cut short", "the connection ended before the answer did"),
    WorkerGarbage: ("not HTTP", "the answer is not HTTP"),
}


class Client:
    """Sends requests of one run or more; `timeout_s` is for each of them as a whole."""

    def __init__(
        self,
        upstream: Upstream,
        endpoint: Endpoint,
        headers: Fields,
        timeout_s: float,
    ) -> None:
        self.upstream = upstream
        self.endpoint = endpoint
        self._headers = header_block([*headers, (b"content-type", b"application/json")])
        self._timeout_s = timeout_s

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises `WorkerError`, `TimeoutError`."""
        endpoint = self.endpoint
        async with asyncio.timeout(min(_LISTING_S, self._timeout_s)):
            path = endpoint.base + path
            answer = await request(self.upstream, endpoint.origin, "GET", path, self._headers, [])
            try:
                return answer.status, await answer.read(_MAX_ANSWER)
            finally:
                answer.abort()

    async def ask(self, body: Sequence[Part], due: float | None = None) -> Sample:
        """One streamed chat completion, from its schedule to its end; every failure is in the sample."""
        sent = time.perf_counter()
        sample = Sample(due=sent if due is None else due, sent=sent)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(body, sample)
        except TimeoutError:
            sample.fail("timeout", f"no complete answer within {self._timeout_s:g} s")
        except InvalidStream as error:
            sample.fail("broken stream", str(error))
        except WorkerError as error:
            sample.fail(*explain(error))
        sample.ended = time.perf_counter()
        return sample

    async def _stream(self, body: Sequence[Part], sample: Sample) -> None:
        endpoint = self.endpoint
        path = endpoint.base + "/chat/completions"
        answer = await request(self.upstream, endpoint.origin, "POST", path, self._headers, body)
        try:
            await _receive(answer, sample)
        finally:
            answer.abort()


async def _receive(answer: Answer, sample: Sample) -> None:
    _note_headers(answer, sample)
    if answer.status != 200:
        sample.fail(f"http {answer.status}", error_text(await answer.read(_MAX_ANSWER)))
    elif not answer.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        sample.fail("not a stream", "the answer to a streaming request is not a stream of events")
    else:
        clock = TokenClock(sample)
        await answer.pump(clock)
        clock.finish()


def explain(error: WorkerError) -> tuple[str, str]:
    """Kind and text of a transport's error."""
    kind, text = _KINDS.get(type(error), ("failed", str(error)))
    cause = error.__cause__
    return kind, f"{text}: {_cause(cause)}" if cause is not None else text


def _cause(cause: BaseException) -> str:
    """Without the numbers that event loops put before it."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {cause.verify_message} (--cacert FILE names who signed it)"
    if isinstance(cause, TimeoutError):
        return "timed out"
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)


def _note_headers(answer: Answer, sample: Sample) -> None:
    path = answer.headers.get(b"x-baton-path")
    sample.path = None if path is None else path.decode("latin-1")
    sample.stages = stages_of(answer.headers.get(b"server-timing", b"").decode("latin-1"))


def stages_of(timing: str) -> dict[str, float]:
    """Milliseconds by name, from a `server-timing` header; what has no duration is left out."""
    stages = {}
    for metric in timing.split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key == "dur" and (duration := _number(value)) is not None:
                stages[name] = duration
    return stages


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
