from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import compiled
from orchestrator.compiled import ABOVE, MODULES, ROOT, SOURCES, is_compiled, library
from orchestrator.form import FORM_ENV
from tests.test_architecture import arrows, file_of


def test_the_modules_that_can_be_compiled_are_there() -> None:
    assert all((ROOT / source).is_file() for source in SOURCES)
    assert len(set(MODULES)) == len(MODULES)


def test_the_library_is_named_by_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "orchestrator", tmp_path / "orchestrator")
    present = library()
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    assert library() == present
    with (tmp_path / SOURCES[-1]).open("a") as source:
        source.write("# an edit\n")
    assert library() != present


def test_nothing_that_is_compiled_imports_what_no_build_depends_on() -> None:
    graph: dict[str, set[str]] = {}
    for module, name, _ in arrows("orchestrator"):
        graph.setdefault(module, set()).add(file_of(name))
    found: set[str] = set()
    ahead = set(MODULES)
    while ahead:
        found |= ahead
        ahead = {name for module in ahead for name in graph.get(module, ())} - found
    above = {f"orchestrator.{name.removesuffix('.py')}" for name in ABOVE}
    assert len(found) > len(MODULES)
    assert not {module for module in found if ".".join(module.split(".")[:2]) in above}


def test_this_form_is_of_these_sources() -> None:
    """What the tests run is what BATON_FORM says, and `pure` if it says nothing."""
    import orchestrator.relay.flow as flow

    assert is_compiled() == (os.environ[FORM_ENV] == "compiled")
    assert str(flow.__file__).endswith(".py") != is_compiled()
    assert (f"{library()}__mypyc" in sys.modules) == is_compiled()


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
