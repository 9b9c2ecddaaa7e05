"""An answer is made token by token: by a pure part (`Choice`), and one that waits for the engine
(`generate`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from worker.sim import text
from worker.sim.engine import Engine
from worker.sim.faults import Plan
from worker.sim.protocol import Job, Sampling
from worker.sim.runs import Run


@dataclass(frozen=True, slots=True)
class Piece:
    """This is one token of one answer. `text` may be empty: held back, or not part of the answer."""

    index: int  # of the choice
    token: int
    text: str
    finish: str | None = None
    stop: str | int | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """The KV cache of a prompt is there."""

    prompt: int
    run: Run


@dataclass(slots=True)
class Outcome:
    """This is a whole answer."""

    runs: list[Run] = field(default_factory=list)
    pieces: dict[int, list[Piece]] = field(default_factory=dict)


class Choice:
    """The tokens of one answer are a pure function of digest and sampling. Text that may turn out to be the
    beginning of a stop string is held back until it is not.
    """

    def __init__(self, index: int, digest: bytes, sampling: Sampling, sample: int) -> None:
        self.index = index
        self.is_done = False
        self._sampling = sampling
        self._words = text.speak(digest, sampling.variant(sample))
        self._end = max(text.answer_length(digest), sampling.min_tokens)
        self._made = 0
        self._held = ""
        self._hold = max(map(len, sampling.stops), default=1) - 1

    def next_piece(self) -> Piece:
        """Return the next token; not to be called when `is_done`."""
        self._made += 1
        if self._made > self._end and not self._sampling.ignore_eos:
            return self._finish(text.EOS, self._held, "stop")
        token = next(self._words)
        if token in self._sampling.stop_ids and self._may_stop():
            kept = text.decode([token]) if self._sampling.keeps_stop else ""
            return self._finish(token, self._held + kept, "stop", token)
        return self._speak(token)

    def _speak(self, token: int) -> Piece:
        said = self._held + text.decode([token])
        if found := self._find_stop(said):
            at, stop = found
            return self._finish(token, said[: at + len(stop) * self._sampling.keeps_stop], "stop", stop)
        if self._made >= self._sampling.max_tokens:
            return self._finish(token, said, "length")
        cut = max(0, len(said) - self._hold)
        self._held = said[cut:]
        return Piece(self.index, token, said[:cut])

    def _find_stop(self, said: str) -> tuple[int, str] | None:
        if not self._may_stop():
            return None
        found = [(said.find(stop), stop) for stop in self._sampling.stops]
        return min(((at, stop) for at, stop in found if at >= 0), default=None)

    def _may_stop(self) -> bool:
        return self._made > self._sampling.min_tokens

    def _finish(self, token: int, said: str, reason: str, stop: str | int | None = None) -> Piece:
        self.is_done = True
        return Piece(self.index, token, said, reason, stop)


async def generate(engine: Engine, job: Job, plan: Plan) -> AsyncGenerator[Opened | Piece]:
    """Yield for each prompt an `Opened` and then its tokens, choices side by side. Raises `KvLost`.

    Close it (`aclosing`), also when it was not read to its end: that gives back what the request holds.
    """
    for number, prompt in enumerate(job.prompts):
        async with engine.run(prompt, plan) as run:
            yield Opened(number, run)
            first = number * job.choices
            choices = [Choice(first + i, run.digest, job.sampling, i) for i in range(job.choices)]
            is_first = True
            while choices:
                await engine.wait_token(run, plan, is_first=is_first)
                is_first = False
                for choice in choices:
                    yield choice.next_piece()
                choices = [choice for choice in choices if not choice.is_done]
            engine.finish(run, plan)
