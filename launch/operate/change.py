"""`baton restart` and `baton scale` have `baton up` change what runs, and show how that goes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from launch.exits import Exit
from launch.remote import Failed, Mistaken, Run, asked, find_run, say, unknown


def restart(arguments: argparse.Namespace) -> int:
    """Restart workers. Raises `Failed`."""
    if bool(arguments.names) == arguments.rolling:
        raise Mistaken("name the workers to restart, or all of them by --rolling")
    run = find_run(arguments)
    run.check_names(arguments.names)
    done = _changed(run, arguments, {"command": "restart", "workers": arguments.names})
    _show(arguments, done, f"restarted: {', '.join(done['restarted'])}")
    return Exit.OK


def scale(arguments: argparse.Namespace) -> int:
    """Give a pool another number of workers. Raises `Failed`."""
    if arguments.run_admin is not None:
        raise Mistaken("`baton up` starts and stops workers: name a run by --config or --state, not --admin")
    run = find_run(arguments)
    pools = list(
        dict.fromkeys(entry.name.rpartition("/")[0] for entry in run.state.processes if "/" in entry.name)
    )
    if "/" not in arguments.pool and os.path.exists(arguments.pool):
        raise Mistaken("so many workers are given for a pool: baton scale MODEL/ROLE N, without CONFIG")
    if arguments.pool not in pools:
        raise Failed(unknown("pool that this run has started workers of", arguments.pool, pools))
    from orchestrator.config.printing import counted

    model, _, role = arguments.pool.rpartition("/")
    request = {"command": "scale", "model": model, "role": role, "count": arguments.count}
    done = _changed(run, arguments, request)
    _show(
        arguments, done, f"{arguments.pool} has {counted(done['count'], 'worker')}, {done['before']} before"
    )
    return Exit.OK


def _changed(run: Run, arguments: argparse.Namespace, request: Mapping[str, object]) -> dict[str, Any]:
    """Have it done, and return what came of it. Raises `Failed`."""
    how = {"is_forced": arguments.force, "timeout_s": arguments.timeout_s}
    with asked(run, {**request, **how}) as answers:
        try:
            for answer in answers:
                if "say" in answer:
                    say(answer["say"])
                elif "error" in answer:
                    raise Failed(answer["error"])
                else:
                    done: dict[str, Any] = answer["done"]
                    return done
        except KeyboardInterrupt:
            say("given up: what was begun is brought to its end, and nothing follows")
            raise
    raise Failed(f"{run} has ended meanwhile")


def _show(arguments: argparse.Namespace, done: Mapping[str, object], text: str) -> None:
    from orchestrator.config.printing import one_line

    print(json.dumps(done, indent=2) if arguments.output == "json" else one_line(text))
