"""An actor without Ray: what it tells of its engine, and of an engine that cannot be started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from launch.backends.ray import actor as module
from launch.backends.ray.actor import WorkerActor, _Output
from launch.local.processes import UNKNOWN_CODE
from orchestrator import __version__
from tests.launch.planning import config, model
from tests.waiting import is_running, wait_for, wait_until_gone

CONFIG = config(model(both={"engine": "sim"})).model_dump_json(exclude_unset=True)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerActor]]:
    """Makes actors, which would end this process with their engines, and ends these."""
    context = SimpleNamespace(get_actor_id=lambda: "a1")
    stand_in: Any = SimpleNamespace(
        get_runtime_context=lambda: context, util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    )
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    monkeypatch.setattr(module.os, "_exit", lambda code: None)
    made: list[WorkerActor] = []

    def make(name: str = "m/both/0", version: str = __version__) -> WorkerActor:
        made.append(WorkerActor(CONFIG, name, {}, version))
        return made[-1]

    yield make
    for one in made:
        one.stop(5.0)
        one._guard.__exit__(None, None, None)
        one._reserved.close()
        one._output.close()


@pytest.mark.processes
def test_an_engine_is_started_told_of_and_ended(actors: Callable[..., WorkerActor]) -> None:
    made = actors()
    first = made.report("", 0, 1.0, 0.0)
    assert first["uid"].startswith("a1-")
    wait_for(lambda: answers(first["ready_url"]), "the engine")
    assert made._group is not None
    pid = made._group.group
    assert "RAY_JOB_ID" not in Path(f"/proc/{pid}/environ").read_text()
    wait_for(lambda: b"ready" in made.report("", 0, 1.0, 0.0)["output"], "its output")
    assert made.stop(5.0)
    wait_until_gone([pid])
    wait_for(lambda: made.report(first["uid"], 0, 1.0, 0.0)["code"] is not None, "the news of its end")


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.processes
def test_the_guard_ends_an_engine_whose_actor_is_gone(actors: Callable[..., WorkerActor]) -> None:
    made = actors()
    assert made._group is not None
    pid = made._group.group
    assert is_running(pid)
    os.close(made._guard._writing)  # as the end of the actor's process would
    made._guard._writing = os.open(os.devnull, os.O_WRONLY)
    wait_until_gone([pid])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"version": "0.0.0"}, f"Baton {__version__} is installed there, and `baton up` is 0.0.0"),
        ({"name": "m/decode/0"}, "the config has no such pool whose workers Baton starts"),
    ],
)
def test_what_keeps_an_engine_from_being_started_is_told(
    actors: Callable[..., WorkerActor], options: dict[str, str], told: str
) -> None:
    report = actors(**options).report("", 0, 1.0, 0.0)
    assert (report["code"], report["ready_url"]) == (UNKNOWN_CODE, "")
    assert told in report["output"].decode()


@pytest.fixture
def output() -> Iterator[_Output]:
    made = _Output()
    yield made
    made.close()


def test_output_is_fetched_piece_by_piece(output: _Output) -> None:
    output.note("one")
    offset, piece = output.after(0)
    assert (offset, piece, output.has_more(offset)) == (4, b"one\n", False)
    output.note("two")
    assert output.after(offset) == (8, b"two\n")
    assert output.after(0) == (8, b"one\ntwo\n")


def test_what_was_fetched_is_forgotten(output: _Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORGET_LOG_BYTES", 4)
    with output.path.open("ab") as engine:
        engine.write(b"one\n")
        engine.flush()
        assert output.after(0) == (4, b"one\n")
        assert output.after(4) == (4, b"")
        engine.write(b"two\n")
        engine.flush()
    assert output._size() == 4
    assert output.after(4) == (8, b"two\n")


def test_what_nobody_fetches_is_bounded(output: _Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 3)
    output.note("more than three")
    assert output.after(0) == (16, b"")
    assert output._size() == 0
