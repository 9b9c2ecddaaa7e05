from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import compiled
from orchestrator.compiled import MODULES, ROOT, SOURCES, is_compiled, is_stale, library


def test_the_modules_that_can_be_compiled_are_there() -> None:
    assert all((ROOT / source).is_file() for source in SOURCES)
    assert len(set(MODULES)) == len(MODULES)


def test_the_library_is_named_by_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in SOURCES:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / source)
    present = library()
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    assert library() == present
    with (tmp_path / SOURCES[-1]).open("a") as source:
        source.write("# an edit\n")
    assert library() != present


def test_what_was_compiled_from_other_sources_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "is_compiled", lambda: True)
    monkeypatch.setattr(compiled, "library", lambda: "baton_present")
    monkeypatch.setitem(sys.modules, "baton_earlier__mypyc", compiled)
    assert is_stale()
    monkeypatch.setitem(sys.modules, "baton_present__mypyc", compiled)
    assert not is_stale()


def test_this_form_is_not_stale() -> None:
    """If it is: `make compile`, or `make pure`."""
    import orchestrator.relay.flow  # noqa: F401

    assert not is_stale()


@pytest.mark.processes
def test_the_command_line_tells_the_form() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert told.stdout.endswith("(compiled)\n" if is_compiled() else "(pure Python)\n")


def set_up(**environment: str) -> subprocess.CompletedProcess[str]:
    """What setup.py says of itself on a machine without a C compiler."""
    command = (sys.executable, "setup.py", "--name")
    env = os.environ | {"CC": "no-such-compiler"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)


@pytest.mark.processes
def test_without_a_compiler_the_modules_stay_python() -> None:
    done = set_up(BATON_COMPILE="")
    assert done.returncode == 0
    assert "stay Python: there is no no-such-compiler" in done.stderr


@pytest.mark.processes
def test_without_a_compiler_a_wish_for_one_fails_in_one_line() -> None:
    done = set_up(BATON_COMPILE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("BATON_COMPILE=1, but there is no no-such-compiler")
    assert done.stderr.count("\n") == 1


@pytest.mark.processes
def test_who_wants_no_compiled_form_hears_nothing_of_it() -> None:
    done = set_up(BATON_COMPILE="0")
    assert (done.returncode, "stay Python" in done.stderr) == (0, False)
