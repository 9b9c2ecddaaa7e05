from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Any

from orchestrator.http.date import DateLine
from tests.orchestrator.raw_http import GET, app_of, echo, logs_errors, no_errors_logged, run, serving

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures


def test_a_line_is_made_once_a_second() -> None:
    line = DateLine()
    line.refresh(1_000_000_000.1)
    assert line.end == b"date: Sun, 09 Sep 2001 01:46:40 GMT\r\n\r\n"
    assert line.last_end == b"connection: close\r\n" + line.end
    before = line.end
    line.refresh(1_000_000_000.9)
    assert line.end is before
    line.refresh(1_000_000_001.0)
    assert line.end == b"date: Sun, 09 Sep 2001 01:46:41 GMT\r\n\r\n"


def test_every_answer_tells_the_time_and_time_goes_on(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as client:
            first = parsedate_to_datetime((await client.ask(GET)).headers["date"])
            while parsedate_to_datetime((await client.ask(GET)).headers["date"]) == first:
                pass
            assert "date" in (await client.ask(b"broken\r\n\r\n")).headers

    run(main)
