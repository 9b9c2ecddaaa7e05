"""Files of the folder `broken`, each with the whole of what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from launch.exits import Exit

FOLDER = Path(__file__).parent / "broken"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_each_has_its_text() -> None:
    assert len(NAMES) >= 60
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER)
    assert main(["check", f"{name}.yaml"]) == Exit.USAGE
    assert capsys.readouterr() == ("", (FOLDER / f"{name}.txt").read_text("utf-8"))
