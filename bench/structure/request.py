"""This traces a chat through prefill and decode, and prints the files and rooms it passes, and its moves.

It is a script of a process of its own: PYTHONPATH is the checkout, the argument its package's folder.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import pairwise
from types import FrameType

from tests.orchestrator.fakes import FakeCluster

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello."}]}
path: list[str] = []  # the file that is run, after each call and each return


def note(frame: FrameType, event: str, _: object) -> None:
    to = {"call": frame, "return": frame.f_back}.get(event)
    if to is not None and to.f_code.co_filename.startswith(sys.argv[1]):
        path.append(to.f_code.co_filename)


async def main() -> None:
    cluster = FakeCluster()
    for profile in (None, note):  # the first request imports what is imported late
        sys.setprofile(profile)
        answer = await cluster.ask(CHAT)
        sys.setprofile(None)
        assert answer.status == 200, answer.sent
    await cluster.aclose()


def summary(kind: str, places: list[str]) -> str:
    moves = sum(one != other for one, other in pairwise(places))
    return f"{len(set(places))} {kind}, {moves} moves"


def room_of(file: str) -> str:
    return file.removeprefix(sys.argv[1]).partition("/")[0]


if __name__ == "__main__":
    asyncio.run(main())
    print(summary("files", path))
    print(summary("rooms", [room_of(file) for file in path]))
