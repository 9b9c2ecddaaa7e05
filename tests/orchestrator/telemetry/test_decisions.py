"""The log of decisions: what each line has, that no text is in it, and that it is a trace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from launch.simulate.formats import read_trace
from launch.simulate.trace import Arrival
from launch.simulate.view import SimulatedRequest
from orchestrator.config.file import ConfigErrors, load_config
from orchestrator.errors import StartError
from orchestrator.telemetry.decisions import BLOCK_BYTES, Decision, DecisionLog, names_of
from orchestrator.telemetry.record import LoggedRequest
from tests.orchestrator.fakes import FakeCluster, FakeExchange
from tests.orchestrator.records import ANSWERED, request_record
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated
from tests.waiting import wait_for

LONG = "The same beginning of everything. " * 100  # 3,400 bytes
PATHS = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/responses": lambda text: {"input": text},
}


# --- names of blocks ----------------------------------------------------------------------------


def test_equal_beginnings_have_equal_names() -> None:
    a, b = b"x" * 3 * BLOCK_BYTES, b"x" * 2 * BLOCK_BYTES + b"y" * 2 * BLOCK_BYTES
    names = [names_of(prompt, 7) for prompt in (a, b)]
    assert [len(name) for name in names] == [3 * 16, 4 * 16]
    assert names[0][:32] == names[1][:32]
    assert names[0][32:48] != names[1][32:48]


def test_a_name_stands_for_all_before_it() -> None:
    block = b"x" * BLOCK_BYTES
    assert names_of(b"a" * BLOCK_BYTES + block, 7)[16:] != names_of(b"b" * BLOCK_BYTES + block, 7)[16:]


def test_another_salt_makes_other_names() -> None:
    prompt = b"x" * BLOCK_BYTES
    assert names_of(prompt, 1) != names_of(prompt, 2)


def test_what_is_no_whole_block_has_no_name() -> None:
    assert names_of(b"x" * (BLOCK_BYTES - 1), 1) == ""


# --- the log ------------------------------------------------------------------------------------


class Asked(SimulatedRequest):
    """A request of 700 tokens."""

    def __init__(self) -> None:
        super().__init__("m", Arrival(0, 0.0, 700, 1), 512)

    def prompt(self, most: int) -> bytes:
        return b"secret " * 400


def records(count: int) -> list[Any]:
    changes: dict[str, Any] = {"model_index": 0, "prefill_worker": "m/prefill/0"}
    made = [request_record(**{**ANSWERED, **changes}, logged=LoggedRequest(Asked())) for _ in range(count)]
    for record in made:
        assert record.logged is not None
        record.logged.output_tokens = 9
    return made


def test_a_line_per_request_that_is_to_be_logged(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(str(path), ["m"], 5)
    kept = records(2)
    log.note([*kept, request_record(**ANSWERED)], 1e9)
    log.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    decision = msgspec.json.decode(lines[0], type=Decision)
    assert (decision.model, decision.prompt_tokens, decision.output_tokens) == ("m", 700, 9)
    assert decision.received == pytest.approx(1e9 + kept[0].received)
    assert len(decision.names()) == 2
    assert "secret" not in lines[0]
    assert all(record.logged is None for record in kept)  # bodies are not held on to


def test_a_turn_of_the_event_loop_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(str(path), ["m"], 5)
    log.note(records(10), 0.0)
    log.flush(3, 1 << 20)
    log.flush(10, 2 * 2800)
    assert len(log._pending) == 5
    log.close()
    assert len(path.read_text().splitlines()) == 10


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"orchestrator\.log\.decisions: .*gone/file: No such file"):
        DecisionLog(str(tmp_path / "gone/file"), ["m"], 5)


def test_a_config_whose_folder_is_missing_is_wrong(tmp_path: Path) -> None:
    config = {
        "orchestrator": {"log": {"decisions": str(tmp_path / "gone/file")}},
        "models": [{"name": "m", "both": {"urls": ["http://127.0.0.1:1"]}}],
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigErrors, match=r"config\.yaml:1:\d+: there is no directory .*gone"):
        load_config(str(path))


def test_nothing_is_kept_while_it_is_off() -> None:
    async def run() -> None:
        cluster = FakeCluster()
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        await cluster.serve(FakeExchange(json.dumps(body).encode()))
        assert [record.logged for record in cluster.telemetry.records] == [None]
        await cluster.aclose()

    asyncio.run(run())


# --- with real processes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode") as found:
        yield found


def lines_of(path: Path, count: int) -> list[Decision]:
    wait_for(lambda: path.read_bytes().count(b"\n") == count, f"{count} lines")
    return [msgspec.json.decode(line, type=Decision) for line in path.read_bytes().splitlines()]


@pytest.mark.processes
def test_all_processes_write_a_trace(workers: list[SimWorker], tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    orchestrator = Orchestrator(tmp_path, workers, log={"decisions": str(path)})
    try:
        orchestrator.wait_ready()
        count = 0
        for client in orchestrator.client_of_each():
            for api, fields in PATHS.items():
                for stream in (False, True):
                    ask(client, api, fields(f"{LONG} {count}"), stream)
                    count += 1
        assert refused(orchestrator.client()) == 404  # no model, no decision
        found = lines_of(path, count)
        assert {decision.prefill_worker for decision in found} == {"m/prefill/0"}
        assert {decision.decode_worker for decision in found} == {"m/decode/0"}
        assert {decision.output_tokens for decision in found} == {5}
        assert all(decision.ttft_s is not None and decision.cached_tokens is not None for decision in found)
        assert len({decision.names()[0] for decision in found}) == 2  # messages, and texts
        assert "beginning" not in path.read_text()
        trace = read_trace(str(path), MODEL)
        assert [arrival.output_tokens for arrival in trace.arrivals] == [5] * count
    finally:
        orchestrator.clean_up()


def ask(client: httpx.Client, api: str, fields: dict[str, Any], stream: bool) -> None:
    limit = "max_output_tokens" if api == "/v1/responses" else "max_tokens"
    body = {"model": MODEL, "stream": stream, limit: 5, **fields}
    if api in ("/v1/chat/completions", "/v1/completions"):
        body["ignore_eos"] = True
    answer = client.post(api, json=body)
    assert answer.status_code == 200, answer.text


def refused(client: httpx.Client) -> int:
    return client.post("/v1/completions", json={"model": "other", "prompt": "x"}).status_code
