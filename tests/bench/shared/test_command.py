from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.shared.command import add_streams, measured, parser, positive, run, use_streams
from bench.shared.processes import Failed


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """`run` takes SIGTERM over for the whole process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def fail() -> None:
    raise Failed("nobody listens")


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("main", "code"),
    [
        (lambda: None, None),
        (lambda: 1, 1),
        (fail, "test: nobody listens"),
        (interrupt, 128 + signal.SIGINT),
        (terminate, 128 + signal.SIGTERM),
    ],
)
def test_a_benchmark_ends_with_its_code(main: Callable[[], int | None], code: object) -> None:
    with pytest.raises(SystemExit) as ended:
        run("test", main)
    assert ended.value.code == code


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr("sys.argv", ["test", *arguments])
    return measured(parser("A test."), "test", "of load", positive)


def test_quick_is_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, quick = options(monkeypatch), options(monkeypatch, "--quick", "--seconds", "7")
    assert (whole.rounds, whole.seconds) == (5, 2)
    assert (quick.rounds, quick.seconds) == (2, 7)
    assert whole.output.match("bench/results/test-*.json")
    assert options(monkeypatch, "--output", "a.json").output == Path("a.json")


def test_there_is_no_such_thing_as_no_rounds() -> None:
    assert positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive("0")


@pytest.mark.parametrize(
    ("argv", "set_here", "used"),
    [
        ([], None, "http"),
        ([], "mux", "mux"),
        (["--streams", "mux"], None, "mux"),
        (["--streams", "http"], "mux", "http"),
    ],
)
def test_how_legs_travel_is_as_given_or_else_as_it_is_set(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], set_here: str | None, used: str
) -> None:
    monkeypatch.setenv("BATON_STREAMS", set_here or "")  # so that it is put back afterwards
    options = parser("")
    add_streams(options)
    assert use_streams(options.parse_args(argv)) == used
    assert (os.environ["BATON_STREAMS"] or "http") == used
