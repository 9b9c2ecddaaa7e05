"""The log of decisions has a line per request: when it came, how long it was, what else begins like it, where
it was sent, and how that went. There is no text in it.

`baton simulate` reads it as a trace.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import msgspec
from xxhash import xxh3_64_intdigest

from orchestrator.errors import StartError
from orchestrator.telemetry.logs import LineWriter
from orchestrator.telemetry.record import LoggedRequest, RequestRecord

BLOCK_BYTES: Final = 1024  # of a prompt: so long a beginning can be known again, and each multiple of it
MOST_BYTES: Final = 1 << 20  # of a prompt are looked at
PERIOD_S: Final = 0.1
TURN_BYTES: Final = 4 << 20  # of prompts are hashed in one turn of the event loop: about half a millisecond
TURN_RECORDS: Final = 256

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class Decision(msgspec.Struct, kw_only=True, omit_defaults=True):
    """This is a line. `blocks` are the names of the prompt's beginnings, each of `BLOCK_BYTES` more: equal
    names are equal beginnings, and nobody who does not know the salt can tell of which text.
    """

    received: float  # seconds since 1970
    model: str
    prompt_tokens: _Tokens  # as the orchestrator estimates them
    status: int = 200
    output_tokens: _Tokens | None = None
    cached_tokens: int | None = None  # of the prompt, as the prefill worker said
    ttft_s: float | None = None
    prefill_worker: str | None = None
    decode_worker: str | None = None
    blocks: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{16})*$")] = ""

    def names(self) -> list[int]:
        """Return the blocks' names as numbers."""
        return array("Q", bytes.fromhex(self.blocks)).tolist()


def names_of(prompt: bytes, salt: int) -> str:
    """Return the names of a prompt's whole blocks, as `Decision.blocks` has them."""
    view = memoryview(prompt)[:MOST_BYTES]
    name, found = salt, array("Q")
    for end in range(BLOCK_BYTES, len(view) + 1, BLOCK_BYTES):
        name = xxh3_64_intdigest(view[end - BLOCK_BYTES : end], name)
        found.append(name)
    return found.tobytes().hex()


class DecisionLog:
    """It makes lines of records that have their request, in batches, and a thread writes them.

    Several processes may write to one file. `run` ends with the last line written; `close` follows.
    """

    def __init__(self, path: str, models: Sequence[str], salt: int) -> None:
        """`salt` is the same in all processes that serve side by side, and known to nobody else. Raises
        `StartError`.
        """
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"orchestrator.log.decisions: {path}: {error.strerror}") from error
        self._models = models
        self._salt = salt
        self._writer = LineWriter(self._fd, is_for_people=False)
        self._writer.start()
        self._pending: deque[tuple[RequestRecord, LoggedRequest, float]] = deque()

    def note(self, records: Iterable[RequestRecord], offset: float) -> None:
        """Have a line for each of these that is to have one. `offset` makes moments seconds since 1970."""
        for record in records:
            if record.logged is not None:
                self._pending.append((record, record.logged, offset))

    async def run(self) -> None:
        """Write lines until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            while self._pending:
                self.flush(TURN_RECORDS, TURN_BYTES)
                await asyncio.sleep(0)

    def flush(self, records: int, size: int) -> None:
        """Write lines of the oldest records: so many, or until so many bytes of prompts were hashed."""
        lines = bytearray()
        while self._pending and records > 0 and size > 0:
            record, logged, offset = self._pending.popleft()
            lines += self._line(record, logged, offset)
            records -= 1
            size -= min(logged.request.body_bytes(), MOST_BYTES)
            record.logged = None
        if lines:
            self._writer.write(bytes(lines))

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self.flush(len(self._pending), len(self._pending) * MOST_BYTES)
        self._writer.close()
        os.close(self._fd)

    def _line(self, record: RequestRecord, logged: LoggedRequest, offset: float) -> bytes:
        request = logged.request
        decision = Decision(
            received=round(record.received + offset, 6),
            model=self._models[record.model_index],
            prompt_tokens=request.prompt_tokens(),
            status=record.status,
            output_tokens=logged.output_tokens,
            cached_tokens=logged.cached_tokens,
            ttft_s=round(record.first_byte - record.received, 6) if record.first_byte else None,
            prefill_worker=record.prefill_worker,
            decode_worker=record.decode_worker,
            blocks=names_of(request.prompt(MOST_BYTES), self._salt),
        )
        return msgspec.json.encode(decision) + b"\n"
