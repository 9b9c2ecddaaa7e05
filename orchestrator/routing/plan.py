"""A plan says who serves a request, and why."""

from __future__ import annotations

from typing import Final

from orchestrator.routing.links import Links
from orchestrator.routing.policies.base import Choice, End, Outcome, Reasons
from orchestrator.workers.worker import Worker

_CANCELLED: Final = End.CANCELLED  # a look-up by member is a call in Python


class Plan(Reasons[Worker]):
    """A plan says who does what, and why. `prefill` is None if `decode` does everything.

    Each choice is owed one `ended`, as soon as its leg has ended; `close` pays for all that were not.
    """

    __slots__ = ("decode", "prefill", "wants_ends")

    def __init__(
        self,
        prefill_choice: Choice[Worker] | None,
        decode_choice: Choice[Worker],
        whole_reason: str | None = None,
    ) -> None:
        # Set here, as a call of the base class costs more than all of these, per request.
        self.prefill_choice = prefill_choice
        self.decode_choice = decode_choice
        self.whole_reason = whole_reason
        self.prefills = self.decodes = None
        self.prefill = None if prefill_choice is None else prefill_choice.worker
        self.decode = decode_choice.worker
        # Whether a policy wants to hear of ends; read per request, so it is no property.
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

    def begun(self, written: float, moment: float) -> None:
        """Hear that the first event of a streamed answer has come, on a leg that was written at `written`.
        Who executes a plan calls it at most once, if the plan `wants_ends` and its own prefill worker made
        the KV cache.
        """

    def close(self, now: float, end: End = _CANCELLED) -> None:
        """Tell the policies that nothing more comes of the plan: `end` is that of the decode leg, a prefill
        leg was not sent.
        """
        prefill = self.prefill_choice
        if prefill is not None and prefill.policy is not None:
            prefill.ended(Outcome(_CANCELLED, now))
        if self.decode_choice.policy is not None:
            self.decode_choice.ended(Outcome(end, now))


class PairPlan(Plan):
    """A plan of two workers wants to know how long the hand-off between them takes."""

    __slots__ = ("_links",)

    def __init__(self, prefill: Choice[Worker], decode: Choice[Worker], links: Links) -> None:
        super().__init__(prefill, decode)
        self._links = links
        self.wants_ends = True

    def begun(self, written: float, moment: float) -> None:
        choice, prefill = self.prefill_choice, self.prefill
        if choice is not None and prefill is not None:
            tokens = choice.prompt_tokens()
            if tokens >= 0.0:
                self._links.note(prefill, self.decode, tokens, moment - written, moment)
