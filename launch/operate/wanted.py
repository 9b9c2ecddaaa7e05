"""`baton scale CONFIG` prints how many workers a running orchestrator wants, and why."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from launch.exits import Exit
from launch.remote import Mistaken, connect_to, find_run, named_admin, understood

PAGE = "/admin/scaling"


def wanted(arguments: argparse.Namespace) -> int:
    """Print what the run of a config wants. Raises `Failed`."""
    _check(arguments)
    admin = named_admin(arguments)
    if admin is None:
        if arguments.run_state is None:
            arguments.run_config = arguments.pool
        admin = connect_to(find_run(arguments))
    with admin, understood(admin.url):
        wishes: Sequence[Mapping[str, Any]] = admin.get(PAGE)
        print(json.dumps(wishes, indent=2) if arguments.output == "json" else _text(wishes))
    return Exit.OK


def _check(arguments: argparse.Namespace) -> None:
    if arguments.force or arguments.run_config is not None:
        raise Mistaken("what is wanted is printed for CONFIG alone: without --config and --force")
    if not os.path.exists(arguments.pool):
        raise Mistaken(f"there is no file {arguments.pool!r}; for so many workers give MODEL/ROLE N")


def _text(wishes: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each model, P:D as people write it, and one for each pool."""
    from orchestrator.config.printing import one_line

    if not wishes:
        return "nothing is known yet: the orchestrator has just started"
    lines: list[str] = []
    for model in dict.fromkeys(wish["model"] for wish in wishes):
        own = [wish for wish in wishes if wish["model"] == model]
        ratio = ":".join(str(wish["wanted"]) for wish in own)
        lines.append(f"{model}: {ratio} ({':'.join(wish['role'] for wish in own)})")
        lines += (f"  {wish['role']}: {_counts(wish)}; {wish['why']}" for wish in own)
    return "\n".join(map(one_line, lines))


def _counts(wish: Mapping[str, Any]) -> str:
    parts = [f"{wish['wanted']} wanted", f"{wish['ready']} ready"]
    parts += (f"{wish[stage]} {stage}" for stage in ("starting", "draining") if wish[stage])
    return ", ".join(parts)
