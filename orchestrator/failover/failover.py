"""A stream whose worker was lost goes on from another pair: what was sent becomes part of the prompt.

`failover/continuation.py` knows which streams can and what the new legs are asked; here the token ids are
found, and the job is turned into one for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from orchestrator.failover.transcript import CannotContinue, Memory, Sent, Transcript
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.dispatch import Dispatcher
from orchestrator.relay.job import Job
from orchestrator.workers.registry import Registry, Worker

# A worker's answer to `/tokenize`: a million ids with six digits each, and their commas.
_MAX_TOKENS_BYTES = 16 * 1024 * 1024

# Workers asked for token ids before the stream is given up.
_MOST_ASKED = 3


class Failover:
    """Keeps what streams have sent, and makes jobs for their rest. One per process."""

    def __init__(self, dispatcher: Dispatcher, registry: Registry, *, max_bytes: int) -> None:
        """`max_bytes` bounds what all open streams keep; streams beyond it are not replaceable."""
        self._dispatcher = dispatcher
        self._registry = registry
        self._memory = Memory(max_bytes)

    def transcript(self, job: Job) -> Transcript | None:
        """For a stream that begins; None if no other worker could ever go on with it. To be closed."""
        if job.view.whole_reason is not None or self._memory.used >= self._memory.limit:
            return None
        return Transcript(self._memory)

    async def go_on(self, job: Job, cause: WorkerError | WorkerAnswered) -> bool:
        """Turn the job into one for the rest of its stream; False if only the ending was missing: it is sent.

        Raises `cause` if nobody can go on with the stream.
        """
        try:
            return await self._go_on(job)
        except CannotContinue as reason:
            if isinstance(cause, WorkerAnswered):  # what the worker says is worth more than what we say
                raise cause from reason
            error = WorkerCutShort(f"{cause.message}; no other worker can go on: {reason}")
            raise error from cause

    async def _go_on(self, job: Job) -> bool:
        transcript = job.scope.transcript
        reason = replaceable(job.view)
        if transcript is None or reason is not None:
            raise CannotContinue(reason or "nothing was kept of it")
        sent = transcript.sent()
        first = job.first_handoff
        cached_tokens = None if first is None else first.prefill_cached_tokens
        end = b"" if sent.is_done else ending_without_count(job.view, sent, cached_tokens)
        if end is None:
            continuation = await self._continuation(job, sent, cached_tokens)
            rest = continuation.rest()
            if rest is not None:
                job.bodies, job.path, job.continuation = LegBodies(rest), PATH, continuation
                return True
            end = continuation.ending()
        job.scope.end_stream(end)
        return False

    async def _continuation(self, job: Job, sent: Sent, cached_tokens: int | None) -> Continuation:
        view = job.view
        from_prefill = None if job.first_handoff is None else job.first_handoff.token_ids
        model_len = job.worker.max_model_len
        prompt, said = known_prompt_ids(view, sent, from_prefill), known_sent_ids(sent)
        if prompt is None:
            body = tokenize_prompt(view, sent, job.worker.address.served_model)
            prompt, model_len = await self._tokenize(job, body)
        if said is None:
            text = text_to_go_on_from(view, sent)
            said, model_len = await self._tokenize(job, tokenize_text(text, job.worker.address.served_model))
        return Continuation(
            view=view, sent=sent, prompt=prompt, said=said, model_len=model_len, cached_tokens=cached_tokens
        )

    async def _tokenize(self, job: Job, body: bytes) -> tuple[Ids, int | None]:
        """Ask one worker after the other for token ids, and the length of its context."""
        for worker in self._askable(job):
            try:
                return tokenized(await self._dispatcher.ask(job, worker, TOKENIZE, body, _MAX_TOKENS_BYTES))
            except (WorkerError, WorkerAnswered):
                continue
        raise CannotContinue("no worker tells the token ids of what was sent")

    def _askable(self, job: Job) -> Iterator[Worker]:
        pools = self._registry.pools[job.view.model]
        model = job.worker.address.served_model
        ready = [*pools.both, *pools.decode, *pools.prefill]
        named_alike = [worker for worker in ready if worker.address.served_model == model]
        fresh = [worker for worker in named_alike if worker is not job.worker and worker not in job.avoid]
        yield from (fresh or named_alike)[:_MOST_ASKED]
