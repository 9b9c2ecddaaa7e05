from __future__ import annotations

import socket
import sys

from launch.plan import ProcessSpec
from launch.surroundings import is_here, look_around, taken_ports

OPTION = "give another one (base_port, or workers: [{port: ..., side_channel_port: ...}])"


def spec(*listens: tuple[str, int]) -> ProcessSpec:
    return ProcessSpec("w", "both", (), {}, "", listens, "")


def test_this_machine() -> None:
    around = look_around()
    assert around.python == sys.executable
    assert "baton" not in around.vllm_plugins  # it acts only where it is named
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert is_here("::1")
    assert not is_here("192.0.2.1")  # a network for documentation


def test_ports_that_are_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as other:
            free = other.getsockname()[1]
        found = list(taken_ports([spec(("127.0.0.1", free), ("127.0.0.1", taken))]))
    assert found == [f"w: port {taken} of 127.0.0.1 is taken by another process: {OPTION}"]
    assert list(taken_ports([spec(("192.0.2.1", taken))])) == []
