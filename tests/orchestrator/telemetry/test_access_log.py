import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.config.options import LogConfig
from orchestrator.routing.policies.base import Choice, Reasons
from orchestrator.telemetry.access_log import AccessLog
from orchestrator.telemetry.record import RequestRecord
from tests.orchestrator.records import ANSWERED, request_record

HOSTILE = "a\nb\r\x1b[31m\x7f\x9b2J\u2028\u2029\ud800c"


def chosen(reason: str) -> Choice[Any]:
    """A policy's choice of some worker."""
    return Choice[Any](None, reason)


def answered(**changes: Any) -> RequestRecord:
    own: dict[str, Any] = {
        "model_index": 0,
        "is_stream": True,
        "prefill_worker": "tiny/prefill/0",
        "decode_worker": "tiny/decode/1",
        "reasons": Reasons[Any](
            chosen("It is the next in turn."), chosen("It has the fewest legs under way.")
        ),
        "bytes_in": 10,
        "bytes_out": 20,
        "client": "alice",
    }
    return request_record(**(ANSWERED | own | changes))


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
        "whole_reason": None,
        "prefill_reason": "It is the next in turn.",
        "decode_reason": "It has the fewest legs under way.",
        "handoff_given_up": None,
        "attempts": 1,
        "failed": None,
        "bytes_in": 10,
        "bytes_out": 20,
        "client": "alice",
    }


def test_a_refused_request_has_a_line_too() -> None:
    record = request_record("r", "/x", 1.0, finished=1.5, status=404, error_code="e")
    [line] = lines_of(record)
    fields = json.loads(line)
    assert (fields["model"], fields["path"], fields["kv"], fields["queue_ms"]) == (None, None, None, None)
    assert (fields["status"], fields["error"], fields["total_ms"]) == (404, "e", 500.0)


def test_a_console_line_leaves_out_what_is_not_known() -> None:
    [line] = lines_of(answered(client=None), format="console")
    assert "ACCESS req-1 200 /v1/chat/completions model=tiny path=disaggregated" in line
    assert "client" not in line
    assert "error" not in line


def test_only_a_debug_log_has_reasons_in_its_console_lines() -> None:
    alone = answered(reasons=Reasons[Any](None, chosen(HOSTILE), "echo"))
    for level in ("info", "warning"):
        assert "reason" not in lines_of(alone, format="console", level=level)[0]
    [pair, one] = lines_of(answered(), alone, format="console", level="debug")
    assert pair.endswith(
        ' prefill_reason="It is the next in turn." decode_reason="It has the fewest legs under way."'
    )
    assert ' whole_reason="echo" decode_reason="a' in one
    assert one.isprintable()


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
    lines = lines_of(
        answered(client=HOSTILE, decode_worker=HOSTILE, reasons=Reasons[Any](None, chosen(HOSTILE))),
        format=format,
    )
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
        "model tiny, workers tiny/prefill/0 -> tiny/decode/1 "
        'prefill_reason="It is the next in turn." decode_reason="It has the fewest legs under way."'
    )


def test_a_slow_request_that_was_never_admitted_has_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    lines_of(request_record("r", "/x", 0.0, finished=99.0))
    assert [record.getMessage() for record in caplog.records] == [
        "slow request r: total 99.000 s; model unknown, workers none"
    ]
