"""A benchmark is a command: it reads its options, and stops what it started, however it ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from bench.shared.processes import Failed
from bench.shared.record import dated
from orchestrator.wire.info import STREAMS, STREAMS_ENV, Streams, streams_from_env


def parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows `about`, the docstring of a benchmark, as it is."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """Read an option that is a number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_streams(options: argparse.ArgumentParser) -> None:
    """Add the option of how legs travel; see `use_streams`."""
    about = f"{STREAMS_ENV} of the orchestrator and of the workers; if not given, as it is set here"
    options.add_argument("--streams", choices=STREAMS, help=about)


def use_streams(given: argparse.Namespace) -> Streams:
    """Have all processes that are started from now on go by the option; return what that is."""
    if given.streams is not None:
        os.environ[STREAMS_ENV] = given.streams
    return streams_from_env(os.environ)


def measured(options: argparse.ArgumentParser, name: str, seconds: str, kind: Callable[[str], float]) -> Any:
    """Add the options that say how much is measured, and where it is written; read them all.

    `seconds` tells what is measured for so long, `kind` reads such a time.
    """
    add = options.add_argument
    add("--rounds", type=positive, help="default: 5, or 2 with --quick")
    add("--seconds", type=kind, help=f"{seconds}; default: 2, or 1 with --quick")
    add("--quick", action="store_true", help="a look, not a measurement")
    add("--output", type=Path, help=f"the JSON file; default: bench/results/{name}-DATE.json")
    given = options.parse_args()
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.seconds = given.seconds or kind("1" if given.quick else "2")
    given.output = given.output or dated(name)
    return given


def run(name: str, main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns, 0 for None. `Failed` becomes a line on stderr and exit code 1.

    SIGTERM and Ctrl-C unwind `main`, so that its blocks stop their processes; then the code is 128 and the
    signal's number.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Failed as failed:
        sys.exit(f"{name}: {failed}")
