from __future__ import annotations

import io
import os

import pytest

from launch.local.output import Output
from launch.local.progress import Lines, Table, make_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_on_change() -> None:
    stream = io.StringIO()
    progress = make_progress(Output(stream), {"one": "a.log", "two": "b.log"})
    assert isinstance(progress, Lines)
    progress.set("one", "starting")
    progress.set("one", "starting")
    progress.tick()
    progress.set("one", "ready")
    progress.say("hello")
    assert stream.getvalue() == "one: starting (log: a.log)\none: ready\nhello\n"


def test_a_terminal_gets_a_table_and_the_directory_above_it() -> None:
    stream = Terminal()
    assert isinstance(make_progress(Output(stream), {"one": "run/a.log"}), Table)
    assert stream.getvalue() == "logs: run\n"


class Screen:
    """A table on a terminal of 40 columns, and what can be seen there."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = Terminal()
        logs = {"one": "run/a.log", "longer": "run/b.log"}
        self.table = Table(Output(self.stream), logs, clock=lambda: self.now, width=lambda: 40)

    def lines(self) -> list[str]:
        shown: list[str] = []
        for part in self.stream.getvalue().replace("\x1b[J", "").split("\n"):
            up, is_escape, rest = part.rpartition("F")
            if is_escape and up.startswith("\x1b["):
                del shown[-int(up[2:]) :]
                part = rest
            shown.append(part) if part else None
        return shown


def test_one_line_per_process_that_changes_in_place() -> None:
    screen = Screen()
    screen.table.set("one", "starting")
    screen.table.set("longer", "starting")
    screen.now = 3.5
    screen.table.tick()
    assert screen.lines() == ["  one     starting       3 s  a.log", "  longer  starting       3 s  b.log"]
    screen.table.set("one", "ready")
    screen.now = 60
    screen.table.tick()
    assert screen.lines() == ["  one     ready          3 s  a.log", "  longer  starting      60 s  b.log"]


def test_what_is_said_stays_above() -> None:
    screen = Screen()
    screen.table.set("one", "starting")
    screen.table.say("hello\nworld")
    screen.table.set("one", "ready")
    assert screen.lines() == ["hello", "world", "  one     ready          0 s  a.log"]


def test_lines_that_would_wrap_are_cut() -> None:
    screen = Screen()
    screen.table.set("one", "in a state with a very long description")
    assert [len(line) for line in screen.lines()] == [39]


def test_plain_lines_once_it_is_settled() -> None:
    screen = Screen()
    screen.table.set("one", "ready")
    screen.table.settle()
    screen.now = 9
    screen.table.tick()
    screen.table.set("one", "died")
    screen.table.say("hello")
    assert screen.lines() == ["  one     ready          0 s  a.log", "one: died", "hello"]


def test_nothing_more_is_written_once_nobody_takes_it() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        progress = make_progress(Output(stream), {"one": "a.log"})
        for state in ("starting", "ready"):
            progress.set("one", state)
        stream.write("what Python still holds at its end fails no more")


@pytest.mark.parametrize("kind", [Lines, Table])
def test_a_stream_that_is_closed_ends_nobody(kind: type[Lines] | type[Table]) -> None:
    stream = io.StringIO()
    stream.close()
    assert not Output(stream).isatty()
    _show_something(kind(Output(stream), {"one": "a.log"}))


@pytest.mark.parametrize("kind", [Lines, Table])
def test_a_full_disk_ends_nobody(kind: type[Lines] | type[Table]) -> None:
    with open("/dev/full", "w") as stream:
        _show_something(kind(Output(stream), {"one": "a.log"}))


def _show_something(progress: Lines | Table) -> None:
    progress.set("one", "starting")
    progress.say("hello")
    progress.tick()


def test_a_descriptor_that_was_closed_from_the_start() -> None:
    make_progress(Output(None), {"one": "a.log"}).say("hello")
