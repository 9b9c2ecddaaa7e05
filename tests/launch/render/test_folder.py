"""What users have in a folder is theirs: it is written over only if they say so, and never removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.render.errors import RenderError
from launch.render.folder import is_ours, write


def test_files_are_written_and_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "new/folder"
    for text in ("a: 1\n", "a: 2\n"):
        assert (
            write(folder, {"x.yaml": text, "templates/y.yaml": text, "README.md": "# x\n"}, force=False) == []
        )
        assert (folder / "x.yaml").read_text().partition("\n")[2] == text
        assert is_ours(folder / "templates/y.yaml")
        assert is_ours(folder / "README.md")


def test_files_of_an_earlier_run_go(tmp_path: Path) -> None:
    write(tmp_path, {"x.yaml": "a: 1\n", "templates/y.yaml": "b: 1\n"}, force=False)
    write(tmp_path, {"z.yaml": "a: 1\n"}, force=False)
    assert [path.name for path in tmp_path.rglob("*.yaml")] == ["z.yaml"]


@pytest.mark.parametrize("foreign", ["mine: 1\n", "", "\ufeff\n"])
def test_others_files_are_not_written_over(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "x.yaml").write_text(foreign)
    with pytest.raises(RenderError, match=r"x\.yaml would be written over, .* --force"):
        write(tmp_path, {"a.yaml": "a: 1\n", "x.yaml": "a: 1\n"}, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]
    assert (tmp_path / "x.yaml").read_text() == foreign
    write(tmp_path, {"x.yaml": "a: 1\n"}, force=True)
    assert is_ours(tmp_path / "x.yaml")


def test_a_file_that_was_changed_is_the_users(tmp_path: Path) -> None:
    write(tmp_path, {"x.yaml": "replicas: 1\n"}, force=False)
    changed = (tmp_path / "x.yaml").read_text().replace("1\n", "7\n")
    (tmp_path / "x.yaml").write_text(changed)
    with pytest.raises(RenderError, match="it was changed since"):
        write(tmp_path, {"x.yaml": "replicas: 2\n"}, force=False)
    assert write(tmp_path, {"y.yaml": "a: 1\n"}, force=False) == ["x.yaml"]
    assert (tmp_path / "x.yaml").read_text() == changed


def test_others_files_beside_ours_are_told_and_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "inner").mkdir()
    assert write(tmp_path, {"x.yaml": "a: 1\n"}, force=True) == ["mine.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "mine.yaml", "notes.txt", "x.yaml"]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "x.yaml").symlink_to(target)
    with pytest.raises(RenderError):
        write(folder, {"x.yaml": "a: 1\n"}, force=False)
    write(folder, {"x.yaml": "a: 1\n"}, force=True)
    assert target.read_text() == "precious"


def test_many_files_in_the_way_are_counted(tmp_path: Path) -> None:
    names = [f"{number}.yaml" for number in range(9)]
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(RenderError, match="and 4 more would"):
        write(tmp_path, dict.fromkeys(names, "a: 1\n"), force=False)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OSError, match="x"):
        write(tmp_path / "x", {"a.yaml": "a: 1\n"}, force=False)
