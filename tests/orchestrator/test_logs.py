import asyncio
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import LogConfig
from orchestrator.logs import (
    AccessLog,
    ConsoleFormatter,
    JsonFormatter,
    LineWriter,
    configure_logging,
    json_line,
    one_line,
    timestamp,
)
from orchestrator.record import Path, RequestRecord
from orchestrator.wire.usage import Kv

HOSTILE = "a\nb\r\x1b[31m\x7f\x9b2J\u2028\u2029\ud800c"


def answered(**changes: object) -> RequestRecord:
    fields: dict[str, object] = {
        "request_id": "req-1",
        "endpoint": "/v1/chat/completions",
        "model_index": 0,
        "is_stream": True,
        "path": Path.DISAGGREGATED,
        "received": 100.0,
        "admitted": 100.5,
        "prefill_done": 101.5,
        "first_byte": 101.75,
        "finished": 105.0,
        "status": 200,
        "kv": Kv.TRANSFERRED,
        "prefill_worker": "tiny/prefill/0",
        "decode_worker": "tiny/decode/1",
        "bytes_in": 10,
        "bytes_out": 20,
        "client": "alice",
    }
    return RequestRecord(**(fields | changes))  # type: ignore[arg-type]


def lines_of(*records: RequestRecord, **options: object) -> list[str]:
    """What an access log with these options writes for the records."""
    written: list[bytes] = []
    log = access_log(deque(records), written.append, **options)

    async def flush() -> None:
        log.flush(len(records))

    asyncio.run(flush())
    return b"".join(written).decode().splitlines()


def access_log(records: deque[RequestRecord], write: Callable[[bytes], None], **options: object) -> AccessLog:
    config = LogConfig.model_validate({"format": "json"} | options)
    return AccessLog(records, ["tiny"], config, write)


# --- access lines -------------------------------------------------------------------------------


def test_a_json_line_has_all_fields() -> None:
    [line] = lines_of(answered())
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "info",
        "logger": "baton.access",
        "id": "req-1",
        "endpoint": "/v1/chat/completions",
        "model": "tiny",
        "path": "disaggregated",
        "status": 200,
        "error": None,
        "stream": True,
        "queue_ms": 500.0,
        "prefill_ms": 1000.0,
        "decode_first_byte_ms": 250.0,
        "total_ms": 5000.0,
        "kv": "transferred",
        "prefill_worker": "tiny/prefill/0",
        "decode_worker": "tiny/decode/1",
        "bytes_in": 10,
        "bytes_out": 20,
        "client": "alice",
    }


def test_a_refused_request_has_a_line_too() -> None:
    record = RequestRecord(
        request_id="r", endpoint="/x", received=1.0, finished=1.5, status=404, error_code="e"
    )
    [line] = lines_of(record)
    fields = json.loads(line)
    assert (fields["model"], fields["path"], fields["kv"], fields["queue_ms"]) == (None, None, None, None)
    assert (fields["status"], fields["error"], fields["total_ms"]) == (404, "e", 500.0)


def test_a_console_line_leaves_out_what_is_not_known() -> None:
    [line] = lines_of(answered(client=None), format="console")
    assert "ACCESS req-1 200 /v1/chat/completions model=tiny path=disaggregated" in line
    assert "client" not in line
    assert "error" not in line


def test_the_time_of_a_line_is_when_the_request_ended() -> None:
    written: list[bytes] = []
    config = LogConfig(format="json")

    async def flush() -> None:
        now = asyncio.get_running_loop().time()
        records = deque([answered(received=now - 60.0, finished=now - 10.0)])
        AccessLog(records, ["tiny"], config, written.append, wall_clock=lambda: 1_000_000_010.0).flush(1)

    asyncio.run(flush())
    assert json.loads(written[0])["time"][:22] in ("2001-09-09T01:46:40.00", "2001-09-09T01:46:39.99")


@pytest.mark.parametrize("format", ["json", "console"])
def test_nothing_in_a_record_breaks_its_line(format: str) -> None:
    lines = lines_of(answered(client=HOSTILE, decode_worker=HOSTILE), format=format)
    assert len(lines) == 1
    assert lines[0].isascii()
    assert lines[0].isprintable()


def test_access_lines_can_be_turned_off() -> None:
    assert lines_of(answered(), access=False) == []


def test_lines_come_in_batches_and_the_last_ones_on_cancellation() -> None:
    records: deque[RequestRecord] = deque()
    written: list[bytes] = []
    has_written = asyncio.Event()

    def write(data: bytes) -> None:
        written.append(data)
        has_written.set()

    async def run() -> None:
        task = asyncio.create_task(access_log(records, write).run())
        records.extend(answered() for _ in range(3))
        async with asyncio.timeout(30):
            await has_written.wait()
        records.append(answered(request_id="last"))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert [data.count(b"\n") for data in written] == [3, 1]
    assert b'"last"' in written[-1]
    assert not records


def test_a_long_batch_is_cut_into_turns_of_the_event_loop() -> None:
    records = deque(answered() for _ in range(AccessLog.SLICE + 1))
    written: list[bytes] = []

    async def run() -> None:
        task = asyncio.create_task(access_log(records, written.append).run())
        async with asyncio.timeout(30):
            while records:  # noqa: ASYNC110 - the log has nobody to tell
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert [data.count(b"\n") for data in written] == [AccessLog.SLICE, 1]


def test_lost_records_are_told(caplog: pytest.LogCaptureFixture) -> None:
    records = deque([answered(), answered()], maxlen=2)
    has_written = asyncio.Event()

    async def run() -> None:
        task = asyncio.create_task(access_log(records, lambda data: has_written.set()).run())
        async with asyncio.timeout(30):
            await has_written.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert "some lines are lost" in caplog.text


# --- slow requests ------------------------------------------------------------------------------


@pytest.mark.parametrize("access", [True, False])
def test_a_slow_request_is_one_warning_with_its_stages(
    caplog: pytest.LogCaptureFixture, access: bool
) -> None:
    lines_of(answered(), answered(finished=104.0, request_id="fast"), slow_request_s=5.0, access=access)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "slow request req-1: queue 0.500 s, prefill 1.000 s, decode_first_byte 0.250 s, total 5.000 s; "
        "model tiny, workers tiny/prefill/0 -> tiny/decode/1"
    )


def test_a_slow_request_that_was_never_admitted_has_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    lines_of(RequestRecord(request_id="r", endpoint="/x", received=0.0, finished=99.0))
    assert [record.getMessage() for record in caplog.records] == [
        "slow request r: total 99.000 s; model unknown, workers none"
    ]


@pytest.mark.parametrize(("epoch_s", "text"), [(0.0, "1970-01-01T00:00:00.000Z"), (1e9 + 0.9996, ".999Z")])
def test_timestamps_are_utc_with_milliseconds(epoch_s: float, text: str) -> None:
    assert timestamp(epoch_s).endswith(text)


# --- text ---------------------------------------------------------------------------------------


@given(st.text(st.characters()))
def test_one_line_is_one_line_and_keeps_what_can_be_printed(text: str) -> None:
    escaped = one_line(text)
    assert len(escaped.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in escaped)
    if text.isprintable():
        assert escaped == text


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans()))
def test_a_json_line_is_read_back(fields: dict[str, object]) -> None:
    line = json_line(fields)
    assert line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1
    if all(not isinstance(value, int) or -(2**63) <= value < 2**64 for value in fields.values()):
        assert json.loads(line) == fields


def test_a_json_line_takes_values_that_json_does_not_know() -> None:
    fields = json.loads(json_line({"error": ValueError("x"), "big": 2**70, "broken": "\ud800"}))
    assert fields == {"error": "x", "big": str(2**70), "broken": "\\ud800"}


# --- the standard library's logging -------------------------------------------------------------


def record_of(message: str, *args: object, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("baton.health", logging.INFO, "file.py", 1, message, args, None)
    vars(record).update(extra)
    return record


def failed_record() -> logging.LogRecord:
    record = record_of("failed")
    try:
        raise ValueError("bad\n2026-01-01T00:00:00Z CRITICAL forged: line")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    return record


def test_json_records_carry_what_was_given_as_extra() -> None:
    fields = json.loads(JsonFormatter().format(record_of("worker %s", "w0", worker="w0")))
    assert fields.pop("time").endswith("Z")
    assert fields == {"level": "info", "logger": "baton.health", "message": "worker w0", "worker": "w0"}


def test_json_records_carry_the_traceback_in_one_line() -> None:
    line = JsonFormatter().format(failed_record())
    assert "\n" not in line
    assert "ValueError: bad\n" in json.loads(line)["exception"]


def test_console_records_cannot_be_forged() -> None:
    assert len(ConsoleFormatter().format(record_of("%s", HOSTILE)).splitlines()) == 1
    first, *rest = ConsoleFormatter().format(failed_record()).splitlines()
    assert first.endswith("INFO baton.health: failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)


@pytest.fixture
def logging_put_back() -> Iterator[None]:
    """Logging is the process's: whatever a test configures is undone."""
    names = ("", "baton", "uvicorn", "uvicorn.error", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in names]
    before = [(lg.level, lg.handlers[:], lg.propagate, lg.disabled) for lg in loggers]
    logging.getLogger().handlers.clear()  # basicConfig(force=True) closes those that it finds
    yield
    for logger, (level, handlers, propagate, disabled) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate, logger.disabled = propagate, disabled


@pytest.mark.usefixtures("logging_put_back")
def test_all_logging_goes_through_the_writer() -> None:
    uvicorn_own = logging.StreamHandler()
    logging.getLogger("uvicorn").addHandler(uvicorn_own)
    written: list[bytes] = []
    configure_logging(LogConfig(format="json", level="info"), written.append)
    logging.getLogger("baton.health").info("ours")
    logging.getLogger("baton.health").debug("too quiet")
    logging.getLogger("uvicorn.error").info("uvicorn's")
    logging.getLogger("uvicorn.access").info("not this one")
    logging.getLogger("httpx").info("nor this one")
    logging.getLogger("httpx").warning("but this")
    assert [json.loads(line)["message"] for line in written] == ["ours", "uvicorn's", "but this"]


@pytest.mark.usefixtures("logging_put_back")
def test_a_record_that_cannot_be_formatted_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(LogConfig(), lambda data: None)
    logging.getLogger("baton").warning("%d", "not a number")
    assert "Logging error" in capsys.readouterr().err


# --- the writer ---------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


def read_all(fd: int) -> bytes:
    """What a pipe holds now."""
    os.set_blocking(fd, False)
    data = b""
    try:
        while chunk := os.read(fd, 1 << 20):
            data += chunk
    except BlockingIOError:
        pass
    return data


@pytest.mark.parametrize("is_started", [True, False])
def test_what_was_written_is_there_after_close(pipe: tuple[int, int], is_started: bool) -> None:
    reader, fd = pipe
    writer = LineWriter(fd)
    if is_started:
        writer.start()
    for number in range(10):
        writer.write(b"%d\n" % number)
    writer.close()
    writer.write(b"after\n")
    writer.close()
    assert read_all(reader).split() == [*(b"%d" % number for number in range(10)), b"after"]


def test_a_reader_that_stalls_stalls_nobody_and_is_told_what_it_missed(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = LineWriter(fd)
    writer.start()
    line = b"x" * (1 << 20) + b"\n"  # far more than a pipe holds
    for _ in range(20):
        writer.write(line)
    writer.close(timeout_s=0.01)
    writer.write(b"nor does it stall later writes\n")

    received: list[bytes] = []

    def drain() -> None:
        while sum(map(len, received)) < 7 * len(line):
            received.append(os.read(reader, 1 << 20))

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    thread.join(30)
    assert b"".join(received) == line * 7


def test_dropped_writes_are_counted_in_the_next_one(pipe: tuple[int, int]) -> None:
    reader, fd = pipe

    class Small(LineWriter):
        MAX_WAITING_BYTES = 10

    writer = Small(fd)
    writer.start()
    writer.write(b"0123456789ABC\n")
    writer.write(b"0123456789DEF\n")
    writer.write(b"short\n")
    writer.close()
    assert read_all(reader) == b"(2 log writes dropped: nobody read them)\nshort\n"


def test_a_closed_descriptor_is_not_an_error() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    LineWriter(fd).write(b"nobody reads this\n")
    os.close(fd)
