"""`baton drain --self` beside a worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.shared.processes import free_port
from launch.cli import main
from launch.exits import Exit
from tests.waiting import wait_for
from tests.worker.sim.workers import MODEL, Worker, running
from worker.sim.latency import Latency

ASK = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
SLOW = Latency(decode_ms_per_token=200)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with running(role="decode", latency=SLOW) as made:
        yield made


def state(worker: Worker) -> tuple[int, str]:
    answer = worker.client.get("/baton/ready")
    return answer.status_code, answer.json()["state"]


def test_it_is_drained_and_undrained(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert state(worker) == (200, "serving")
    assert main(["drain", "--self", "--url", worker.url]) == Exit.OK
    assert capsys.readouterr().out == f"{worker.url}: draining, 0 requests\n"
    assert state(worker) == (503, "draining")
    assert worker.post("/v1/completions", ASK).status_code == 200  # who has not heard of it is served
    assert main(["undrain", "--self", "--url", worker.url, "-o", "json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["state"] == "serving"
    assert state(worker) == (200, "serving")


def test_it_waits_for_requests(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    answered: list[int] = []
    asking = threading.Thread(target=lambda: answered.append(worker.post("/v1/completions", ASK).status_code))
    asking.start()
    wait_for(lambda: worker.client.get("/baton/ready").json()["running"] == 1, "the request to run")
    assert main(["drain", "--self", "--wait", "--url", worker.url]) == Exit.OK
    assert worker.ledger()["in_flight"] == 0
    asking.join()
    assert answered == [200]
    assert "draining, 0 requests" in capsys.readouterr().out


def test_it_waits_for_orchestrators_that_have_not_heard_of_it(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = {"x-baton-from": "one"}
    worker.client.get("/baton/ready", headers=ready)
    code = main(["drain", "--self", "--wait", "--timeout", "0.5", "--url", worker.url])
    assert code == Exit.FAILED
    said = capsys.readouterr().err
    assert "1 orchestrator did not hear of it within 0.5 s; the worker stays drained" in said
    worker.client.get("/baton/ready", headers=ready)
    assert main(["drain", "--self", "--wait", "--timeout-s", "5", "--url", worker.url]) == Exit.OK


def test_it_waits_for_blocks_that_are_handed_over(capsys: pytest.CaptureFixture[str]) -> None:
    with running(role="prefill", lease_s=2.0) as worker:
        handed = ASK | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        assert worker.post("/v1/completions", handed).status_code == 200
        began = time.monotonic()
        assert main(["drain", "--self", "--wait", "--timeout-s", "0.5", "--url", worker.url]) == Exit.FAILED
        assert "blocks that it has handed over were not pulled" in capsys.readouterr().err
        assert main(["drain", "--self", "--wait", "--url", worker.url]) == Exit.OK
        assert time.monotonic() >= began + 1.5
        assert worker.ledger()["pins"] == []


def test_its_key_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("BATON_WORKER_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with running(role="decode", api_keys=("sesame",)) as worker:
        assert main(["drain", "--self", "--url", worker.url]) == Exit.FAILED
        assert "it wants its key: put it into BATON_WORKER_API_KEY" in capsys.readouterr().err
        assert state(worker) == (200, "serving")  # which needs none
        monkeypatch.setenv("BATON_WORKER_API_KEY", "sesame")
        assert main(["drain", "--self", "--url", worker.url]) == Exit.OK


def test_what_is_no_worker_of_ours_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from worker.sim.settings import Announced

    with running(announced=Announced(is_plain=True)) as worker:
        assert main(["drain", "--self", "--url", worker.url]) == Exit.FAILED
        assert "it is not one with Baton's plugin" in capsys.readouterr().err
    assert main(["drain", "--self", "--url", f"http://127.0.0.1:{free_port()}"]) == Exit.FAILED
    assert "no worker answers at http://127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--self", "m/decode/0"], "--self means the worker at --url: leave its name out"),
        ([], "name the workers, as `baton ps` shows them, or the one at --url by --self"),
        (["--self", "--url", "ht!tp://["], "--url: expected http://HOST:PORT"),
        (["--self", "--url", "127.0.0.1:1"], "--url: expected http://HOST:PORT"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["drain", *arguments]) == Exit.USAGE
    assert said in capsys.readouterr().err
