"""A plan says who serves a request, and why."""

from __future__ import annotations

from typing import Final

from orchestrator.routing.links import Links
from orchestrator.routing.policies.base import Choice, End, Outcome, Reasons
from orchestrator.workers.worker import Worker

KEPT: Final = "it has prefilled for an earlier attempt, and nobody has used that yet"
_CANCELLED: Final = End.CANCELLED  # a look-up by member is a call in Python


class Plan(Reasons[Worker]):
    """A plan says who does what, and why. `prefill` is None if `decode` does everything.

    Each choice is owed one `ended`, as soon as its leg has ended; `close` pays for all that were not.
    """

    __slots__ = ("decode", "links", "prefill", "wants_ends")

    def __init__(
        self,
        prefill_choice: Choice[Worker] | None,
        decode_choice: Choice[Worker],
        whole_reason: str | None = None,
        links: Links | None = None,
    ) -> None:
        """`whole_reason` is why one worker does everything; None if there are two. The choices tell why it is
        these workers. `links` are given if the plan wants to hear that its stream has `begun`.
        """
        self.links = links
        # Set here, as a call of the base class costs more than all of these, per request.
        self.prefill_choice = prefill_choice
        self.decode_choice = decode_choice
        self.whole_reason = whole_reason
        self.prefills = self.decodes = None
        self.prefill = None if prefill_choice is None else prefill_choice.worker
        self.decode = decode_choice.worker
        # Whether a policy still wants to hear of ends; read per request, so it is no property.
        self.wants_ends = decode_choice.policy is not None or (
            prefill_choice is not None and prefill_choice.policy is not None
        )

    def choice_of(self, worker: Worker) -> Choice[Worker]:
        """Return the choice that this worker of the plan comes from."""
        if worker is self.prefill and self.prefill_choice is not None:
            return self.prefill_choice
        return self.decode_choice

    def owes(self) -> bool:
        """Tell whether a choice still is to be told how its leg ended."""
        prefill = self.prefill_choice
        return self.decode_choice.policy is not None or (prefill is not None and prefill.policy is not None)

    def keep_prefill(self, worker: Worker, now: float) -> None:
        """Have the KV cache used that `worker` made for an earlier plan: nothing comes of the choice of this
        one.
        """
        choice = self.prefill_choice
        if choice is not None and choice.policy is not None:
            choice.ended(Outcome(_CANCELLED, now))
        self.prefill = worker
        self.prefill_choice = Choice(worker, KEPT)
        self.wants_ends = self.decode_choice.policy is not None

    def begun(self, written: float, moment: float) -> None:
        """Hear that the first event of a streamed answer has come, on a leg that was written at `written`.
        Who executes a plan calls it at most once, if the plan has `links` and its own prefill worker made the
        KV cache.
        """
        choice, prefill, links = self.prefill_choice, self.prefill, self.links
        if choice is not None and prefill is not None and links is not None:
            tokens = choice.prompt_tokens()
            if tokens >= 0.0:
                links.note(prefill, self.decode, tokens, moment - written, moment)

    def close(self, now: float, end: End = _CANCELLED) -> None:
        """Tell the policies that nothing more comes of the plan: `end` is that of the decode leg, a prefill
        leg was not sent.
        """
        prefill = self.prefill_choice
        if prefill is not None and prefill.policy is not None:
            prefill.ended(Outcome(_CANCELLED, now))
        if self.decode_choice.policy is not None:
            self.decode_choice.ended(Outcome(end, now))
