"""Traces are read in three formats: Mooncake's, Azure's, and the orchestrator's own log of decisions.

Which one a file has is seen by its first line. Whatever is wrong is told with the file and the line.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from launch.simulate.errors import SimulationError
from launch.simulate.trace import BYTES_PER_TOKEN, Arrival, Trace
from orchestrator.telemetry.decisions import BLOCK_BYTES, Decision

MOONCAKE_BLOCK: Final = 512  # tokens
AZURE_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOST_PAUSE_S: Final = 86_400.0  # between two requests
COARSE_S: Final = 1.0  # steps of time from here on are taken for rounding, if many requests share one
_NAMES: Final = 1 << 64  # blocks have names below

Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
Row = TypeVar("Row")


class MooncakeRow(msgspec.Struct):
    """A request as kvcache-ai/Mooncake publishes it; the last block may not be full."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # ms
    input_length: Tokens
    output_length: Count
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]] = []

    def fault(self) -> str | None:
        """Say what does not fit together; None if all does. A block that is not full may have no id."""
        full, rest = divmod(self.input_length, MOONCAKE_BLOCK)
        count = len(self.hash_ids)
        if count == 0 or full <= count <= full + (rest > 0):
            return None
        return (
            f"`hash_ids` has {count}, but `input_length` {self.input_length} is {full + (rest > 0)} blocks "
            f"of {MOONCAKE_BLOCK} tokens"
        )


_MOONCAKE_ONLY: Final = frozenset(MooncakeRow.__struct_fields__)


def read_trace(path: str, model: str) -> Trace:
    """Read a trace; of a log of decisions, the served requests for `model`. Raises `SimulationError`."""
    trace = _read(path, model)
    moments = sorted(arrival.at_s for arrival in trace.arrivals)
    for earlier, later in pairwise(moments):
        if later - earlier > MOST_PAUSE_S:
            raise SimulationError(
                f"{path}: nothing comes for {later - earlier:.0f} s after {earlier - moments[0]:.0f} s: more "
                f"than a day is taken for a mistake (Mooncake's timestamps are milliseconds)"
            )
    return trace


def _read(path: str, model: str) -> Trace:
    lines = list(_lines(path))
    if not lines:
        raise SimulationError(f"{path}: there is no request in it")
    number, first = lines[0]
    if not first.startswith("{"):
        return _read_azure(path, lines)
    if not _MOONCAKE_ONLY.isdisjoint(_decoded(path, number, first, dict[str, Any])):
        return _read_mooncake(path, lines)
    return _read_decisions(path, lines, model)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise SimulationError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SimulationError(f"{path}: it is no text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _decoded(path: str, number: int, line: str, kind: type[Row]) -> Row:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.MsgspecError as error:
        raise SimulationError(f"{path}:{number}: {error}") from error


# --- Mooncake -----------------------------------------------------------------------------------


def _read_mooncake(path: str, lines: list[tuple[int, str]]) -> Trace:
    rows = [_mooncake_row(path, number, line) for number, line in lines]
    arrivals = [_mooncake_arrival(index, row) for index, row in enumerate(rows)]
    return Trace(arrivals, MOONCAKE_BLOCK, _resolution_s([row.timestamp for row in rows]))


def _mooncake_row(path: str, number: int, line: str) -> MooncakeRow:
    row = _decoded(path, number, line, MooncakeRow)
    fault = row.fault()
    if fault is not None:
        raise SimulationError(f"{path}:{number}: {fault}")
    return row


def _mooncake_arrival(index: int, row: MooncakeRow) -> Arrival:
    names = [name % _NAMES for name in row.hash_ids]
    whole = row.input_length // MOONCAKE_BLOCK
    return Arrival(
        index,
        row.timestamp / 1e3,
        row.input_length,
        max(1, row.output_length),
        tuple(names[:whole]),
        tail=names[whole] if len(names) > whole else None,
        session=names[1] if len(names) > 1 else None,  # the first one is in every request
    )


def _resolution_s(moments_ms: list[float]) -> float:
    """Return how far apart the moments are that the trace tells apart; 0.0 if each is what it is."""
    distinct = sorted({*moments_ms})
    if len(distinct) < 2 or len(distinct) * 2 > len(moments_ms):
        return 0.0
    step_s = statistics.median(later - earlier for earlier, later in pairwise(distinct)) / 1e3
    return step_s if step_s >= COARSE_S else 0.0


# --- Azure --------------------------------------------------------------------------------------


def _read_azure(path: str, lines: list[tuple[int, str]]) -> Trace:
    number, header = lines[0]
    if tuple(header.split(",")) != AZURE_COLUMNS:
        expected = ",".join(AZURE_COLUMNS)
        raise SimulationError(f"{path}:{number}: expected a JSON object, or the header {expected}")
    if len(lines) == 1:
        raise SimulationError(f"{path}: there is no request in it")
    rows = sorted(_azure_row(path, number, line) for number, line in lines[1:])
    first = rows[0][0]
    arrivals = [
        Arrival(index, at_s - first, prompt, answer) for index, (at_s, prompt, answer) in enumerate(rows)
    ]
    return Trace(arrivals, MOONCAKE_BLOCK)


def _azure_row(path: str, number: int, line: str) -> tuple[float, int, int]:
    try:
        moment, prompt, answer = line.split(",")
        # The digits are those of 100 ns; Python takes microseconds.
        at_s = datetime.fromisoformat(moment[:26] + moment[26:].lstrip("0123456789")).timestamp()
        tokens = int(prompt), int(answer)
    except ValueError:
        expected = "2023-11-16 18:17:03.979,4808,10"
        raise SimulationError(f"{path}:{number}: expected a row such as {expected}") from None
    if min(tokens) < 0:
        raise SimulationError(f"{path}:{number}: a number of tokens is negative")
    return at_s, max(1, tokens[0]), max(1, tokens[1])


# --- our own ------------------------------------------------------------------------------------


def _read_decisions(path: str, lines: list[tuple[int, str]], model: str) -> Trace:
    found = [_decoded(path, number, line, Decision) for number, line in lines]
    served = [row for row in found if row.model == model and row.status < 400]  # others were no work
    rows = sorted(served, key=lambda row: row.received)
    if not rows:
        there = ", ".join(sorted({row.model for row in found})) or "none"
        raise SimulationError(
            f"{path}: there is no served request for the model '{model}' in it; models in it: {there}"
        )
    first = rows[0].received
    arrivals = [_own_arrival(index, row, first) for index, row in enumerate(rows)]
    return Trace(arrivals, BLOCK_BYTES // BYTES_PER_TOKEN)


def _own_arrival(index: int, row: Decision, first: float) -> Arrival:
    names = row.names()
    tokens = max(1, row.prompt_tokens)
    return Arrival(
        index,
        row.received - first,
        tokens,
        max(1, row.output_tokens or 1),
        tuple(names[: tokens * BYTES_PER_TOKEN // BLOCK_BYTES]),
        session=names[0] if names else None,
    )
