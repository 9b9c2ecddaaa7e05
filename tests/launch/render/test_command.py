"""`baton render` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.cli import main
from launch.exits import Exit
from launch.render.options import TARGETS as NAMES
from launch.render.targets import TARGETS
from orchestrator.compiled import ROOT
from orchestrator.config.file import load_config
from orchestrator.config.options import DiscoverConfig, KubernetesConfig

IMAGE = "--set=launch.kubernetes.image=r.example/baton-worker:1"
OPEN = "--set=orchestrator.insecure_no_auth=true"
CONFIG = """\
orchestrator:
  insecure_no_auth: true
  log: {decisions: d.jsonl, level: debug}
  allowed_hosts: [api.example.com]
models:
  - name: sim
    prefill: {engine: sim}
    decode: {engine: sim, replicas: 2}
  - name: away
    both: {urls: ["http://10.0.0.1:8123"]}
routing: {prefill: {policy: prefix}, disaggregate: auto}
launch: {kubernetes: {image: "i:1"}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    return "c.yaml"


def test_the_command_line_names_all_targets() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", ["sim", "gpu-1p1d"])
@pytest.mark.parametrize("target", NAMES)
def test_an_example_is_rendered(
    target: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / f"configs/{name}.yaml")
    assert main(["render", target, config, "-o", str(tmp_path / "out"), IMAGE, OPEN]) == Exit.OK
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path}/out: ")
    assert "note: these Secrets must be there: baton-worker-key\n" in said.err
    assert "create secret generic baton-worker-key" in (tmp_path / "out/README.md").read_text()


def test_the_example_for_kubernetes_is_rendered_as_it_is(tmp_path: Path) -> None:
    config = str(ROOT / "configs/kubernetes.yaml")
    assert main(["check", config]) == Exit.OK
    assert main(["render", "kubernetes", config, "-o", str(tmp_path / "out")]) == Exit.OK


def test_what_else_there_is_to_know_is_said(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine.yaml").write_text("a: 1\n")
    assert main(["render", "kubernetes", file, "-o", "out"]) == Exit.OK
    assert capsys.readouterr().err.splitlines() == [
        "note: these Secrets must be there: baton-worker-key",
        "note: the workers of away/both run elsewhere: nothing is rendered for them",
        "note: orchestrator.log.decisions is left out: a pod's disk ends with it",
        "note: these files in the folder are not of baton render, and are left alone: mine.yaml",
    ]


def test_the_orchestrators_config_is_right(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "kubernetes", file, "-o", "out"]) == Exit.OK
    config = yaml.safe_load(Path("out/config.yaml").read_text())["data"]["baton.yaml"]
    Path("pods.yaml").write_text(config)
    assert main(["check", "pods.yaml"]) == Exit.OK, capsys.readouterr().err
    read = load_config("pods.yaml")
    sim, away = read.models
    assert sim.decode is not None
    assert sim.decode.discover == DiscoverConfig(
        kubernetes=KubernetesConfig(service="baton-sim-decode", port="http")
    )
    assert away == load_config(file).models[1]
    assert read.routing == load_config(file).routing.model_copy(update={"pair": "same_revision"})
    assert read.orchestrator.listen == "0.0.0.0:8000"
    assert read.orchestrator.log.level == "debug"
    assert read.orchestrator.log.decisions is None
    assert "baton.default.svc" in read.orchestrator.allowed_hosts
    assert (read.orchestrator.drain_notice_s, read.orchestrator.timeout_graceful_shutdown) == (5, 600)


def test_keys_and_certificates_are_named_where_pods_have_them(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["key", "new", "me", "--scope", "infer", "--scope", "metrics", "--file", "my keys"]) == Exit.OK
    )
    secret = capsys.readouterr().out.strip()
    keys = ["--set", "orchestrator.api_keys_file=my keys"]
    assert main(["render", "kubernetes", file, "-o", "out", *keys]) == Exit.OK
    whole = "".join(path.read_text() for path in Path("out").iterdir())
    assert secret not in whole
    assert Path("my keys").read_text().split()[1] not in whole
    assert "--from-file=keys='my keys'" in Path("out/README.md").read_text()
    Path("pods.yaml").write_text(yaml.safe_load(Path("out/config.yaml").read_text())["data"]["baton.yaml"])
    capsys.readouterr()
    assert main(["check", "pods.yaml"]) == Exit.USAGE
    assert "cannot read /etc/baton/keys/keys" in capsys.readouterr().err
    assert main(["check", "pods.yaml", *keys]) == Exit.OK


def test_what_changes_in_the_command_line_is_rendered(file: str) -> None:
    sets = ["--set", "models.0.decode.replicas=7", "--set", "launch.kubernetes.namespace=llm"]
    assert main(["render", "kubernetes", file, "-o", "out", *sets]) == Exit.OK
    deployment = next(yaml.safe_load_all(Path("out/workers-sim-decode.yaml").read_text()))
    assert deployment["spec"]["replicas"] == 7
    assert deployment["metadata"]["namespace"] == "llm"


def test_the_other_target_takes_the_folder_over(file: str) -> None:
    assert main(["render", "kubernetes", file, "-o", "out"]) == Exit.OK
    assert main(["render", "helm", file, "-o", "out"]) == Exit.OK
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "Chart.yaml",
        "README.md",
        "templates",
        "values.yaml",
    ]


def test_without_an_image(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(file).write_text(CONFIG.replace('launch: {kubernetes: {image: "i:1"}}\n', ""))
    assert main(["render", "kubernetes", file, "-o", "out"]) == Exit.USAGE
    assert capsys.readouterr().err == (
        "c.yaml: launch.kubernetes is missing: name the image of the workers, in the file or with "
        "--set launch.kubernetes.image=IMAGE\n"
    )
    assert not Path("out").exists()


def test_mistakes_are_found_at_their_place(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["check", file], ["render", "helm", file, "-o", "out"]):
        assert main([*command, "--set", "launch.kubernetes.hostnames=[a.example]"]) == Exit.USAGE
        assert (
            capsys.readouterr().err
            == "--set launch.kubernetes.hostnames: hostnames has no effect without gateway\n"
        )
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_written(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").write_text("")
    assert main(["render", "kubernetes", file, "-o", "out"]) == Exit.FAILED
    assert capsys.readouterr().err.startswith("cannot write out")


def test_no_folder(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "kubernetes", file, "-o", ""]) == Exit.USAGE
    assert capsys.readouterr().err == "c.yaml: -o names no folder\n"
    assert [path.name for path in Path.cwd().iterdir()] == ["c.yaml"]


def test_files_in_the_way(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/config.yaml").write_text("mine: 1\n")
    assert main(["render", "kubernetes", file, "-o", "out"]) == Exit.USAGE
    assert capsys.readouterr().err == (
        "c.yaml: out: config.yaml would be written over, and baton render has not written it, or it was "
        "changed since: name another folder, or add --force\n"
    )
    assert main(["render", "kubernetes", file, "-o", "out", "--force"]) == Exit.OK


def test_another_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["render", "kubernets", "c.yaml", "-o", "out"])
    assert ended.value.code == Exit.USAGE
    assert "did you mean 'kubernetes'?" in capsys.readouterr().err
