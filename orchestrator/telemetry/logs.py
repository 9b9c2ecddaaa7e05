"""Log lines are made and written here; `telemetry/access_log.py` makes those of requests.

Nothing here holds up the event loop: one daemon thread does the writing, so that a reader of our stderr that
stalls does not stall requests. Nothing that came from outside can start a new line or send a control sequence
to a terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable

from orchestrator.config.options import LogConfig
from orchestrator.config.printing import one_line
from orchestrator.telemetry.lines import json_line, timestamp

Write = Callable[[bytes], None]
_NEWLINE = 10

# --- writing ------------------------------------------------------------------------------------


class LineWriter:
    """A line writer has a thread of its own: `write` never blocks, and any thread may call it.

    Before `start` and after `close` it writes at once. If the reader stalls, at most `MAX_WAITING_BYTES` are
    kept and later writes are dropped; the first one that fits again is preceded by their number, in lines
    for people. So is the first one after a disk was full, whose last line is ended first. `lost` counts lines
    of both kinds.
    """

    MAX_WAITING_BYTES = 8 * 1024 * 1024

    def __init__(self, fd: int = 2, *, is_for_people: bool = True) -> None:
        self._fd = fd
        self._is_for_people = is_for_people
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the two numbers below
        self._accepted = 0
        self._dropped = 0
        self._written = 0  # by the thread only
        self._is_stuck = False
        self._is_cut = False  # what was written last ends in the middle of a line
        self._gap = 0  # lines that were lost since the last that was written
        self.why = ""  # some were lost
        self.lost = 0
        self.on_lost: Callable[[int], None] = lambda lost: None  # is told `lost`, by any thread

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Write whole lines, or drop them if too much is pending."""
        if self._thread is not None:
            self._put(data)
        elif not self._is_stuck:
            self._write_now(data)

    def tell_lost(self, note: Callable[[int, str], None]) -> None:
        """Have the running event loop call `note` whenever lines are lost, with their number so far and why.

        It is not called any more once the loop is closed.
        """
        loop = asyncio.get_running_loop()

        def on_lost(lost: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(note, lost, self.why)

        self.on_lost = on_lost

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is pending, for `timeout_s` at most. The descriptor stays open. This can be repeated."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join(timeout_s)
            self._is_stuck = thread.is_alive()

    def _put(self, data: bytes) -> None:
        with self._lock:
            if self._accepted - self._written + len(data) > self.MAX_WAITING_BYTES:
                self._dropped += 1
                self.why = "nobody reads them"
                self._note_lost(data.count(b"\n"))
                return
            if self._dropped and self._is_for_people:
                data = b"(%d log writes dropped: nobody read them)\n" % self._dropped + data
            self._dropped = 0
            self._accepted += len(data)
            self._waiting.put(data)

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._write_now(data)
            self._written += len(data)

    def _write_now(self, data: bytes) -> None:
        head = self._after_gap()
        whole, done = memoryview(head + data), 0
        try:
            while done < len(whole):
                done += os.write(self._fd, whole[done:])
        except OSError as error:  # a full disk; or nobody is left to tell
            if done >= len(head):
                self._gap = 0
            if done:
                self._is_cut = whole[done - 1] != _NEWLINE
            self._note_gap(bytes(whole[max(done, len(head)) :]).count(b"\n"), error)
        else:
            self._gap = 0
            self._is_cut = False

    def _after_gap(self) -> bytes:
        """Return what stands before the first line after some were lost."""
        if not self._gap:
            return b""
        end = b"\n" if self._is_cut else b""
        if not self._is_for_people:
            return end
        return end + b"(%d log lines lost: %s)\n" % (self._gap, self.why.encode())

    def _note_gap(self, lost: int, error: OSError) -> None:
        self._gap += lost
        self.why = error.strerror or str(error)
        self._note_lost(lost)

    def _note_lost(self, lines: int) -> None:
        self.lost += lines
        self.on_lost(self.lost)


def lost_lines(lines: int, why: str) -> str:
    """Return a sentence about lines that were lost."""
    return f"{lines} lines of the log were lost so far: {why}"


# --- everything else that logs ------------------------------------------------------------------

# What a LogRecord has of its own; anything else was given as `extra` and is a field of the line.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    *("message", "asctime", "taskName"),
    "color_message",  # uvicorn's, with the control sequences of a terminal
}


class JsonFormatter(logging.Formatter):
    """This formatter makes a JSON object of each record, with what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json_line(fields).decode().rstrip("\n")


class ConsoleFormatter(logging.Formatter):
    """This formatter makes a line of each record; a traceback is indented, so that it looks like none."""

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{timestamp(record.created)} {record.levelname} {record.name}: {one_line(record.getMessage())}"
        )
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join([line, *(f"    {one_line(text)}" for text in trace)])


class WriterHandler(logging.Handler):
    """This handler hands formatted records to a `LineWriter`."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except Exception:  # as every handler of the standard library: a bad record must not end its request
            self.handleError(record)


# Ours and uvicorn's loggers have the configured level; other libraries log only what is wrong.
_AT_LEVEL = ("baton", "uvicorn")


def configure_logging(config: LogConfig, write: Write) -> None:
    """Send all logging of this process through `write`, uvicorn's too (give uvicorn `log_config=None`).

    uvicorn's access log is turned off: ours knows more. Call this once per process, before the first log
    line.
    """
    handler = WriterHandler(write)
    handler.setFormatter(JsonFormatter() if config.format == "json" else ConsoleFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in (*_AT_LEVEL, "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    for name in _AT_LEVEL:
        logging.getLogger(name).setLevel(config.level.upper())
    logging.getLogger("uvicorn.access").disabled = True
