"""What the proxy does to a connection whose two ends the test holds.

Pauses are an hour long where a test ends them by removing the toxic, so nothing depends on how fast it runs.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.proxy import (
    DIRECTIONS,
    Bandwidth,
    Direction,
    Down,
    FaultProxy,
    Latency,
    Limit,
    Reset,
    Slicer,
    SlowClose,
    Timeout,
    Toxic,
)
from tests.waiting import LIMIT_S, wait_for

HOUR_S = 3600.0
LOOK_S = 0.05  # how long to look for what must not come: too short a look misses a fault, and reports none
SAID = bytes(range(256)) * 4


class Ends:
    """Connects through a proxy, and holds both ends of each connection."""

    def __init__(self, proxy: FaultProxy, target: socket.socket, stack: contextlib.ExitStack) -> None:
        self.proxy = proxy
        self._target = target
        self._stack = stack

    def connect(self) -> Connection:
        before = self.proxy.open_connections
        client = self._kept(socket.create_connection(self.proxy.address, LIMIT_S))
        server = self._kept(self._target.accept()[0])
        server.settimeout(LIMIT_S)
        wait_for(lambda: self.proxy.open_connections > before, "the connection")
        return Connection(client, server)

    def _kept(self, sock: socket.socket) -> socket.socket:
        return self._stack.enter_context(sock)


class Connection:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server

    def along(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        """Who sends and who receives."""
        return (self.client, self.server) if direction == "upstream" else (self.server, self.client)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        target.settimeout(LIMIT_S)
        proxy = stack.enter_context(FaultProxy(target.getsockname()))
        yield Ends(proxy, target, stack)


def received(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def is_silent(sock: socket.socket) -> bool:
    """Whether neither bytes nor an end come."""
    sock.settimeout(LOOK_S)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    else:
        return False
    finally:
        sock.settimeout(LIMIT_S)


def is_reset(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) != b"" and is_reset(sock)
    except ConnectionResetError:
        return True


def connect_and_wait(proxy: FaultProxy) -> None:
    with socket.create_connection(proxy.address, LIMIT_S) as client:
        client.recv(1)


def assert_passes(link: Connection) -> None:
    for direction in DIRECTIONS:
        sender, receiver = link.along(direction)
        sender.sendall(SAID)
        assert received(receiver, len(SAID)) == SAID


both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


# --- without toxics -----------------------------------------------------------------------------


def test_passes_on_bytes_of_several_connections_both_ways(ends: Ends) -> None:
    links = [ends.connect() for _ in range(3)]
    for link in links:
        assert_passes(link)


@both_directions
def test_a_half_that_is_closed_leaves_the_other_open(ends: Ends, direction: Direction) -> None:
    sender, receiver = ends.connect().along(direction)
    sender.shutdown(socket.SHUT_WR)
    assert receiver.recv(1) == b""
    receiver.sendall(SAID)
    assert received(sender, len(SAID)) == SAID


@both_directions
def test_a_reset_is_passed_on(ends: Ends, direction: Direction) -> None:
    sender, receiver = ends.connect().along(direction)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sender.close()
    assert is_reset(receiver)


def test_a_client_is_reset_when_the_target_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with FaultProxy(address) as proxy, pytest.raises(ConnectionResetError):
        connect_and_wait(proxy)


def test_a_receiver_that_does_not_read_stops_the_sender(ends: Ends) -> None:
    link = ends.connect()
    link.client.settimeout(LOOK_S)
    with pytest.raises(TimeoutError):
        link.client.sendall(bytes(256 << 20))


def test_nothing_is_kept_of_a_connection_that_is_over(ends: Ends) -> None:
    link = ends.connect()
    for sock in (link.client, link.server):
        sock.close()
    wait_for(lambda: ends.proxy.open_connections == 0, "the end of the connection")


def test_connections_are_reset_when_the_proxy_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        with FaultProxy(target.getsockname()) as proxy:
            client = socket.create_connection(proxy.address, LIMIT_S)
            server, _ = target.accept()
        with client, server:
            assert is_reset(client)
            assert is_reset(server)


# --- switching on and off -----------------------------------------------------------------------


SLOWING = [Latency(HOUR_S), Bandwidth(1 / HOUR_S), Timeout()]


@both_directions
@pytest.mark.parametrize("toxic", SLOWING, ids=repr)
def test_holds_up_one_direction_of_open_and_new_connections(
    ends: Ends, toxic: Toxic, direction: Direction
) -> None:
    links = [ends.connect()]
    with ends.proxy.toxic(toxic, direction):
        links.append(ends.connect())
        for link in links:
            sender, receiver = link.along(direction)
            sender.sendall(SAID)
            assert is_silent(receiver)
            receiver.sendall(SAID)  # the other direction
            assert received(sender, len(SAID)) == SAID


@pytest.mark.parametrize("toxic", SLOWING, ids=repr)
def test_spoils_both_directions_if_none_is_named(ends: Ends, toxic: Toxic) -> None:
    link = ends.connect()
    with ends.proxy.toxic(toxic):
        for direction in DIRECTIONS:
            sender, receiver = link.along(direction)
            sender.sendall(SAID)
            assert is_silent(receiver)


@pytest.mark.parametrize(
    "toxic", [Latency(HOUR_S), Bandwidth(1 / HOUR_S), Slicer(100, HOUR_S), SlowClose(HOUR_S)], ids=repr
)
def test_what_was_held_up_comes_when_the_toxic_is_removed(ends: Ends, toxic: Toxic) -> None:
    link = ends.connect()
    with ends.proxy.toxic(toxic):
        link.client.sendall(SAID)
        link.client.shutdown(socket.SHUT_WR)
        assert is_silent(link.client)  # in the meantime it gets stuck
    assert received(link.server, len(SAID) + 1) == SAID


@pytest.mark.parametrize("first", [Latency(0.01, 0.01), Slicer(100, 0.0), Bandwidth(1e6)], ids=repr)
def test_several_toxics_work_one_after_the_other(ends: Ends, first: Toxic) -> None:
    link = ends.connect()
    with ends.proxy.toxic(first, "upstream"), ends.proxy.toxic(Limit(300), "upstream"):
        link.client.sendall(SAID)
        assert received(link.server, len(SAID)) == SAID[:300]


# --- each kind ----------------------------------------------------------------------------------


def test_latency_delays_but_keeps_order(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Latency(0.1, 0.05), "upstream"):
        began = time.monotonic()
        for start in range(0, len(SAID), 64):
            link.client.sendall(SAID[start : start + 64])
        assert received(link.server, len(SAID)) == SAID
        assert time.monotonic() - began >= 0.05


def test_jitter_is_the_same_for_the_same_seed() -> None:
    def delays(seed: int) -> list[float]:
        return list(itertools.islice(Latency(1.0, 0.5, seed).delays(), 100))

    assert delays(1) == delays(1) != delays(2)
    assert all(0.5 <= delay <= 1.5 for delay in delays(1))


def test_bandwidth_takes_its_time(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Bandwidth(len(SAID) * 5), "upstream"):
        began = time.monotonic()
        link.client.sendall(SAID)
        assert received(link.server, len(SAID)) == SAID
        assert time.monotonic() - began >= 0.2


def test_slicer_pauses_after_each_piece(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Slicer(100, HOUR_S), "upstream"):
        link.client.sendall(SAID)
        assert received(link.server, 100) == SAID[:100]
        assert is_silent(link.server)


def test_slow_close_holds_back_the_end_only(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(SlowClose(HOUR_S), "upstream"):
        link.client.sendall(SAID)
        link.client.shutdown(socket.SHUT_WR)
        assert received(link.server, len(SAID)) == SAID
        assert is_silent(link.server)
    assert link.server.recv(1) == b""


def send_until_cut(sender: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(3):
            sender.sendall(SAID)


@both_directions
@pytest.mark.parametrize("size", [1, 100, len(SAID), len(SAID) + 1])
def test_limit_closes_after_so_many_bytes(ends: Ends, direction: Direction, size: int) -> None:
    ends.proxy.add(Limit(size), direction)
    sender, receiver = ends.connect().along(direction)
    send_until_cut(sender)
    assert received(receiver, size + 1) == (SAID * 2)[:size]


@both_directions
@pytest.mark.parametrize("size", [1, 100, len(SAID) + 1])
def test_reset_strikes_after_so_many_bytes(ends: Ends, direction: Direction, size: int) -> None:
    ends.proxy.add(Reset(size), direction)
    sender, receiver = ends.connect().along(direction)
    send_until_cut(sender)
    assert received(receiver, size) == (SAID * 2)[:size]
    assert is_reset(receiver)


@pytest.mark.parametrize("make", [Limit, Reset])
def test_open_connections_are_counted_from_now_on(ends: Ends, make: Callable[[int], Toxic]) -> None:
    link = ends.connect()
    assert_passes(link)
    with ends.proxy.toxic(make(100), "upstream"):
        link.client.sendall(SAID)
        assert received(link.server, 100) == SAID[:100]


def test_reset_at_once_needs_no_bytes(ends: Ends) -> None:
    link = ends.connect()
    ends.proxy.add(Reset(0), "downstream")
    assert is_reset(link.client)
    assert is_reset(link.server)
    with pytest.raises(ConnectionResetError):
        connect_and_wait(ends.proxy)


def test_timeout_closes_after_a_while(ends: Ends) -> None:
    link = ends.connect()
    ends.proxy.add(Timeout(0.05), "upstream")
    link.client.sendall(SAID)
    assert received(link.server, 1) == b""
    assert received(link.client, 1) == b""


def test_timeout_that_is_removed_in_time_closes_nothing(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Timeout(HOUR_S)):
        pass
    assert_passes(link)


def test_timeout_hides_that_the_other_side_has_left(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Timeout(), "upstream"):
        link.client.shutdown(socket.SHUT_WR)
        assert is_silent(link.server)
    assert link.server.recv(1) == b""


def test_a_connection_that_has_lost_bytes_never_goes_on(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Timeout(), "upstream"):
        link.client.sendall(SAID)
        assert is_silent(link.server)
    assert is_reset(link.server)
    assert is_reset(link.client)


def test_down_refuses_and_resets_and_comes_back_at_the_same_place(ends: Ends) -> None:
    link = ends.connect()
    with ends.proxy.toxic(Down()):
        assert is_reset(link.client)
        assert is_reset(link.server)
        with pytest.raises(ConnectionRefusedError):
            connect_and_wait(ends.proxy)
    assert_passes(ends.connect())
