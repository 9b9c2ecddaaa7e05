"""This measures what writes to many sockets cost, one after the other or with other code in between.

    python -m bench.micro.burst [--rounds N]

128 connections of one reader, on another core, get an event each: a step of a worker's engine. `apart` does
some 2 us of other work before each write, `together` does all of that first; `no writes` is that alone.
CPU of the writing thread, median and the lowest tenth of the rounds: other load on the machine only adds.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.shared.command import parser, positive
from bench.shared.cores import share_cores
from bench.shared.figures import aligned, in_rounds, percentile

CONNECTIONS = 128
EVENT = b"x" * 190
PAUSE_S = 0.002  # the reader sleeps, as between two steps
TEXTS = [bytes([number % 256]) * 170 for number in range(5000)]


def other_work(number: int) -> None:
    """Do what is done for an event: look at bytes here and there in memory."""
    for step in range(12):
        TEXTS[(number * 131 + step * 17) % len(TEXTS)].replace(b"a", b"b")


def apart(sockets: Sequence[int]) -> None:
    for number, descriptor in enumerate(sockets):
        other_work(number)
        os.write(descriptor, EVENT)


def together(sockets: Sequence[int]) -> None:
    no_writes(sockets)
    for descriptor in sockets:
        os.write(descriptor, EVENT)


def no_writes(sockets: Sequence[int]) -> None:
    for number in range(len(sockets)):
        other_work(number)


WAYS: dict[str, Callable[[Sequence[int]], None]] = {
    "apart": apart,
    "together": together,
    "no writes": no_writes,
}


def timed(way: Callable[[Sequence[int]], None], sockets: Sequence[int]) -> float:
    """Return microseconds of CPU per event."""
    time.sleep(PAUSE_S)
    start = time.thread_time_ns()
    way(sockets)
    return (time.thread_time_ns() - start) / len(sockets) / 1e3


def read_all(port: int) -> None:
    """Read from all connections until one ends."""
    with ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        opened = (socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS))
        sockets = {one.fileno(): stack.enter_context(one) for one in opened}
        for descriptor in sockets:
            poll.register(descriptor, select.EPOLLIN)
        while all(sockets[descriptor].recv(4096) for descriptor, _ in poll.poll()):
            pass


@contextmanager
def connections() -> Iterator[list[int]]:
    """Yield the descriptors of connections that another process reads."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS))
        reader = multiprocessing.get_context("spawn").Process(
            target=read_all, args=(listener.getsockname()[1],), daemon=True
        )
        reader.start()
        stack.callback(reader.join)
        accepted = [stack.enter_context(listener.accept()[0]) for _ in range(CONNECTIONS)]
        for one in accepted:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield [one.fileno() for one in accepted]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=positive, default=1000)
    rounds = options.parse_args().rounds
    cores = share_cores()
    with connections() as sockets:
        os.sched_setaffinity(0, cores.router)
        found = in_rounds(list(WAYS), rounds, lambda way: timed(WAYS[way], sockets))
    lines = [
        [way, f"{percentile(times, 0.5):.2f}", f"{percentile(times, 0.1):.2f}"]
        for way, times in found.items()
    ]
    print("\n".join(aligned([["us/event", "median", "lowest tenth"], *lines])))


if __name__ == "__main__":
    main()
