"""A stream whose worker was lost goes on from another pair: what was sent becomes part of the prompt.

`continuation.py` knows which streams can and what the new legs are asked; here the token ids are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestrator.api.view import RequestView
from orchestrator.errors import WorkerAnswered, WorkerCutShort, WorkerError
from orchestrator.failover.continuation import (
    PATH,
    Continuation,
    ending_without_count,
    replaceable,
    text_to_go_on_from,
)
from orchestrator.failover.tokenize import PATH as TOKENIZE
from orchestrator.failover.tokenize import (
    Ids,
    known_prompt_ids,
    known_sent_ids,
    tokenize_prompt,
    tokenize_text,
    tokenized,
)
from orchestrator.failover.transcript import CannotContinue, Sent, Transcript, TranscriptMemory
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Handoff, TokenIds
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.legs.leg import Leg, Legs, Question
from orchestrator.workers.worker import Worker

# A worker's answer to `/tokenize` holds a million ids with six digits each, and their commas.
_MAX_TOKENS_BYTES = 16 * 1024 * 1024

# So many workers are asked for token ids before the stream is given up.
_MOST_ASKED = 3


class CutStream:
    """A stream was cut: this is what the client asked for, and what it has had."""

    __slots__ = ("first", "last", "legs", "revision", "transcript", "view", "watch")

    def __init__(
        self,
        view: RequestView,
        transcript: Transcript | None,
        first: Handoff | None,
        legs: Legs,
        last: Worker,
        watch: Callable[[Leg], None],
    ) -> None:
        """`first` is the first prefill's hand-off, None if there was none; `last` is the worker whose leg was
        lost.

        `watch` is told of legs that are about to be sent, so that they do not last for ever.
        """
        self.view = view
        self.transcript = transcript
        self.first = first
        self.legs = legs
        self.last = last
        self.watch = watch
        self.revision: str | None = None  # of the worker that has begun it

    @property
    def cached_tokens(self) -> int | None:
        """The client's usage must tell this count of cached tokens; None if it is not known."""
        return None if self.first is None else self.first.prefill_cached_tokens

    @property
    def prompt_ids(self) -> TokenIds | None:
        return None if self.first is None else self.first.token_ids


class Rest:
    """This is what is left to do for a stream that was cut: more legs, or only its last events."""

    __slots__ = ("bodies", "continuation", "end")

    def __init__(self, end: bytes, continuation: Continuation | None, bodies: LegBodies | None) -> None:
        """`end` has the events that the client has not had, if nothing else is missing; it is b"" if legs are
        to follow: those of `bodies`, whose events go through `continuation`.
        """
        self.end = end
        self.continuation = continuation
        self.bodies = bodies


class Failover:
    """It keeps what streams have sent, and finds out how to go on with them. There is one per process."""

    def __init__(self, dispatcher: Dispatcher, *, max_bytes: int) -> None:
        """`max_bytes` bounds what all open streams keep; streams beyond it are not replaceable."""
        self._registry = dispatcher.registry
        self._memory = TranscriptMemory(max_bytes)

    def transcript(self, view: RequestView) -> Transcript | None:
        """Return the transcript for a stream that begins, to be closed; None if no other worker could ever go
        on with it.
        """
        if view.whole_reason is not None or self._memory.used >= self._memory.limit:
            return None
        return Transcript(self._memory)

    async def rest_of(self, stream: CutStream, cause: WorkerError | WorkerAnswered) -> Rest:
        """Return how the stream goes on that `cause` has cut; workers are asked for token ids if need be.

        Raises `cause`, or an error that says why nobody can go on with it.
        """
        try:
            return await self._rest_of(stream)
        except CannotContinue as reason:
            if isinstance(cause, WorkerAnswered):  # what the worker says is worth more than what we say
                raise cause from reason
            error = WorkerCutShort(f"{cause.message}; no other worker can go on: {reason}")
            raise error from cause

    async def _rest_of(self, stream: CutStream) -> Rest:
        reason = replaceable(stream.view)
        if stream.transcript is None or reason is not None:
            raise CannotContinue(reason or "streams of this kind are not resumed, or too much was sent")
        sent = stream.transcript.sent()
        end = b"" if sent.is_done else ending_without_count(stream.view, sent, stream.cached_tokens)
        if end is not None:
            return Rest(end, None, None)
        continuation = await self._continuation(stream, sent)
        rest = continuation.rest()
        if rest is None:
            return Rest(continuation.ending(), None, None)
        return Rest(b"", continuation, LegBodies(rest, PATH, stream.legs.bodies.connector))

    async def _continuation(self, stream: CutStream, sent: Sent) -> Continuation:
        view, last = stream.view, stream.last
        model_len = last.introduction.max_model_len
        prompt, said = known_prompt_ids(view, sent, stream.prompt_ids), known_sent_ids(sent)
        if prompt is None:
            body = tokenize_prompt(view, sent, last.address.served_model)
            prompt, model_len = await self._tokenize(stream, body)
        if said is None:
            text = text_to_go_on_from(view, sent)
            said, model_len = await self._tokenize(stream, tokenize_text(text, last.address.served_model))
        return Continuation(
            view=view,
            sent=sent,
            prompt=prompt,
            said=said,
            model_len=model_len,
            cached_tokens=stream.cached_tokens,
        )

    async def _tokenize(self, stream: CutStream, body: bytes) -> tuple[Ids, int | None]:
        """Ask one worker after the other for token ids, and the length of its context."""
        for worker in self._askable(stream):
            question, began = Question(stream.legs, worker, TOKENIZE, body), stream.legs.dispatcher.time()
            stream.watch(question)
            try:
                return tokenized(await question.read(_MAX_TOKENS_BYTES))
            except (WorkerError, WorkerAnswered) as error:
                question.note_failed(error)
                stream.legs.note_failed(worker, error, began)
                continue
            finally:
                question.abort()
        raise CannotContinue("no worker tells the token ids of what was sent")

    def _askable(self, stream: CutStream) -> Iterator[Worker]:
        pools = self._registry.pools[stream.legs.model]
        model = stream.last.address.served_model
        ready = [*pools.both, *pools.decode, *pools.prefill]
        named_alike = [worker for worker in ready if worker.address.served_model == model]
        named_alike.sort(
            key=lambda worker: worker.revision != stream.revision
        )  # its tokenizer is known to fit
        fresh = [worker for worker in named_alike if not stream.legs.has_failed(worker)]
        yield from (fresh or named_alike)[:_MOST_ASKED]
