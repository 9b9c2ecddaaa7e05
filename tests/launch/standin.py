"""A process that behaves as a test tells it: answers 200 on a port, dies, ignores SIGTERM, has a child.

Appends a line `EVENT NAME PID` to a file at every event, so that a test can wait for it and see the order.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--events", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--die", help="print this and exit with code 7 before answering")
    parser.add_argument("--silent", action="store_true", help="never listen")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--child", action="store_true", help="have a child that ignores SIGTERM and SIGINT")
    options = parser.parse_args()

    def note(event: str, pid: int) -> None:
        with open(options.events, "ab", buffering=0) as file:
            file.write(f"{event} {options.name} {pid}\n".encode())

    def stop(number: int, frame: FrameType | None) -> None:
        note("stop", os.getpid())
        if not options.stubborn:
            sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, lambda *_: note("reload", os.getpid()))
    if options.child:
        sleep = (
            "import signal,time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print(1, flush=True)"
        )
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", f"{sleep}; time.sleep(600)"], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()  # it ignores signals from now on
        note("child", child.pid)
    note("start", os.getpid())
    print(f"{options.name} says hello", flush=True)
    if options.die is not None:
        print(options.die, flush=True)
        sys.exit(7)
    if options.silent:
        time.sleep(600)
    serve(options.port)


def serve(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


if __name__ == "__main__":
    main()
