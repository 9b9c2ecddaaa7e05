"""Large forms with real processes and simulated workers: what they cost, and who ends what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from openai import OpenAI

from orchestrator.api.audio import PATHS
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.orchestrator.wire.test_forms import form
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

MIB = 1024 * 1024
TYPE = {"content-type": "multipart/form-data; boundary=b0"}
LIMITS = {"max_upload_bytes": 1024 * MIB}
PIECE = bytes(range(256)) * 4096
END = b"\r\n--b0--\r\n"
BEGINNING = form(("model", MODEL.encode(), ""), ("file", b"", '; filename="a.wav"')).removesuffix(END)


@pytest.fixture
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as made:
        yield made


@pytest.fixture
def orchestrator(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Orchestrator]:
    with starting(tmp_path, workers) as start:
        yield start(processes=1, limits=LIMITS)


def speech(pieces: int) -> Iterator[bytes]:
    yield BEGINNING
    for _ in range(pieces):
        yield PIECE
    yield END


def upload(orchestrator: Orchestrator, pieces: int, *, is_sized: bool = False) -> httpx.Response:
    size = len(BEGINNING) + pieces * len(PIECE) + len(END)
    headers = TYPE | ({"content-length": str(size)} if is_sized else {})
    return orchestrator.client().post(PATHS[0], content=speech(pieces), headers=headers)


def peak_bytes(orchestrator: Orchestrator) -> int:
    """The most memory that the process which serves has had so far."""
    (process,) = orchestrator.processes()
    status = Path(f"/proc/{process['pid']}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def test_a_large_file_takes_no_memory(orchestrator: Orchestrator) -> None:
    assert upload(orchestrator, 2).status_code == 200
    before = peak_bytes(orchestrator)
    digest = hashlib.sha256()
    for _ in range(300):
        digest.update(PIECE)
    for is_sized in (True, False):
        answer = upload(orchestrator, 300, is_sized=is_sized)
        assert answer.json()["text"] == f"{300 * MIB} {digest.hexdigest()}"
    grown = peak_bytes(orchestrator) - before
    print(f"grown by {grown / MIB:.1f} MiB")
    assert grown < 8 * MIB


class Endless:
    """A client that uploads until it is told to leave, or answered."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.client = orchestrator.client()
        self.sent = 0
        self.answer: httpx.Response | None = None
        self._leaves = False
        self.thread = Thread(target=self._upload)
        self.thread.start()

    def leave(self) -> None:
        self._leaves = True
        self.thread.join()

    def _upload(self) -> None:
        with contextlib.suppress(httpx.TransportError, ConnectionAbortedError):
            self.answer = self.client.post(PATHS[0], content=self._speech(), headers=TYPE)

    def _speech(self) -> Iterator[bytes]:
        yield BEGINNING
        while not self._leaves:
            yield PIECE
            self.sent += len(PIECE)
        raise ConnectionAbortedError


def in_flight(orchestrator: Orchestrator) -> int:
    return sum(orchestrator.worker_loads().values())


def test_a_client_that_leaves_gives_its_seat_back(orchestrator: Orchestrator) -> None:
    client = Endless(orchestrator)
    wait_for(lambda: client.sent > 8 * MIB, "some of the upload")
    assert in_flight(orchestrator) == 1
    client.leave()
    wait_for(lambda: in_flight(orchestrator) == 0, "the seat")
    assert client.answer is None
    assert upload(orchestrator, 2).status_code == 200


def test_a_worker_that_is_killed_in_the_middle_is_told_of(
    orchestrator: Orchestrator, workers: list[SimWorker]
) -> None:
    client = Endless(orchestrator)
    wait_for(lambda: client.sent > 8 * MIB, "some of the upload")
    workers[1].kill()
    client.thread.join()
    answer: Any = client.answer
    assert answer is not None
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upload_lost"
    wait_for(lambda: in_flight(orchestrator) == 0, "the seat")


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_clients_that_send_the_model_first_or_last(
    orchestrator: Orchestrator, tmp_path: Path, size: int
) -> None:
    (tmp_path / "a.wav").write_bytes(bytes(size))
    told = f"{size} {hashlib.sha256(bytes(size)).hexdigest()}"
    with OpenAI(base_url=f"{orchestrator.url}/v1", api_key="-", max_retries=0) as client:
        heard = client.audio.transcriptions.create(model=MODEL, file=tmp_path / "a.wav")
        assert heard.text == told
    fields = ["-F", f"file=@{tmp_path}/a.wav", "-F", f"model={MODEL}"]
    for more in ([], ["-H", "transfer-encoding: chunked"]):
        command = ["curl", "--silent", "--show-error", *fields, *more, orchestrator.url + PATHS[0]]
        ran = subprocess.run(command, capture_output=True, check=True)
        assert json.loads(ran.stdout)["text"] == told
