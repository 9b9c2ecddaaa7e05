"""Lines: one per request, one per slow request, and whatever the rest of the process logs.

Nothing here holds up the event loop. Access lines are made in batches from finished records, and one daemon
thread does the writing, so that a reader of our stderr that stalls does not stall requests. Nothing that came
from outside can start a new line or send a control sequence to a terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from orchestrator.config import LogConfig
from orchestrator.record import Path, RequestRecord
from orchestrator.telemetry import NO_MODEL, STAGES
from orchestrator.wire.usage import Kv

Write = Callable[[bytes], None]

_log = logging.getLogger("baton.requests")

# --- text that is safe in a line ----------------------------------------------------------------

# C0, DEL, C1, the two Unicode line ends, and lone surrogates, which UTF-8 cannot carry.
_unsafe = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """The text with everything escaped that ends a line or steers a terminal."""
    return text if text.isprintable() else _unsafe.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def json_line(fields: Mapping[str, Any]) -> bytes:
    """The fields as one JSON object and a line end. Values that JSON does not know become their `str`."""
    try:
        line = orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # a lone surrogate, an integer over 64 bits: rare, and must not be lost
        plain = {one_line(str(key)): one_line(str(value)) for key, value in fields.items()}
        line = orjson.dumps(plain, option=orjson.OPT_APPEND_NEWLINE)
    if line.isascii() and b"\x7f" not in line:
        return line
    return _unsafe_in_json.sub(_escape_json, line.decode()).encode()


# What orjson leaves as it is: DEL, C1 and the two Unicode line ends.
_unsafe_in_json = re.compile("[\x7f-\x9f\u2028\u2029]")


def _escape_json(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def timestamp(epoch_s: float) -> str:
    second = int(epoch_s)
    return f"{_to_the_second(second)}.{int((epoch_s - second) * 1000):03d}Z"


@functools.lru_cache(maxsize=16)  # lines of a batch share their second
def _to_the_second(epoch_s: int) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# --- writing ------------------------------------------------------------------------------------


class LineWriter:
    """Writes to a file descriptor in a thread of its own: `write` never blocks; any thread may call it.

    Before `start` and after `close` it writes at once. If the reader stalls, at most `MAX_WAITING_BYTES` are
    kept and later writes are dropped; the first one that fits again is preceded by their number.
    """

    MAX_WAITING_BYTES = 8 * 1024 * 1024

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # of the two numbers below
        self._accepted = 0
        self._dropped = 0
        self._written = 0  # by the thread only
        self._is_stuck = False

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Whole lines only."""
        if self._thread is not None:
            self._put(data)
        elif not self._is_stuck:
            self._write_now(data)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, for `timeout_s` at most. Repeatable; does not close the descriptor."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join(timeout_s)
            self._is_stuck = thread.is_alive()

    def _put(self, data: bytes) -> None:
        with self._lock:
            if self._accepted - self._written + len(data) > self.MAX_WAITING_BYTES:
                self._dropped += 1
                return
            if self._dropped:
                data = b"(%d log writes dropped: nobody read them)\n" % self._dropped + data
                self._dropped = 0
            self._accepted += len(data)
            self._waiting.put(data)

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._write_now(data)
            self._written += len(data)

    def _write_now(self, data: bytes) -> None:
        view = memoryview(data)
        with contextlib.suppress(OSError):  # nobody is left to tell
            while view:
                view = view[os.write(self._fd, view) :]


# --- requests -----------------------------------------------------------------------------------


class AccessLog:
    """Takes the finished records of a `Telemetry` several times a second and makes lines of them."""

    PERIOD_S: Final = 0.1
    # Records per turn of the event loop: about 2 ms of work.
    SLICE: Final = 256

    def __init__(
        self,
        records: deque[RequestRecord],
        models: Sequence[str],
        config: LogConfig,
        write: Write,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._models = (*models, NO_MODEL)  # model_index -1 is the last
        self._model_words = (*(f" model={one_line(model)}" for model in models), "")
        self._slow_s = config.slow_request_s
        self._line = self._json_line if config.format == "json" else self._console_line
        self._is_on = config.access
        self._write = write
        self._wall_clock = wall_clock

    async def run(self) -> None:
        """Write lines until cancelled, then write the last ones."""
        try:
            while True:
                await asyncio.sleep(self.PERIOD_S)
                if len(self._records) == self._records.maxlen:
                    _log.warning("requests end faster than their lines are written: some lines are lost")
                while self._records:
                    self.flush(self.SLICE)
                    await asyncio.sleep(0)
        finally:
            self.flush(len(self._records))

    def flush(self, count: int) -> None:
        """Make lines of the oldest `count` records."""
        records = [self._records.popleft() for _ in range(min(count, len(self._records)))]
        offset = self._wall_clock() - asyncio.get_running_loop().time()
        if self._is_on and records:
            lines = bytearray()  # each line is freed at once: a list of them costs as much again
            for record in records:
                lines += self._line(record, offset)
            self._write(bytes(lines))
        for record in records:
            if record.finished - record.received >= self._slow_s:
                self._warn(record)

    def _console_line(self, record: RequestRecord, offset: float) -> bytes:
        """A line for people: what every request has, then NAME=VALUE for what this one has too."""
        error = f" error={record.error_code}" if record.error_code else ""
        client = f" client={one_line(record.client)}" if record.client else ""
        ended = timestamp(record.finished + offset)
        line = (
            f"{ended} ACCESS {record.request_id} {record.status} {record.endpoint}"
            f"{self._model_words[record.model_index]}{_PATH_WORDS[record.path]}{error}"
            f" stream={record.is_stream}{_stage_words(record)}{_KV_WORDS[record.kv]}{_worker_words(record)}"
            f" bytes_in={record.bytes_in} bytes_out={record.bytes_out}{client}\n"
        )
        return line.encode()

    def _json_line(self, record: RequestRecord, offset: float) -> bytes:
        return json_line(self._fields(record, offset))

    def _fields(self, record: RequestRecord, offset: float) -> dict[str, Any]:
        queue_s, prefill_s, first_byte_s, total_s = record.stages()
        return {
            "time": timestamp(record.finished + offset),
            "level": "info",
            "logger": "baton.access",
            "id": record.request_id,
            "endpoint": record.endpoint,
            "model": self._models[record.model_index] or None,
            "path": _PATHS[record.path],
            "status": record.status,
            "error": record.error_code,
            "stream": record.is_stream,
            "queue_ms": _ms(queue_s),
            "prefill_ms": _ms(prefill_s),
            "decode_first_byte_ms": _ms(first_byte_s),
            "total_ms": _ms(total_s),
            "kv": _KV[record.kv],
            "prefill_worker": record.prefill_worker,
            "decode_worker": record.decode_worker,
            "bytes_in": record.bytes_in,
            "bytes_out": record.bytes_out,
            "client": record.client,
        }

    def _warn(self, record: RequestRecord) -> None:
        stages = dict(zip(STAGES, record.stages(), strict=True))
        _log.warning(
            "slow request %s: %s; model %s, workers %s",
            record.request_id,
            ", ".join(f"{name} {seconds:.3f} s" for name, seconds in stages.items() if seconds is not None),
            self._models[record.model_index] or "unknown",
            " -> ".join(filter(None, (record.prefill_worker, record.decode_worker))) or "none",
        )


_PATHS = tuple(None if path is Path.NONE else path.name.lower() for path in Path)
_KV = tuple(None if kv is Kv.NONE else kv.name.lower() for kv in Kv)
_PATH_WORDS = tuple(f" path={name}" if name else "" for name in _PATHS)
_KV_WORDS = tuple(f" kv={name}" if name else "" for name in _KV)


def _stage_words(record: RequestRecord) -> str:
    queue_s, prefill_s, first_byte_s, total_s = record.stages()
    words = f" total_ms={total_s * 1e3:.3f}"
    if first_byte_s is not None:
        words = f" decode_first_byte_ms={first_byte_s * 1e3:.3f}{words}"
    if prefill_s is not None:
        words = f" prefill_ms={prefill_s * 1e3:.3f}{words}"
    return words if queue_s is None else f" queue_ms={queue_s * 1e3:.3f}{words}"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else int(seconds * 1e6) / 1e3


def _worker_words(record: RequestRecord) -> str:
    prefill, decode = record.prefill_worker, record.decode_worker
    words = f" prefill_worker={one_line(prefill)}" if prefill else ""
    return f"{words} decode_worker={one_line(decode)}" if decode else words


# --- everything else that logs ------------------------------------------------------------------

# What a LogRecord has of its own; anything else was given as `extra` and is a field of the line.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per record, with what was given as `extra`."""

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
    """A line per record; a traceback follows, indented, so that its text cannot pass for a record."""

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"{timestamp(record.created)} {record.levelname} {record.name}: {one_line(record.getMessage())}"
        )
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join([line, *(f"    {one_line(text)}" for text in trace)])


class WriterHandler(logging.Handler):
    """Hands formatted records to a LineWriter."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except Exception:  # as every handler of the standard library: a bad record must not end its request
            self.handleError(record)


# Ours and uvicorn's log at the configured level, other libraries only what is wrong.
_AT_LEVEL = ("baton", "uvicorn")


def configure_logging(config: LogConfig, write: Write) -> None:
    """Send all logging of this process through `write`, uvicorn's too (give uvicorn `log_config=None`).

    uvicorn's access log is turned off: ours knows more. Called once per process, before the first log line.
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
