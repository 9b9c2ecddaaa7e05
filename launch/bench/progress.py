"""One line on stderr that says how far a run is; nothing at all where nobody looks."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from typing import TextIO

from launch.bench.measure import Tally

_PERIOD_S = 0.25


class ProgressLine:
    """`watch` is for `measure`; the line is drawn inside of `shown()`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tally: Tally | None = None

    def watch(self, tally: Tally) -> None:
        self._tally = tally

    def say(self, text: str) -> None:
        """Something that stays to be read."""
        self._draw("")
        print(text, file=self._stream, flush=True)

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._keep_drawing()) if self._stream.isatty() else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                self._draw("")

    async def _keep_drawing(self) -> None:
        while True:
            if self._tally is not None:
                self._draw(describe(self._tally, time.perf_counter()))
            await asyncio.sleep(_PERIOD_S)

    def _draw(self, text: str) -> None:
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be drawn over
            self._stream.write(f"\r\x1b[K{text[:width]}")
            self._stream.flush()


def describe(tally: Tally, now: float) -> str:
    """What is known in the middle of a run."""
    run, answered = tally.run, len(tally.samples)
    elapsed = min(now - tally.started, run.duration_s)
    text = f"{run.workload.name}, {run.load}: {elapsed:.0f} of {run.duration_s:.0f} s, {tally.sent} sent"
    text += f", {answered} answered" + (f", {tally.failed} failed" if tally.failed else "")
    last = next((sample for sample in reversed(tally.samples) if sample.is_ok), None)
    return text + (f", last TTFT {last.ttft_s * 1e3:.0f} ms" if last else "")
