from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from bench.shared.processes import free_port
from launch.cli import main
from launch.exits import Exit
from launch.init import ENGINES, SCHEMA, config_text
from orchestrator.config.file import load_config
from tests.baton import baton

COMMENTED = re.compile(r"^( *)# (\w+: .*)$", re.MULTILINE)  # an option that is left out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("engine", ENGINES)
def test_what_it_writes_is_right(folder: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--engine", engine]) == Exit.OK
    assert capsys.readouterr().out.startswith("wrote baton.yaml; next: baton check baton.yaml, ")
    assert main(["check", "baton.yaml"]) == Exit.OK
    head = (folder / "baton.yaml").read_text().splitlines()[0]
    assert head == "# yaml-language-server: $schema=.baton/schema.json"
    assert "models" in json.loads((folder / ".baton/schema.json").read_text())["properties"]


@pytest.mark.parametrize("engine", ENGINES)
def test_each_option_that_is_left_out_is_right_too(folder: Path, engine: str) -> None:
    text = config_text("c.yaml", engine)
    (folder / "keys").write_text(f"me {'0' * 64}\n")
    options = list(COMMENTED.finditer(text))
    assert len(options) >= 6
    for option in options:
        given = text[: option.start()] + option[1] + option[2] + text[option.end() :]
        if option[2].startswith("workers:"):
            given = given.replace("      replicas: 1\n      gpus_per_replica: 1\n      seats", "      seats")
        (folder / "c.yaml").write_text(given)
        assert load_config("c.yaml"), option[2]
        assert yaml.safe_load(given) != yaml.safe_load(text), option[2]


def test_nothing_is_written_over_unless_that_is_wanted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.yaml").write_text("mine")
    assert main(["init", "mine.yaml"]) == Exit.USAGE
    assert capsys.readouterr().err == "mine.yaml is there already: give another name, or --force\n"
    assert (folder / "mine.yaml").read_text() == "mine"
    assert main(["init", "mine.yaml", "--force"]) == Exit.OK
    assert main(["check", "mine.yaml"]) == Exit.OK


@pytest.mark.usefixtures("folder")
def test_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "no-such-folder/c.yaml"]) == Exit.USAGE
    assert capsys.readouterr().err == "no-such-folder/c.yaml cannot be written: No such file or directory\n"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_schema_that_cannot_be_written(
    folder: Path, force: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".baton").touch()
    assert main(["init", "y.yaml", *force]) == Exit.USAGE
    said = ".baton is no directory: .baton/schema.json is to be written; move it away\n"
    assert capsys.readouterr() == ("", said)
    assert [path.name for path in folder.iterdir()] == [".baton"]
    (folder / "y.yaml").write_text("mine")
    assert main(["init", "y.yaml", "--force"]) == Exit.USAGE
    assert (folder / "y.yaml").read_text() == "mine"
    (folder / ".baton").unlink()
    (folder / SCHEMA).mkdir(parents=True)
    capsys.readouterr()
    assert main(["init", "y.yaml", "--force"]) == Exit.USAGE
    assert capsys.readouterr().err == ".baton/schema.json cannot be written: Is a directory\n"


@pytest.mark.processes
def test_simulated_workers_start_from_it(folder: Path) -> None:
    assert main(["init", "--engine", "sim"]) == Exit.OK
    places = [{"port": free_port(), "side_channel_port": free_port()} for _ in range(2)]
    sets = ["orchestrator.admin=null", f"orchestrator.listen=127.0.0.1:{free_port()}"]
    for role, place in zip(("prefill", "decode"), places, strict=True):
        sets += [f"models.0.{role}.replicas=null", f"models.0.{role}.workers={json.dumps([place])}"]
    options = [word for one in sets for word in ("--set", one)]
    with baton("up", "baton.yaml", *options, cwd=folder, transport="orjson") as url:
        assert url.startswith("http://127.0.0.1:")
