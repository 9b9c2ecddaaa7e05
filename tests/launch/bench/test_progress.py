from __future__ import annotations

import asyncio
import io

from launch.bench.measure import Run, Tally
from launch.bench.progress import ProgressLine, describe
from launch.bench.results import Load, Unit
from launch.bench.shapes import WORKLOADS
from tests.launch.bench.fakes import run, sample


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tally() -> Tally:
    made = Tally(Run(WORKLOADS["chat"], Load(4, Unit.RATE), 30.0, "0"), started=100.0, sent=5)
    made.note(sample(ttft_ms=42))
    made.note(sample(error="timeout"))
    return made


def test_what_is_known_in_the_middle() -> None:
    text = "chat, 4 req/s: 12 of 30 s, 5 sent, 2 answered, 1 failed, last TTFT 42 ms"
    assert describe(tally(), 112.0) == text


def test_waiting_for_the_last_answers_takes_no_more_time() -> None:
    assert "30 of 30 s" in describe(tally(), 145.0)


def shown(stream: io.StringIO) -> str:
    async def main() -> None:
        line = ProgressLine(stream)
        line.watch(tally())
        async with line.shown():
            await asyncio.sleep(0)
            line.say("something happened")

    run(main())
    return stream.getvalue()


def test_a_terminal_has_one_line_that_leaves_nothing_behind() -> None:
    text = shown(Terminal())
    assert "5 sent" in text
    assert "\r\x1b[Ksomething happened\n" in text
    assert text.endswith("\r\x1b[K")


def test_a_file_has_only_what_stays() -> None:
    assert shown(io.StringIO()) == "something happened\n"
