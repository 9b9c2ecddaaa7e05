"""`up` shows on stderr a line per process that changes in place, or plain lines without a terminal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import basename, dirname
from typing import Protocol

from launch.local.output import Output
from orchestrator.config.printing import one_line, printable


class Progress(Protocol):
    def add(self, name: str, log: str) -> None:
        """Have one process more, which writes to this file."""
        ...

    def set(self, name: str, state: str) -> None:
        """Show that a process has another state."""
        ...

    def say(self, text: str) -> None:
        """Show something that stays to be read; it may have several lines."""
        ...

    def tick(self) -> None:
        """Show that time has passed. Call this a few times a second."""
        ...

    def settle(self) -> None:
        """Show plain lines only from now on."""
        ...


def make_progress(output: Output, logs: dict[str, str]) -> Progress:
    """Return what fits stderr. `logs` has the log file of each process by name, in the order of display."""
    if not output.isatty():
        return Lines(output, logs)
    table = Table(output, logs)
    table.say(f"logs: {dirname(next(iter(logs.values())))}")
    return table


@dataclass
class Lines:
    """This shows a line per change; the log's name is in the first one of each process."""

    output: Output
    logs: dict[str, str]
    _states: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, log: str) -> None:
        self.logs[name] = log
        self._states.pop(name, None)

    def set(self, name: str, state: str) -> None:
        if self._states.get(name) == state:
            return
        log = "" if name in self._states else f" (log: {self.logs[name]})"
        self._states[name] = state
        self.say(f"{name}: {state}{log}")

    def say(self, text: str) -> None:
        self.output.write(f"{printable(text)}\n")

    def tick(self) -> None:
        """Do nothing: plain lines show no time."""

    def settle(self) -> None:
        """Do nothing: the lines are plain already."""


@dataclass
class Table:
    """A table is a block of lines at the end of the screen, drawn again at every change.

    It shows how long each start took, and its log without the directory, which is named above.
    """

    output: Output
    logs: dict[str, str]
    clock: Callable[[], float] = time.monotonic
    width: Callable[[], int] = lambda: shutil.get_terminal_size().columns
    _states: dict[str, str] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)  # absent while it starts: its time still runs
    _drawn: list[str] = field(default_factory=list)
    _is_settled: bool = False

    def add(self, name: str, log: str) -> None:
        self.logs[name] = log

    def set(self, name: str, state: str) -> None:
        if self._states.get(name) == state:
            return
        self._states[name] = state
        self._keep_time(name, is_starting=state == "starting")
        if self._is_settled:
            self.say(f"{name}: {state}")
        else:
            self._draw(self._lines())

    def _keep_time(self, name: str, *, is_starting: bool) -> None:
        now = self.clock()
        if is_starting:
            self._since[name] = now
            self._until.pop(name, None)
        else:
            self._since.setdefault(name, now)
            self._until[name] = now

    def say(self, text: str) -> None:
        drawn = self._drawn
        self._draw([])
        self.output.write(f"{printable(text)}\n")
        self._draw(drawn)

    def tick(self) -> None:
        if not self._is_settled and self._lines() != self._drawn:
            self._draw(self._lines())

    def settle(self) -> None:
        self._is_settled = True
        self._drawn = []

    def _lines(self) -> list[str]:
        widest = max(len(one_line(name)) for name in self.logs)
        return [self._line(name, widest) for name in self.logs if name in self._states]

    def _line(self, name: str, widest: int) -> str:
        seconds = int(self._until.get(name, self.clock()) - self._since[name])
        log = basename(self.logs[name])
        line = f"  {one_line(name):{widest}}  {self._states[name]:10}  {seconds:4} s  {log}"
        return line[: self.width() - 1]  # a line that wraps could not be drawn over

    def _draw(self, lines: Sequence[str]) -> None:
        over = f"\x1b[{len(self._drawn)}F\x1b[J" if self._drawn else ""
        self.output.write(over + "".join(f"{line}\n" for line in lines))
        self._drawn = list(lines)
