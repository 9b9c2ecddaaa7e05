"""A leg is a request to one worker, from the place that it takes there to its end.

    leg = PrefillLeg(legs, worker)
    with leg:                              # the seat
        content = await leg.read(limit)    # sent, and sent again in plain JSON if its form was refused

The end of a leg is the only place that tells the registry what was seen of a worker: whoever leaves the block
with a worker's error has that worker judged by it, if anything was sent there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Final

from orchestrator.api.holders import response_id
from orchestrator.errors import (
    HandoffLate,
    HandoffStalled,
    PathMissing,
    WorkerAnswered,
    WorkerCutShort,
    WorkerError,
    WorkerGarbage,
    WorkerOut,
    WorkerUnfit,
    WorkerUnreachable,
)
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Handoff, InvalidHandoff
from orchestrator.legs.dispatch import Dispatcher, cause_of, check_identity, refusal
from orchestrator.legs.ledger import KvLease
from orchestrator.legs.retry import Failure, failure_of, has_freed, is_unread, outcome_of
from orchestrator.telemetry.counters import LeaseState
from orchestrator.telemetry.record import Attempts, FailedAttempt
from orchestrator.transport.base import Answer
from orchestrator.wire.codec import JSON, Codec, NotEncodable, Parts
from orchestrator.wire.headers import header_block
from orchestrator.wire.info import DOCUMENT_REFUSED, LEG_HEADER, TOKEN_IDS_HEADER, TokenIdsForm
from orchestrator.wire.judge import ABORTED, ENDED_BY_WORKER
from orchestrator.wire.load import LOAD_HEADER
from orchestrator.wire.refusals import counts_fields, recounted
from orchestrator.wire.usage import decode_document
from orchestrator.workers.states import IN_SERVICE, NOT_TAKEN_OUT, WorkerState
from orchestrator.workers.worker import Worker

# A prefill answer holds block ids and one token: 1 MiB is enough for over 100,000 blocks.
MAX_PREFILL_ANSWER_BYTES: Final = 16 * 1024 * 1024

# As `ABORTED` in an answer in msgpack; no string can contain it, for it is no UTF-8.
_ABORTED_MSGPACK: Final = b"\xadfinish_reason\xa5abort"

_MAY_BE_REFUSALS: Final = frozenset({400, 415, 422})  # of a form that the worker announced
_DOCUMENT_REFUSED: Final = DOCUMENT_REFUSED.encode()
_LEG_HEADER: Final = LEG_HEADER.lower().encode()
_LOAD_HEADER: Final = LOAD_HEADER.lower().encode()
_NOT_SENT: Final = -1
# Looking a member up in its enumeration costs as much as a call.
_READY: Final = WorkerState.READY
_USED: Final = LeaseState.USED
_CONSUMED: Final = LeaseState.CONSUMED

_ID_HEADERS: Final[dict[TokenIdsForm | None, bytes]] = {
    None: b"",
    "list": b"",
    "base64": header_block([(TOKEN_IDS_HEADER.lower().encode(), b"base64")]),
    "bin": header_block([(TOKEN_IDS_HEADER.lower().encode(), b"bin"), (b"accept", b"application/msgpack")]),
}


class Denial:
    """A leg was answered as no worker of ours answers."""

    def __init__(self, worker: Worker, epoch: int, answered: int) -> None:
        """`epoch` is the worker's when the leg was sent, `answered` the status that came back."""
        self.worker = worker
        self.epoch = epoch
        self.answered = answered


class Legs:
    """The legs of one request have this in common; it knows which workers they have met."""

    # Class attributes are defaults of what is seldom looked at: to find one costs as much as to set three.
    last: Worker | None = None  # that a leg was sent to
    failed: tuple[Worker, ...] | None = None  # workers that are not to be asked again
    denied: tuple[Denial, ...] | None = None  # what workers that were not fit for it have answered
    has_stalled = False  # a hand-off, so that it was tried elsewhere
    was_silent = False  # the leg that failed last: it was given up for that
    was_in_service = False  # the worker of the leg that failed last: nobody had taken it out before

    def __init__(
        self,
        dispatcher: Dispatcher,
        model: str,
        bodies: LegBodies,
        headers: bytes,
        client_id: bytes | None = None,
    ) -> None:
        """`bodies` are those of the legs to come; another worker that goes on with a stream gets others.

        `headers` are the client's for workers, as a header block. So is `client_id`: what the client calls
        its request, of which the worker that answers makes the `id` of the answer. It is b"" if the body says
        that, None if the client leaves it to us.
        """
        self.dispatcher = dispatcher
        self.model = model
        self.bodies = bodies
        self.headers = headers
        self.client_id = client_id
        self.id = dispatcher.ids.fresh()  # ours, for the workers
        self.adapter = ""  # that its legs name in place of the model
        self.count = 0  # legs that were sent
        self.attempts: Attempts | None = None  # None: none has failed

    def count_denials(self) -> None:
        """Count against the workers what they denied, for others have served the request: it was not the
        client's mistake.
        """
        for denial in self.denied or ():
            if denial.epoch == denial.worker.epoch:
                self.dispatcher.registry.judge.note_error(denial.worker, f"with {denial.answered}")

    def note_failed(
        self, worker: Worker, error: WorkerError | WorkerAnswered, began: float
    ) -> FailedAttempt | None:
        """Note that a worker has failed the request, which it had since `began`, for its log line; returns
        what is noted.

        An error that any worker would answer is no failure: None.
        """
        if failure_of(error) is Failure.REFUSED:
            return None
        outcome = "silent" if self.was_silent else outcome_of(error)
        self.was_silent = False
        seconds = self.dispatcher.time() - began
        attempt = FailedAttempt(worker.name, outcome, seconds, began)
        self.tried().failed.append(attempt)
        return attempt

    def tried(self) -> Attempts:
        """Return what is noted of the attempts, once there is something to note."""
        if self.attempts is None:
            self.attempts = Attempts()
        return self.attempts

    def has_failed(self, worker: Worker) -> bool:
        """Tell whether the worker has just failed this request, or did so before."""
        return worker is self.last or worker in (self.failed or ())


class Leg(ABC):
    """A leg owns its place on a worker, the answer, and how long that has been silent."""

    # Class attributes are defaults of what is set later, or seldom looked at: to find one costs as much as to
    # set three. `PrefillLeg` sets the others itself.
    epoch = _NOT_SENT  # of the worker, when the leg was sent
    id = ""  # its name (`wire/info.py`), once it is sent
    is_for_client = False  # its answer is what the client gets
    answer: Answer | None = None  # once the leg was written
    sent = 0.0  # when it was written
    heard = 0.0  # the same, or when more of its answer was last seen
    seen_arrivals = 0  # of its answer, when that was last looked at
    is_documents_fault = False  # that it is plain: the worker takes other documents as it announced
    given_up_for: WorkerError | None = None  # what its reader is told then
    refusal = b""  # what its worker said when it did not serve it
    turn_header = b""  # what the head says of the leg's turn in the engine's queue

    def __init__(self, legs: Legs, worker: Worker) -> None:
        self.legs = legs
        self.bodies = legs.bodies
        self.worker = worker
        self.is_plain = False  # it goes as JSON without token ids, whatever the worker announces
        self.is_given_up = False  # see `give_up`
        self.form_headers = b""  # what the head says of the form of the answer, as a header block
        # Of a prefill: its own, once it has answered; or that which decode builds on.
        self.lease: KvLease | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} on {self.worker.name}: {self.answer!r}>"

    # --- its place ------------------------------------------------------------------------------

    def __enter__(self) -> Leg:
        self.worker.count_leg(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.count_leg(-1)
        if error is not None and self.epoch != _NOT_SENT:
            self._judge(error)

    def _judge(self, error: BaseException) -> None:
        """Tell what its failure says of the worker. Raises what it was given up for, unless its request has
        ended.
        """
        why = self.given_up_for
        if why is None:
            if not self.is_given_up:
                self._note_failed(error)
        elif isinstance(error, WorkerError | WorkerAnswered):
            self._note_failed(why)
            raise why

    def _note_failed(self, error: BaseException) -> None:
        self.legs.was_in_service = self.worker.state in NOT_TAKEN_OUT
        self._tell(error)

    def sweep(self, now: float) -> None:  # noqa: B027
        """Look whether it gets on; whoever looks at open requests calls this for a leg that is waited for."""

    @property
    def is_in_service(self) -> bool:
        """Its worker still is where legs run."""
        return self.worker.state in IN_SERVICE

    def lose(self) -> None:
        """Give its answer up, as its worker is out of service and says nothing: its reader goes elsewhere."""
        self.legs.was_silent = True
        self.abort()

    def note_heard(self, now: float) -> None:
        """Note that more of its answer has come."""
        self.heard = now
        self.worker.note_heard(now)

    def check_in_service(self) -> None:
        """Raise `WorkerOut` if its worker has been lost while others were waited for."""
        state = self.worker.state
        if state is not _READY and state not in IN_SERVICE:
            self.legs.last = self.worker
            raise WorkerOut(f"{self.worker.name} fell out of service before its leg was sent")

    @property
    def path(self) -> str:
        return self.bodies.path

    @property
    def written(self) -> Answer:
        """This is the answer of a leg that was written."""
        if self.answer is None:
            raise RuntimeError(f"{self!r} was not sent")
        return self.answer

    def abort(self) -> None:
        """Give its answer up, if it is not whole. It may be called again."""
        if self.answer is not None:
            self.answer.abort()

    # --- sending and reading --------------------------------------------------------------------

    async def read(self, limit: int, *, only_head: bool = False) -> bytes:
        """Send the leg; return the whole answer, of at most `limit` bytes, of a worker that has served it.

        `only_head`: the body of the answer is left to be read, and b"" returned; `limit` bounds errors then.

        Raises `WorkerAnswered` or `WorkerUnfit` if the worker has not served it, `WorkerUnreachable` if
        nothing could be written, and what `Answer.read` raises. Sends the leg again, once, if its form may be
        what the worker refused.
        """
        while True:
            codec = self.bodies.codec or (JSON if self.is_plain else self.worker.abilities.codec)
            self.answer = answer = await self._send(codec)
            self.heard = self.sent = self.legs.dispatcher.time()
            if self.is_given_up:
                answer.abort()
            if self.lease is not None:
                self.lease.use()
            if only_head:
                await answer.head()
                if answer.status == 200:
                    if b"content-encoding" in answer.headers:
                        check_identity(answer)
                    return b""
            content = await answer.read(limit)
            if answer.status == 200:
                load = answer.headers.get(_LOAD_HEADER)
                if load is not None:
                    self.worker.note_load(load)
                if b"content-encoding" in answer.headers:
                    check_identity(answer)
                return content
            self.refusal = content
            is_lost = self.lease is not None and self.has_freed(content)  # what it was to build on
            if is_lost or not self._may_be_refusal(answer.status, content):
                raise refusal(answer, self._for_client(content), self.path)
            self._note_refusal()
            self.is_plain = True
            self.check_in_service()
            if self.lease is not None and self.epoch != self.worker.epoch:
                self.legs.last = self.worker
                raise WorkerOut(f"{self.worker.name} has come back since it refused the form of its leg")

    def _send(self, codec: Codec) -> Coroutine[Any, Any, Answer]:
        if codec is not JSON:
            document = self.bodies.to_transcode(codec)
            if document is not None:
                return self._transcode(codec, document)
        legs, worker, bodies = self.legs, self.worker, self.bodies
        dispatcher = legs.dispatcher
        legs.count = count = legs.count + 1
        if bodies.form.names_legs:
            self.id = name = response_id(worker.name)
            bodies.call(name)
        else:
            self.id = name = f"{legs.id}-{count}"
        try:
            parts = self.parts(codec)
        except NotEncodable as error:
            dispatcher.note_not_encodable(error)
            codec, parts = JSON, self.parts(JSON)
        self.epoch = worker.epoch
        client_id = legs.client_id
        if client_id is None or not self.is_for_client:
            id_header = f"x-request-id: {name}\r\n".encode()
        else:
            id_header = b"%b%b: %b\r\n" % (client_id, _LEG_HEADER, name.encode())
        heads = dispatcher.headers if worker.gets_credential else dispatcher.bare_headers
        head = heads[codec.name] + self.form_headers + id_header + legs.headers
        if worker.rank_header:
            head += worker.rank_header
        return dispatcher.upstream.send(worker.origin, "POST", bodies.path, head, parts)

    def _id_header(self, name: str) -> bytes:
        """Return what its head says of its name, and of the client's request."""
        client_id = self.legs.client_id
        if client_id is None or not self.is_for_client:
            return f"x-request-id: {name}\r\n".encode()
        return b"%b%b: %b\r\n" % (client_id, _LEG_HEADER, name.encode())

    async def _transcode(self, codec: Codec, document: bytes) -> Answer:
        """Send a large body, which is encoded in another process."""
        common = await self.legs.dispatcher.transcode(document)
        if common is None:
            return await self._send(JSON)
        self.bodies.adopt(codec, common)
        return await self._send(codec)

    def _for_client(self, content: bytes) -> bytes:
        """Return the worker's error, which may count the leg's fields, as one about the client's document."""
        given = self.bodies.given
        if given < 0 or not counts_fields(content):
            return content
        return recounted(content, given - len(decode_document(b"".join(self.parts(JSON))) or ()))

    @abstractmethod
    def parts(self, codec: Codec) -> Parts:
        """Make the body in this encoding. Raises `NotEncodable`."""
        ...

    # --- a form that is refused -----------------------------------------------------------------

    def _may_be_refusal(self, status: int, content: bytes) -> bool:
        """Tell whether an error may be due to a form that the worker announced and has not yet taken, or
        cannot take of this document.
        """
        worker = self.worker
        is_announced = worker.abilities.codec is not JSON or bool(worker.abilities.token_ids)
        if self.is_plain or self.bodies.codec is not None or not is_announced:
            return False
        self.is_documents_fault = status < 500 and _DOCUMENT_REFUSED in content
        is_unproven = worker.abilities.proven_epoch != worker.epoch
        return self.is_documents_fault or (status in _MAY_BE_REFUSALS and is_unproven)

    def _note_refusal(self) -> None:  # noqa: B027
        """Prepare for the leg to be sent again as plain JSON: the worker may have refused its form."""

    def has_freed(self, refusal: bytes) -> bool:
        """Tell whether its worker has had the blocks freed that the leg was to pull; see `retry.has_freed`.

        Of engines that do not say what they are this is not known.
        """
        return self.worker.introduction.info is not None and has_freed(refusal)

    # --- what is said of the worker -------------------------------------------------------------

    def succeed(self) -> None:
        """Note that the worker has taken the leg, and the hand-off that it builds on.

        If that had to be plain JSON, the worker had refused what it announced; or else the document cannot be
        put that way, and the next one may.
        """
        worker = self.worker
        if self.is_plain:
            self._note_plain(worker)
        elif worker.abilities.proven_epoch != worker.epoch and self.bodies.codec is None:
            worker.abilities.proven_epoch = worker.epoch
        if worker.failures:
            worker.failures = 0
        if self.lease is not None:
            self._begin(self.lease)

    def _note_plain(self, worker: Worker) -> None:
        dispatcher = self.legs.dispatcher
        if self.is_documents_fault:
            dispatcher.note_not_encodable(NotEncodable("the worker does not take it as msgpack"))
        else:
            dispatcher.note_refused_form(worker)

    def _begin(self, lease: KvLease) -> None:
        """Note that an answer has begun that builds on a hand-off. Raises `HandoffLate` if it is too late."""
        now = self.legs.dispatcher.time()
        if lease.state is not _CONSUMED:
            if now >= lease.good_until:
                raise HandoffLate(f"{self.worker.name} began its answer when the KV lease was over")
            lease.consume()
        self.worker.note_heard(now)
        self.worker.handoffs.note_begun(self.sent, now)

    def give_up(self, why: WorkerError | None = None) -> None:
        """End it. Who reads it, or is about to, gets `WorkerCutShort`, and the block of the leg raises `why`.

        Without `why` it is ended because of something that its worker has no part in: the registry is told
        nothing of it.
        """
        self.is_given_up = True
        self.given_up_for = why
        self.abort()

    def _tell(self, error: BaseException) -> None:
        """Tell the registry what this error says of the worker."""
        if not isinstance(error, WorkerError | WorkerAnswered) or isinstance(error, WorkerOut):
            return  # it is nothing about the worker, or the registry has told us
        registry, worker, failure = self.legs.dispatcher.registry, self.worker, failure_of(error)
        if isinstance(error, WorkerUnreachable):
            self.legs.dispatcher.note_unreachable(worker, error)
        elif failure is Failure.LOST:
            registry.judge.note_lost(worker, self.epoch, repr(cause_of(error)))
        elif isinstance(error, WorkerUnfit):
            self._tell_unfit(error)
        elif failure is Failure.FAILED:
            registry.judge.note_error(worker)
        elif isinstance(error, HandoffLate | HandoffStalled):
            self.legs.dispatcher.note_given_up(worker, self.epoch, error)
        elif failure is Failure.BUSY and error.retry_after_s:
            registry.rest(worker, error.retry_after_s)

    def _tell_unfit(self, error: WorkerUnfit) -> None:
        """Have the worker looked at; whether its answer counts against it, the end of the request shows.

        Of a path that it lacks nothing is told: a client may ask a model for what it is not made for.
        """
        legs, worker = self.legs, self.worker
        legs.denied = (*(legs.denied or ()), Denial(worker, self.epoch, error.answered))
        if not isinstance(error, PathMissing):
            legs.dispatcher.registry.judge.note_denied(worker, self.epoch, error.answered)


class PrefillLeg(Leg):
    """A prefill leg fills the KV cache of the prompt, and leaves a hand-off behind."""

    def __init__(
        self, legs: Legs, worker: Worker, decode: Worker, ids_form: TokenIdsForm | None, transfer: str = ""
    ) -> None:
        """`decode` is to take the KV cache over. `ids_form` is the form in which the prompt's token ids are
        asked for.

        `transfer` names it among all prefill legs, where the connector needs that.
        """
        self.legs = legs  # as the base has it: a call of that costs more than all of this
        self.bodies = legs.bodies
        self.worker = worker
        self.is_plain = self.is_given_up = False
        self.lease = None
        self.decode = decode
        self.ids_form = ids_form
        self.form_headers = _ID_HEADERS[ids_form]
        self._transfer = transfer

    def parts(self, codec: Codec) -> Parts:
        model = self.legs.adapter or self.worker.address.served_model
        return self.bodies.prefill(codec, model, self._transfer, asks_ids=self.ids_form is not None)

    def _note_refusal(self) -> None:
        self.ids_form = None
        self.form_headers = self.turn_header

    def stand_behind(self, turn_ms: int) -> None:
        """Let an engine that goes by priorities compute it at its turn: the lowest one is next."""
        self.turn_header = header_block([(b"x-vllm-priority", b"%d" % turn_ms)])
        self.form_headers += self.turn_header

    def handoff(self, content: bytes) -> Handoff:
        """Return what its answer tells the decode leg. Raises `WorkerCutShort` if the worker has ended the
        request by itself, or has ended meanwhile for good (`Registry.lose`), else `WorkerGarbage`.
        """
        worker, answer = self.worker, self.answer
        if self.epoch != worker.epoch and worker.state is WorkerState.GONE:
            raise WorkerCutShort("the worker has ended, and another one may have its address")
        is_packed = answer is not None and answer.headers.get(b"content-type") == b"application/msgpack"
        try:
            return self.bodies.connector.read(content, is_packed=is_packed, has_ids=self.ids_form is not None)
        except InvalidHandoff as error:
            if (_ABORTED_MSGPACK if is_packed else ABORTED) in content:
                raise WorkerCutShort(ENDED_BY_WORKER) from error
            raise WorkerGarbage(str(error)) from error


class AnswerLeg(Leg):
    """The client gets the answer of this leg: decode with a hand-off, or everything on one worker."""

    is_for_client = True
    handoff: Handoff | None = None  # None: it prefills as well
    # Whether it was in time, nobody can say before its answer is there: await this then, if it is given.
    settle_doubt: Callable[[], Awaitable[None]] | None = None

    def sweep(self, now: float) -> None:
        lease = self.lease
        if lease is not None and lease.state is not _CONSUMED:
            lease.ledger.watch.look(self, lease, now)

    def take(self, lease: KvLease) -> None:
        """Build on a prefill that has ended."""
        self.lease = lease
        self.handoff = lease.handoff

    def parts(self, codec: Codec) -> Parts:
        model = self.legs.adapter or self.worker.address.served_model
        if self.handoff is None:
            return self.bodies.whole(codec, model)
        return self.bodies.decode(codec, model, self.handoff)

    def _note_refusal(self) -> None:
        self.settle_handoff()
        if self.handoff is not None:
            self.handoff.token_ids = None

    def settle_handoff(self) -> KvLease | None:
        """Note what the answer's status says of the hand-off; return its lease if nobody knows what became of
        it.

        A worker that refused the leg unread leaves the blocks owed again, or has freed them.
        """
        lease, answer = self.lease, self.answer
        if lease is None or answer is None or lease.state is not _USED:
            return None
        if is_unread(answer.status):
            lease.unuse()
            if self.has_freed(self.refusal):
                lease.release()
            return None
        if self.settle_doubt is not None:
            lease.expire()
            return None
        return lease


class HolderLeg(AnswerLeg):
    """A worker is asked for what only it has: the client's request goes to it without a body."""

    def __init__(self, legs: Legs, worker: Worker, method: str) -> None:
        super().__init__(legs, worker)
        self._method = method
        self.is_plain = True

    def _send(self, codec: Codec) -> Coroutine[Any, Any, Answer]:
        legs, dispatcher = self.legs, self.legs.dispatcher
        self.epoch = self.worker.epoch
        head = dispatcher.head(self.worker, JSON.name) + legs.headers
        return dispatcher.upstream.send(self.worker.origin, self._method, self.bodies.path, head, [])

    def succeed(self) -> None:
        """Note that the worker answers; that it took no other form than plain JSON says nothing."""
        self.worker.failures = 0


class ReleaseLeg(Leg):
    """A release leg has the blocks of a hand-off pulled so that they are free; nobody wants its answer."""

    def __init__(self, legs: Legs, worker: Worker, bodies: LegBodies, handoff: Handoff) -> None:
        """`bodies` are those of the prefill leg."""
        super().__init__(legs, worker)
        self.bodies = bodies
        self._handoff = handoff

    def parts(self, codec: Codec) -> Parts:
        salt = self.legs.id
        return self.bodies.release(codec, self.worker.address.served_model, self._handoff, salt)

    def _tell(self, error: BaseException) -> None:
        """Tell only that no worker of ours listens there, which is certain; what else becomes of the leg is
        no client's loss.
        """
        if isinstance(error, WorkerUnreachable | WorkerUnfit):
            super()._tell(error)


class Question(Leg):
    """A worker is asked something beside the legs, in JSON; the end of it tells nothing of the worker."""

    def __init__(self, legs: Legs, worker: Worker, path: str, body: bytes) -> None:
        super().__init__(legs, worker)
        self._path = path
        self._body = body
        self.is_plain = True

    @property
    def path(self) -> str:
        return self._path

    def note_failed(self, error: BaseException) -> None:
        """Have the worker looked at if it has answered as none of ours does."""
        if isinstance(error, WorkerUnfit) and not isinstance(error, PathMissing):
            worker = self.worker
            self.legs.dispatcher.registry.judge.note_denied(worker, worker.epoch, error.answered)

    def _send(self, codec: Codec) -> Coroutine[Any, Any, Answer]:
        return self.legs.dispatcher.ask(self.worker, self._path, self._body)

    def parts(self, codec: Codec) -> Parts:
        return (self._body,)
