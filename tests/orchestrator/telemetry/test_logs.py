import asyncio
import errno
import json
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from orchestrator.config.options import LogConfig
from orchestrator.telemetry.logs import (
    ConsoleFormatter,
    JsonFormatter,
    LineWriter,
    configure_logging,
)

HOSTILE = "a\nb\r\x1b[31m\x7f\x9b2J\u2028\u2029\ud800c"


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


@pytest.mark.parametrize(
    ("is_for_people", "told"), [(True, b"(2 log writes dropped: nobody read them)\n"), (False, b"")]
)
def test_dropped_writes_are_counted_in_the_next_one_for_people(
    pipe: tuple[int, int], is_for_people: bool, told: bytes
) -> None:
    reader, fd = pipe

    class Small(LineWriter):
        MAX_WAITING_BYTES = 10

    writer = Small(fd, is_for_people=is_for_people)
    writer.start()
    writer.write(b"0123456789ABC\n")
    writer.write(b"0123456789DEF\n")
    writer.write(b"short\n")
    writer.close()
    assert read_all(reader) == told + b"short\n"


def test_a_closed_descriptor_is_not_an_error() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    LineWriter(fd).write(b"nobody reads this\n")
    os.close(fd)


def test_after_a_full_disk_lines_are_whole_again_and_what_was_lost_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = bytearray()
    room = 8

    def write(fd: int, data: bytes) -> int:
        taken = bytes(data)[: room - len(disk)]
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        disk.extend(taken)
        return len(taken)

    monkeypatch.setattr("orchestrator.telemetry.logs.os.write", write)
    told: list[int] = []
    writer = LineWriter()
    writer.on_lost = told.append
    writer.write(b"one\n")
    writer.write(b"two and more\n")
    writer.write(b"three\nfour\n")
    room = 10_000
    writer.write(b"five\n")
    writer.write(b"six\n")
    assert bytes(disk).decode().splitlines() == [
        "one",
        "two ",
        "(3 log lines lost: No space left on device)",
        "five",
        "six",
    ]
    assert (writer.lost, told) == (3, [1, 3])


def test_a_loop_is_told_of_lost_lines_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("orchestrator.telemetry.logs.os.write", write)
    writer = LineWriter()
    told: list[tuple[int, str]] = []

    async def main() -> None:
        writer.tell_lost(lambda lines, why: told.append((lines, why)))
        thread = threading.Thread(target=writer.write, args=(b"one\ntwo\n",))
        thread.start()
        thread.join()
        await asyncio.sleep(0)

    asyncio.run(main())
    writer.write(b"three\n")
    assert told == [(2, "No space left on device")]


def test_colours_of_uvicorn_are_no_field() -> None:
    record = record_of("started", color_message="\x1b[36mstarted\x1b[0m")
    assert "color" not in JsonFormatter().format(record)
