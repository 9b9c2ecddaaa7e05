"""Answers are counted by model: their tokens, the time to the first of them, and the time between two.

They are counted from finished records, in the batches that become lines of the log: a request that is under
way pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.telemetry.counters import (
    CACHED_TOKENS,
    FIRST_TOKEN,
    GAP_BOUNDS,
    GENERATION_TOKENS,
    INTER_TOKEN,
    PROMPT_TOKENS,
    STAGE_BOUNDS,
    Layout,
    Row,
    observe_all,
)
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.usage import tokens_in

LEAST_TOKENS: Final = 3  # of a stream: fewer have no rhythm


class _Answers:
    """A model has given these in a batch of records."""

    __slots__ = ("cached_tokens", "first_tokens", "gaps", "generation_tokens", "prompt_tokens")

    def __init__(self) -> None:
        self.cached_tokens = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.first_tokens: list[float] = []  # seconds, one per stream
        self.gaps: list[float] = []  # the mean of each stream

    def add(self, record: RequestRecord) -> None:
        prompt, told = tokens_in(record.usage)
        tokens = told or 0
        if record.trail is not None:
            record.trail.prompt_tokens, record.trail.output_tokens = prompt, told
            self.cached_tokens += record.trail.cached_tokens or 0
        self.prompt_tokens += prompt or 0
        self.generation_tokens += tokens
        if record.is_stream and record.first_byte:
            self.first_tokens.append(record.first_byte - record.received)
            if tokens >= LEAST_TOKENS and record.error_code is None and record.attempts is None:
                self.gaps.append((record.finished - record.first_byte) / (tokens - 1))


class AnswerWriter:
    """It counts finished records into the cells of their models."""

    def __init__(self, layout: Layout, row: Row) -> None:
        """`row` is that of this process's `Telemetry`."""
        self._layout = layout
        self._row = row

    def note(self, records: Sequence[RequestRecord]) -> None:
        """Count those of some records that have an answer."""
        answers: dict[int, _Answers] = {}
        for record in records:
            if record.status == 200:
                model = record.model_index
                found = answers.get(model)
                if found is None:
                    answers[model] = found = _Answers()
                found.add(record)
        for model, found in answers.items():
            self._count(self._layout.answer_cell(model), found)

    def _count(self, cell: int, found: _Answers) -> None:
        row = self._row
        row[cell + PROMPT_TOKENS] += found.prompt_tokens
        row[cell + CACHED_TOKENS] += found.cached_tokens
        row[cell + GENERATION_TOKENS] += found.generation_tokens
        observe_all(row, cell + FIRST_TOKEN, STAGE_BOUNDS, found.first_tokens)
        observe_all(row, cell + INTER_TOKEN, GAP_BOUNDS, found.gaps)
