"""`baton down` stops a run by the signals that Ctrl-C would send."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal

from launch.exits import Exit
from launch.local.run_state import start_of
from launch.remote import Failed, Run, find_run, say


def down(arguments: argparse.Namespace) -> int:
    """Stop a run, and wait until it has ended. Raises `Failed`."""
    run = find_run(arguments)
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
    done = {"directory": str(run.directory), "pid": run.state.pid}
    print(json.dumps(done, indent=2) if arguments.output == "json" else "stopped")
    return Exit.OK


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
