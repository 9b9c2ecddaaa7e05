"""Members are in a folder with a file for each, or in a file that lists them (`wire/member.py`).

Whatever starts workers writes them, perhaps on another machine, over a network file system that tells nobody
of changes: so the folder is looked at again and again, and read when anything in it looks different.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final, NoReturn

from orchestrator.config.options import DiscoverConfig
from orchestrator.discovery.base import PoolKey, Source, SourceAway, Take
from orchestrator.loop.bounded_calls import BoundedCalls
from orchestrator.wire.member import MemberSet, read_members

POLL_S: Final = 0.25  # between two looks
TELL_S: Final = 5.0  # an unchanged set is told again after so long
SETTLED_S: Final = 2.0  # a file that is younger may change without looking different: its time is coarse
CALM_S: Final = 0.1  # a list that was written to so lately may not be whole yet
MOST_LOOKS: Final = 20  # at one that is written to all the time
PATIENCE_S: Final = 10.0  # a look that takes longer hangs in a file system that is away

Look = tuple[tuple[str, int, int, int], ...]  # of each file its name, inode, size and time


def file_source(config: DiscoverConfig, pools: Sequence[PoolKey], random: Random) -> Source:
    return FileSource(Path(config.file or ""))


class FileSource(Source):
    """It reads a folder or a file of members in threads, so that a slow file system holds nothing up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls = BoundedCalls(f"look at {path}", PATIENCE_S)

    async def watch(self, take: Take) -> NoReturn:
        seen: Look | None = None
        told, last = 0.0, MemberSet()
        while True:
            look, found = await self._asked(seen)
            seen = look
            if found is not None:
                last = found
            if found is not None or time.monotonic() >= told + TELL_S:
                told = time.monotonic()
                take(last)
            await asyncio.sleep(POLL_S)

    async def _asked(self, seen: Look | None) -> tuple[Look, MemberSet | None]:
        try:
            return await self._calls.make(look_again, self._path, seen)
        except TimeoutError as error:
            raise SourceAway(f"{self._path} cannot be read: its file system does not answer") from error
        except OSError as error:
            raise SourceAway(f"{self._path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise SourceAway(f"{self._path} cannot be understood: {error}") from error


def look_again(path: Path, seen: Look | None) -> tuple[Look, MemberSet | None]:
    """Return how the files look, and their members if that differs from what was `seen`.

    Raises `OSError` and `ValueError`, as `read_members` does.
    """
    look = _calm_look(path)
    is_settled = all(when < time.time_ns() - SETTLED_S * 1e9 for *_, when in look)
    return look, None if look == seen and is_settled else read_members(path)


def _calm_look(path: Path) -> Look:
    """Return how the files look; a list is not looked at while somebody may still be writing it."""
    for _ in range(MOST_LOOKS):
        look = tuple(sorted(_looks(path)))
        age_s = (time.time_ns() - max((when for *_, when in look), default=0)) / 1e9
        if path.is_dir() or not 0 <= age_s < CALM_S:
            break
        time.sleep(CALM_S - age_s)
    return look


def _looks(path: Path) -> Iterator[tuple[str, int, int, int]]:
    if not path.is_dir():
        yield _look("", path.stat())
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith("."):  # drafts come and go
                with contextlib.suppress(FileNotFoundError):  # it was removed just now
                    yield _look(entry.name, _status(entry))


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    """Return the status of a file, or of a link that leads nowhere."""
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)


def _look(name: str, status: os.stat_result) -> tuple[str, int, int, int]:
    return name, status.st_ino, status.st_size, status.st_mtime_ns
