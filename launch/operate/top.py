"""`baton top` shows live what a run does: one frame after the other in a terminal, a single one elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from launch.exits import Exit
from launch.local.run_state import FILE, NoState, read
from launch.operate.frame import Frame, make_frame
from launch.operate.ps import described
from launch.remote import AnyAdmin, Failed, Run, connect_to, find_run, named_admin, understood

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    _Show = Callable[[Text], object]

PIPE_WIDTH: Final = 160  # cells, where nobody says how many there are


def run(arguments: argparse.Namespace) -> int:
    """Show frames. Raises `Failed` if nothing runs, or ends meanwhile."""
    admin = named_admin(arguments) or connect_to(find_run(arguments))
    with admin:
        if arguments.output == "json":
            frame = _asked(admin, admin.run)
            print(json.dumps({"run": described(admin.run), **frame.document()}, indent=2))
            return Exit.OK
        console = _console()
        if arguments.once or not console.is_terminal:
            _print(console, _asked(admin, admin.run), admin.run)
            return Exit.OK
        try:
            _follow(console, admin, arguments.interval_s)
        except KeyboardInterrupt:  # as one ends `top`
            return Exit.OK
    return Exit.OK


def _console() -> Console:
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False, force_terminal=is_terminal)


def _asked(admin: AnyAdmin, run: Run | None) -> Frame:
    """Ask for all that a frame shows. Raises `Failed`."""
    workers, processes = admin.get("/admin/workers"), admin.get("/admin/processes")
    metrics = admin.text("/metrics")
    with understood(admin.url):
        return make_frame(time.time(), run, workers, processes, metrics)


def _print(console: Console, frame: Frame, run: Run | None, before: Frame | None = None) -> None:
    from launch.operate.screen import drawn

    for line in drawn(frame, run, before, console.width, None, None):
        console.print(line, soft_wrap=True)


# --- live -----------------------------------------------------------------------------------------


def _follow(console: Console, admin: AnyAdmin, interval_s: float) -> None:
    """Show frames until Ctrl-C. Raises `Failed` if the run has ended."""
    from rich.text import Text

    from launch.operate.screen import drawn

    frame: Frame | None = None
    with _shown_in(console) as show:
        while True:
            run, before, problem = _latest(admin.run), frame, None
            try:
                frame = _asked(admin, run)
            except Failed as error:
                if frame is None:
                    raise
                problem = str(error).partition("\n")[0]
            height = None if console.is_dumb_terminal else console.height - 1
            lines = drawn(frame, run, before, console.width, height, problem)
            show(Text("\n").join(lines))
            time.sleep(interval_s)


@contextmanager
def _shown_in(console: Console) -> Iterator[_Show]:
    """Yield what shows a frame in place of the one before; below it in a terminal that cannot do that."""
    if console.is_dumb_terminal:
        yield lambda text: console.print(text, "", sep="\n", soft_wrap=True)
        return
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda text: live.update(text, refresh=True)


def _latest(run: Run | None) -> Run | None:
    """Return the run as its state is now. Raises `Failed` if it has ended."""
    if run is None:
        return None
    try:
        state = read(run.directory / FILE)
    except (OSError, NoState) as error:
        raise Failed(f"the run's state cannot be read any more: {error}") from error
    if not state.is_alive():
        raise Failed(f"the run has ended: {run}")
    return Run(run.directory, state)
