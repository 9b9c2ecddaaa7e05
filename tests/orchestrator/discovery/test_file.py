from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from orchestrator.discovery import file as module
from orchestrator.discovery.base import SourceAway
from orchestrator.discovery.file import FileSource, look_again
from orchestrator.wire.member import Member, MemberSet, remove_member, write_member
from tests.orchestrator.discovery.followed import member


def names(found: MemberSet) -> list[str]:
    return sorted(one.name for one in found.members)


def test_changes_of_a_folder_are_told_soon(tmp_path: Path) -> None:
    write_member(tmp_path, member("a"))

    async def main() -> None:
        sets: list[MemberSet] = []
        watching = asyncio.create_task(FileSource(tmp_path).watch(sets.append))
        await until(lambda: bool(sets))
        assert names(sets[-1]) == ["a"]
        write_member(tmp_path, member("b", port=2))
        await until(lambda: names(sets[-1]) == ["a", "b"])
        write_member(tmp_path, member("a", is_draining=True))
        await until(lambda: any(one.is_draining for one in sets[-1].members))
        remove_member(tmp_path, "uid-a")
        await until(lambda: names(sets[-1]) == ["b"])
        (tmp_path / "m%2Fdecode%2Fb.json").write_text("{")
        await until(lambda: bool(sets[-1].problems))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(main())


def test_a_list_may_be_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    path.write_bytes(msgspec.json.encode([member("a")]))

    async def main() -> None:
        sets: list[MemberSet] = []
        watching = asyncio.create_task(FileSource(path).watch(sets.append))
        await until(lambda: bool(sets))
        # As large as before, and perhaps within the grain of the file system's time.
        path.write_bytes(msgspec.json.encode([member("b")]))
        await until(lambda: names(sets[-1]) == ["b"])
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "cannot be understood: "),
        (b"7", "no list"),
    ],
)
def test_a_file_that_is_not_there_or_no_list_is_a_source_that_is_away(
    content: bytes | None, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "members.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceAway, match=why):
        asyncio.run(FileSource(path).watch(lambda found: None))


def test_what_looks_as_before_and_is_old_is_not_read_again(tmp_path: Path) -> None:
    write_member(tmp_path, member("a"))
    file = next(tmp_path.iterdir())
    look, found = look_again(tmp_path, None)
    assert found is not None
    assert look_again(tmp_path, look)[1] is not None  # it is so young that it may look as it did
    old = time.time() - 60
    os.utime(file, (old, old))
    look, found = look_again(tmp_path, look)
    assert found is not None
    assert look_again(tmp_path, look) == (look, None)
    (tmp_path / ".draft").write_text("x")
    assert look_again(tmp_path, look) == (look, None)


def test_a_writer_that_never_rests_hides_nobody(tmp_path: Path) -> None:
    """Readers of a folder see whole files only, however often they are replaced."""
    path = tmp_path / "members"
    for index in range(50):
        write_member(path, member("a", uid=f"u{index}"))
        _, found = look_again(path, None)
        assert found is not None
        assert [one.uid for one in found.members] == [f"u{index}"]
        assert found.problems == ()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # a file system tells no event
            await asyncio.sleep(0.01)


def test_members_of_newer_writers_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(
        msgspec.json.encode({**msgspec.to_builtins(member("a")), "gpu": "H200", "model": "m"})
    )
    _, found = look_again(tmp_path, None)
    assert found is not None
    assert isinstance(found.members[0], Member)


def test_a_list_that_is_no_file_is_a_source_that_is_away(tmp_path: Path) -> None:
    path = tmp_path / "members.json"
    os.mkfifo(path)
    with pytest.raises(SourceAway, match="cannot be read: Is a FIFO"):
        asyncio.run(FileSource(path).watch(lambda found: None))


@pytest.mark.parametrize("odd", ["FIFO", "link", "loop"])
def test_changes_beside_what_is_no_file_are_told(odd: str, tmp_path: Path) -> None:
    """Each is named, also if all else has long looked as it does."""
    write_member(tmp_path, member("a"))
    old = time.time() - 60
    os.utime(next(tmp_path.iterdir()), (old, old))

    async def main() -> None:
        sets: list[MemberSet] = []
        watching = asyncio.create_task(FileSource(tmp_path).watch(sets.append))
        await until(lambda: bool(sets))
        path = tmp_path / "odd.json"
        if odd == "FIFO":
            os.mkfifo(path)
        else:
            path.symlink_to(tmp_path / "nothing" if odd == "link" else path)
        os.utime(path, (old, old), follow_symlinks=False)
        await until(lambda: [problem.place for problem in sets[-1].problems] == ["odd.json"])
        write_member(tmp_path, member("b", port=2))
        await until(lambda: names(sets[-1]) == ["a", "b"])
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(main())


def test_a_file_system_that_does_not_answer_is_told_and_asked_by_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    asked: list[Path] = []

    def hang(path: Path, seen: module.Look | None) -> tuple[module.Look, MemberSet | None]:
        asked.append(path)
        go.wait(60)
        return look_again(path, seen)

    write_member(tmp_path, member("a"))
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "look_again", hang)

    async def main() -> None:
        source = FileSource(tmp_path)
        for _ in range(3):
            with pytest.raises(SourceAway, match="its file system does not answer"):
                await source.watch(lambda found: None)
        await until(lambda: bool(asked))
        assert len(asked) == 1
        go.set()
        sets: list[MemberSet] = []
        while not sets:
            watching = asyncio.ensure_future(source.watch(sets.append))
            await asyncio.wait([watching], timeout=0.2)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        assert names(sets[-1]) == ["a"]

    asyncio.run(main())
