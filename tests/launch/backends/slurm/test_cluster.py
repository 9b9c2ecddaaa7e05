from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.backends.slurm import cluster


def test_a_cluster_by_hand_tells_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cluster.main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "[-h] DIR" in said
    assert "Start a real Slurm of four nodes on this machine" in said


@pytest.mark.parametrize("arguments", [[], ["--nodes"], ["one", "two"]])
def test_a_cluster_by_hand_takes_one_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cluster.main(arguments)
    assert caught.value.code == 2
    assert "[-h] DIR" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_no_place_for_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "lacks", lambda: None)
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        cluster.main([str(tmp_path)])
    assert f"{tmp_path} is there already: name a new folder" in capsys.readouterr().err


def test_a_machine_without_slurm_has_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "lacks", lambda: "needs slurmd: apt-get install slurmd")
    with pytest.raises(SystemExit):
        cluster.main([str(tmp_path / "new")])
    assert "needs slurmd: apt-get install slurmd" in capsys.readouterr().err
