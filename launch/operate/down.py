"""`baton down` stops a run as Ctrl-C would, or ends what one that was killed has left elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import time
from collections.abc import Sequence

from launch.exits import Exit
from launch.local.run_state import FILE, start_of, write
from launch.remote import Failed, Run, find_run, named_run, runs_left, say


def down(arguments: argparse.Namespace) -> int:
    """Stop a run, and wait until it has ended. Raises `Failed`."""
    try:
        run = find_run(arguments)
    except Failed:
        left = _left(arguments)
        if not left:
            raise
        return _swept(left, arguments)
    process = _opened(run)
    try:
        for _ in range(2 if arguments.now else 1):
            signal.pidfd_send_signal(process, signal.SIGTERM)
        if arguments.output == "text":
            say(f"stops {run}")
        if not select.select([process], [], [], arguments.timeout_s)[0]:
            raise Failed(f"{run} has not ended after {arguments.timeout_s:g} s; --now ends it at once")
    except PermissionError:
        raise Failed(f"{run} belongs to another user, who alone can stop it") from None
    except ProcessLookupError:
        pass  # it has just ended
    finally:
        os.close(process)
    _check_none_left(run)
    _show(run, arguments)
    return Exit.OK


def _check_none_left(run: Run) -> None:
    """Raise `Failed` if a run that has just ended says that workers of it may be left on its backend."""
    state = named_run(str(run.directory)).state
    if state.ended is None and state.handle:
        raise Failed(f"{run} has ended, but may have left workers on {state.backend}: run `baton down` again")


def _show(run: Run, arguments: argparse.Namespace) -> None:
    done = {"directory": str(run.directory), "pid": run.state.pid}
    print(json.dumps(done, indent=2) if arguments.output == "json" else "stopped")


def _opened(run: Run) -> int:
    """Return a descriptor of the process, which stays with it whoever gets its number next."""
    try:
        process = os.pidfd_open(run.state.pid)
    except ProcessLookupError:
        raise Failed(f"{run} has just ended") from None
    if start_of(run.state.pid) != run.state.start:
        os.close(process)
        raise Failed(f"{run} has just ended")
    return process


# --- after `baton up` was killed ------------------------------------------------------------------


def _left(arguments: argparse.Namespace) -> Sequence[Run]:
    """Return the runs that are meant and have left workers on their backend."""
    if arguments.run_state is None:
        return runs_left(arguments.run_config)
    run = named_run(arguments.run_state)
    return [run] if run.state.has_left_workers() else []


def _swept(left: Sequence[Run], arguments: argparse.Namespace) -> int:
    for run in left:
        say(f"ends what is left on {run.state.backend} of {run}, which was killed")
        _sweep(run)
        _show(run, arguments)
    return Exit.OK


def _sweep(run: Run) -> None:
    from msgspec.structs import replace

    from launch.backends import BACKENDS
    from launch.backends.base import BackendError

    try:
        BACKENDS[run.state.backend].sweep(run.state.handle)
        write(run.directory / FILE, replace(run.state, ended=time.time(), handle={}))
    except BackendError as error:
        raise Failed(f"{run}: {error}") from error
    except OSError as error:
        raise Failed(f"{run}: its state cannot be written: {error.strerror}") from error
