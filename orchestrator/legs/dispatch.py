"""The dispatcher sends what legs are made of, and asks workers what is to be asked beside the legs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from orchestrator.errors import (
    HandoffLate,
    HandoffStalled,
    OutOfResources,
    PathMissing,
    WorkerAnswered,
    WorkerError,
    WorkerGarbage,
    WorkerUnfit,
    WorkerUnreachable,
)
from orchestrator.http.ids import IdSource
from orchestrator.loop.offload import Offload
from orchestrator.telemetry.counters import FallbackReason, HandoffTrouble, Telemetry
from orchestrator.transport.base import Answer, Upstream
from orchestrator.wire.codec import CODECS, FORM, JSON, NotEncodable, TooLarge, transcoded
from orchestrator.wire.headers import header_block
from orchestrator.wire.info import BEGUN_PATH, Begun, end_body
from orchestrator.wire.info import END_PATH as END
from orchestrator.wire.load import SENDER_HEADER
from orchestrator.wire.refusals import Whose, error_body, is_encoded, retry_after, whose
from orchestrator.workers.registry import Registry
from orchestrator.workers.troubles import trouble_of
from orchestrator.workers.worker import Worker

_MAX_END_ANSWER_BYTES: Final = 64 * 1024  # it has none, an error page may
_MAX_METRICS_BYTES: Final = 4 * 1024 * 1024
_METRICS: Final = "/metrics"
_EXPIRED: Final = b"vllm:nixl_num_kv_expired_reqs_total"  # of a prefill worker: leases that ran out
_begun: Final = msgspec.json.Decoder(Begun)

# A body is relayed as it comes, so it must come as it is.
_IDENTITY: Final = (b"accept-encoding", b"identity")

_log: Final = logging.getLogger("baton.dispatch")


class Dispatcher:
    """All legs of a process are sent with this."""

    def __init__(
        self,
        registry: Registry,
        upstream: Upstream,
        offload: Offload,
        telemetry: Telemetry,
        ids: IdSource,
        credential: str | None,
        time: Callable[[], float],
        sender: str = "",
    ) -> None:
        """`credential` is what workers want as bearer token. `sender` names this orchestrator to them.
        `upstream` and `offload` stay the caller's.
        """
        self.registry = registry
        self.ids = ids
        self.time = time
        self.sender = sender
        self.upstream = upstream
        self._offload = offload
        self._telemetry = telemetry
        name = [(SENDER_HEADER.lower().encode(), sender.encode())] if sender else []
        authorization = [(b"authorization", f"Bearer {credential}".encode())] if credential else []
        # Of a leg, by the name of its codec, as header blocks; the second ones are without the credential.
        self.headers: Final = _blocks([*name, *authorization])
        self.bare_headers: Final = _blocks(name)

    def head(self, worker: Worker, codec: str) -> bytes:
        """Return what the heads of all legs to a worker have in this codec, as a header block."""
        return self.headers[codec] if worker.gets_credential else self.bare_headers[codec]

    def ask(self, worker: Worker, path: str, body: bytes) -> Coroutine[Any, Any, Answer]:
        """Send a worker a question beside the legs, as JSON. It raises as `Upstream.send` does."""
        return self.upstream.send(worker.origin, "POST", path, self.head(worker, JSON.name), [body])

    async def end_leg(self, worker: Worker, id: str) -> bool:
        """Ask a worker to end the leg of this name, and to answer it all the same; False if it cannot."""
        if not worker.abilities.can_end(worker.epoch):
            return False
        try:
            await self._ask_to_end(worker, id)
        except (WorkerAnswered, WorkerUnfit):  # 404: plain vLLM, or something else
            worker.abilities.unendable_epoch = worker.epoch
            return False
        except (WorkerError, OutOfResources):
            return False
        return True

    async def has_begun(self, worker: Worker, id: str) -> bool | None:
        """Ask a worker whether its engine has made the first token of the leg of this name; return None if
        it cannot tell.
        """
        try:
            answer = await self.ask(worker, BEGUN_PATH, end_body(id))
            content = await self._answer_of(answer, BEGUN_PATH, _MAX_END_ANSWER_BYTES)
            return _begun.decode(content).begun
        except (WorkerError, WorkerAnswered, OutOfResources, msgspec.MsgspecError):
            return None

    async def expired_leases(self, worker: Worker) -> float | None:
        """Ask a prefill worker how many of its leases have run out; return None if it does not say."""
        try:
            sent = self.upstream.send(worker.origin, "GET", _METRICS, self.head(worker, JSON.name), [])
            return _total(await self._answer_of(await sent, _METRICS, _MAX_METRICS_BYTES))
        except (WorkerError, WorkerAnswered, OutOfResources):
            return None

    async def _answer_of(self, answer: Answer, path: str, limit: int) -> bytes:
        try:
            content = await answer.read(limit)
        finally:
            answer.abort()
        if answer.status != 200:
            raise refusal(answer, content, path)
        return content

    async def _ask_to_end(self, worker: Worker, id: str) -> None:
        answer = await self.ask(worker, END, end_body(id))
        try:
            content = await answer.read(_MAX_END_ANSWER_BYTES)
        finally:
            answer.abort()
        if answer.status != 202:
            raise refusal(answer, content, END)

    async def transcode(self, document: bytes) -> bytes | None:
        """Make msgpack of a large document, in another process; return None if msgpack cannot carry it, which
        is counted.
        """
        is_encodable, common = await self._offload.run(transcoded, document)
        if is_encodable:
            return common
        self._telemetry.transport_fallback(FallbackReason.NOT_ENCODABLE)
        return None

    def note_not_encodable(self, error: NotEncodable) -> None:
        """Count a leg that goes as JSON though its worker takes more."""
        is_too_large = isinstance(error, TooLarge)
        self._telemetry.transport_fallback(
            FallbackReason.TOO_LARGE if is_too_large else FallbackReason.NOT_ENCODABLE
        )

    def note_refused_form(self, worker: Worker) -> None:
        """Note that a worker took as plain JSON what it had refused in a form that it announced."""
        self._telemetry.transport_fallback(FallbackReason.REFUSED)
        worker.distrust()
        _log.warning("%s refused what it announced: it gets plain JSON from now on", worker.name)

    def note_given_up(self, worker: Worker, epoch: int, error: HandoffLate | HandoffStalled) -> None:
        """Count a hand-off that a worker had for too long, and tell the registry."""
        is_late = isinstance(error, HandoffLate)
        self._telemetry.handoff_given_up(HandoffTrouble.LATE if is_late else HandoffTrouble.STALLED)
        self.registry.judge.note_stalled(worker, epoch, error.message)

    def note_unreachable(self, worker: Worker, error: WorkerUnreachable) -> None:
        """Tell the registry that a connection could not be made: refused is certain, too slow a suspicion."""
        cause = cause_of(error)
        why = repr(cause)
        if isinstance(cause, TimeoutError):
            self.registry.judge.note_lost(worker, worker.epoch, why)
        else:
            self.registry.judge.mark_gone(worker, why, trouble_of(cause).what)


def _blocks(more: list[tuple[bytes, bytes]]) -> dict[str, bytes]:
    return {
        codec.name: header_block([*codec.headers, _IDENTITY, *more]) for codec in (*CODECS.values(), FORM)
    }


def _total(metrics: bytes) -> float | None:
    """Return the sum over all engines of a worker, from its metrics page; None if it has none of them."""
    found = [line.rpartition(b" ")[2] for line in metrics.split(b"\n") if line.startswith(_EXPIRED)]
    try:
        return sum(map(float, found)) if found else None
    except ValueError:
        return None


def cause_of(error: BaseException) -> BaseException:
    """Return what an error was raised from, or itself. Of compiled code only the context tells that."""
    return error.__cause__ or error.__context__ or error


def refusal(answer: Answer, content: bytes, path: str) -> WorkerAnswered | WorkerUnfit:
    """Return what is to be raised for a whole answer to `path` whose status is not 200."""
    status, headers = answer.status, answer.headers
    readable = b"" if is_encoded(headers.get(b"content-encoding")) else content
    about = whose(status, readable, path)
    if about is Whose.PATH:
        return PathMissing(status, path)
    if about is Whose.WORKER:
        return WorkerUnfit(status)
    return WorkerAnswered(
        status,
        content,
        content_type=headers.get(b"content-type", b"application/json"),
        retry_after=retry_after(headers.get(b"retry-after")),
        shown=error_body(status, readable),
    )


def reported(status: int, content: bytes, path: str) -> WorkerAnswered | WorkerUnfit:
    """Return what is to be raised for an error that a stream reports, with the status that goes with it."""
    is_about_worker = whose(status, content, path) is Whose.WORKER
    return WorkerUnfit(status) if is_about_worker else WorkerAnswered(status, content)


def check_identity(answer: Answer) -> None:
    """Raise `WorkerGarbage` if the body is encoded: nobody asked for that, and nobody here undoes it."""
    if is_encoded(answer.headers.get(b"content-encoding")):
        raise WorkerGarbage("the worker's answer is encoded, which it was asked not to do")
