"""Runs of `baton up` as files, without a process, and an admin listener that answers what a test says."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launch.local.run_state import FILE, VERSION, ProcessEntry, RunState, start_of, write


def made_run(place: Path, name: str = "run-20260101-000000-1", **more: Any) -> Path:
    """Write the state of a run whose process is this one, unless `more` says otherwise."""
    directory = place / ".baton" / name
    directory.mkdir(parents=True)
    values: dict[str, Any] = {
        "version": VERSION,
        "pid": os.getpid(),
        "start": start_of(os.getpid()),
        "host": socket.gethostname(),
        "started": time.time(),
        "config": str(place / "c.yaml"),
        "url": "http://127.0.0.1:1",
        "admin": "http://127.0.0.1:1",
        "is_ready": True,
        "operation": None,
        "ended": None,
        "processes": [],
    }
    write(directory / FILE, RunState(**values | more))
    return directory


def entry(name: str, **more: Any) -> ProcessEntry:
    role = name.split("/")[1] if "/" in name else name
    values: dict[str, Any] = {
        "name": name,
        "role": role,
        "state": "ready",
        "since": time.time() - 90,
        "pid": 4711,
        "restarts": 0,
        "log": f"{name.replace('/', '-')}.log",
        "url": "http://127.0.0.1:1",
    }
    return ProcessEntry(**values | more)


@dataclass
class AdminListener:
    """Answers by path, and keeps what it was asked."""

    answers: dict[str, Any]  # by path: a document, a text, or (status, document)
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _, _ in self.asked if how == method]


@contextmanager
def admin_listener(answers: dict[str, Any]) -> Iterator[AdminListener]:
    made = AdminListener(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            made.asked.append(
                (self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, content)
            )
            found = made.answers.get(
                self.path.partition("?")[0], (404, {"error": {"message": "no such path"}})
            )
            found = found() if callable(found) else found
            status, document = found if isinstance(found, tuple) else (200, found)
            body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
