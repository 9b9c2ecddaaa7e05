"""This runs programs that people point at vLLM to their end, against Baton with real vLLM behind it.

    make clients                                        # all; the table of docs/clients.md
    make clients ARGS="--only curl llm"                 # those whose name has one of these words
    make clients ARGS="--record"                        # writes the table into the docs
    make clients ARGS="--url http://127.0.0.1:8000"     # a server that runs already, with tiny-chat

or `.venv/bin/python -m bench.clients [OPTIONS]`. The cluster is that of `configs/quickstart.yaml`, with
tools. What a program needs is installed into `.venv-clients`, with pinned versions (4 GB for all). The exit
code is 1 if one of them does not come to its end, or not with what must come of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from bench.clients.environments import node_folder, python_of
from bench.clients.errors import DOCS
from bench.clients.programs import PROGRAMS, Program, Site
from bench.shared.baton import baton, wait_ready
from bench.shared.command import parser, run
from bench.shared.processes import ROOT, Failed, free_port

START_S = 600.0
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
MODEL = ROOT / "configs/models/tiny-chat"
HEAD = "| program | version | result | s |"


@dataclass(frozen=True)
class Row:
    name: str
    version: str
    found: str
    holds: bool
    seconds: float

    def __str__(self) -> str:
        mark = "" if self.holds else "FAILED: "
        return f"| {self.name} | {self.version} | {mark}{self.found} | {self.seconds:.1f} |"


def tried(program: Program, site: Site) -> Row:
    """Run a program to its end, and say what came of it."""
    version, began = "-", time.monotonic()
    try:
        if program.environment == "node":
            node_folder()
        else:
            python_of(program.environment)
        version, began = program.version(), time.monotonic()
        found, holds = program.run(site), True
    except Failed as failed:
        found, holds = str(failed), False
    return Row(program.name, version, found.replace("|", "\\|"), holds, time.monotonic() - began)


@contextmanager
def quickstart() -> Iterator[str]:
    """Run the quickstart's cluster on ports of its own, with tools; yield its URL."""
    document: Any = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    listen, admin = free_port(), free_port()
    document["orchestrator"] |= {"listen": f"127.0.0.1:{listen}", "admin": f"127.0.0.1:{admin}"}
    (model,) = document["models"]
    model["path"] = str(MODEL)
    for role in ("prefill", "decode"):
        ports = {"port": free_port(), "side_channel_port": free_port()}
        pool = model[role] | {"args": [*model[role]["args"], *TOOLS], "workers": [ports]}
        pool.pop("replicas")
        model[role] = pool
    with baton("up", document, listen, limit_s=START_S):
        wait_ready(listen, START_S)
        yield f"http://127.0.0.1:{listen}"


def answers() -> dict[str, str]:
    """Return what the model knows by heart."""
    known = yaml.safe_load((ROOT / "configs/models/tiny-chat-data.yaml").read_text())["questions"]
    return {entry["ask"]: entry["answer"] for entry in known}


def clients(programs: Sequence[Program], url: str) -> list[Row]:
    """Run all of them, one after the other, and print each row once it is known."""
    print(f"{HEAD}\n|---|---|---|---|", flush=True)
    rows = []
    for program in programs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(program, Site(url, MODEL.name, MODEL, answers(), Path(folder))))
        print(rows[-1], flush=True)
    return rows


def record(rows: Sequence[Row]) -> None:
    """Put the table into the docs, in place of the last one."""
    text = DOCS.read_text()
    before, _, after = text.partition(HEAD)
    rest = after.partition("\n\n")[2]
    lines = [HEAD, "|---|---|---|---|", *map(str, rows), "", f"Last run on {date.today()}"]
    DOCS.write_text(before + "\n".join(lines) + ", " + rest.partition(", ")[2])


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=[""], help="words of names")
    options.add_argument("--url", help="of a server that runs already")
    options.add_argument("--record", action="store_true", help="write the table into docs/clients.md")
    return options.parse_args(argv)


def main() -> int:
    arguments = arguments_of()
    chosen = [one for one in PROGRAMS if any(word in one.name for word in arguments.only)]
    if not chosen:
        raise Failed(f"there is no such program; there are {', '.join(one.name for one in PROGRAMS)}")
    if arguments.url:
        rows = clients(chosen, arguments.url)
    else:
        print("clients: starting vLLM twice", file=sys.stderr, flush=True)
        with quickstart() as url:
            rows = clients(chosen, url)
    if arguments.record:
        record(rows)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    run("clients", main)
