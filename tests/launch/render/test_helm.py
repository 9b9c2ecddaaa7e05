"""What helm makes of the chart is what is rendered plainly."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.render.folder import write
from launch.render.targets import TARGETS, Files
from tests.launch.render.clusters import PD, SIM
from tests.launch.render.clusters import cluster as made_of
from tests.launch.render.golden.files import NAMES, cluster
from tests.launch.render.helm import helm_in

pytestmark = [pytest.mark.helm, pytest.mark.processes]

Helm = Callable[..., str]

CLUSTERS = {
    **{name: cluster(name) for name in NAMES},
    "braces": made_of(
        {**PD, "decode": {"args": ["{{ .Values.image }}", "{{{{", "}}", 'a\\b"c']}, "name": "{{x}} 😀\n"}
    ),
    "sets": made_of(PD, SIM, workload="disaggregatedset", gateway="main"),
}


@pytest.fixture(scope="module")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm and returns what it says."""
    program = helm_in(tmp_path_factory.mktemp("helm"))
    if program is None:
        pytest.skip("there is no helm: make cluster installs it, BATON_HELM names one")

    def run(*arguments: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def objects(texts: Iterable[str]) -> Mapping[tuple[str, str], Any]:
    found = [one for text in texts for one in yaml.safe_load_all(text) if one]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def chart(tmp_path: Path, files: Files) -> str:
    write(tmp_path / "chart", files, force=False)
    return str(tmp_path / "chart")


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_chart_makes_the_same_objects(name: str, tmp_path: Path, helm: Helm) -> None:
    made = CLUSTERS[name]
    folder = chart(tmp_path, TARGETS["helm"](made))
    templated = helm("template", made.name, folder, "--namespace", made.options.namespace)
    plain = [text for file, text in TARGETS["kubernetes"](made).items() if file.endswith(".yaml")]
    assert objects([templated]) == objects(plain)


@pytest.mark.parametrize("name", CLUSTERS)
def test_helm_finds_nothing_wrong(name: str, tmp_path: Path, helm: Helm) -> None:
    said = helm("lint", "--strict", chart(tmp_path, TARGETS["helm"](CLUSTERS[name])))
    assert "0 chart(s) failed" in said
    assert "WARNING" not in said


def test_values_are_what_users_change(tmp_path: Path, helm: Helm) -> None:
    folder = chart(tmp_path, TARGETS["helm"](made_of(PD, max_orchestrators=1)))
    plain = TARGETS["kubernetes"](
        made_of(
            {**PD, "decode": {**PD["decode"], "replicas": 9}},
            max_orchestrators=1,
            image="new:2",
            orchestrators=5,
            namespace="other",
        )
    )
    sets = ["image=new:2", "orchestratorImage=new:2", "orchestrators=5", "replicas.baton-qwen-decode=9"]
    templated = helm("template", "x", folder, "--namespace", "other", *(f"--set={one}" for one in sets))
    assert objects([templated]) == objects(text for file, text in plain.items() if file.endswith(".yaml"))
