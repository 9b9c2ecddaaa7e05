"""What our plugin reports agrees with vLLM's own metrics, and a drained worker ends its streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx

from launch.cli import main
from launch.exits import Exit
from tests.contract.engines import ASK_PINNED
from tests.real.ask import LIMIT, chat
from tests.real.conftest import Cluster, metric
from tests.waiting import LIMIT_S, wait_for

STREAMS = 3
LONG: dict[str, Any] = {"stream": True, "max_tokens": 3000, "ignore_eos": True}
US, THEM = {"x-baton-from": "us"}, {"x-baton-from": "them"}


def ready(url: str, **headers: str) -> dict[str, Any]:
    answer = httpx.get(f"{url}/baton/ready", headers=headers, timeout=LIMIT_S)
    assert answer.status_code == (200 if answer.json()["state"] == "serving" else 503)
    report: dict[str, Any] = answer.json()
    return report


@contextmanager
def streaming(url: str, question: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    """A stream that has begun; it is cut at the end."""
    path, document = f"{url}/v1/chat/completions", chat(question, **LONG)
    with httpx.stream("POST", path, json=document, headers=headers, timeout=LIMIT) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        while not next(lines):
            pass
        yield answer


def in_metrics(url: str) -> tuple[float, float]:
    return metric(url, "vllm:num_requests_running"), metric(url, "vllm:num_requests_waiting")


def test_readiness_has_the_figures_of_vllms_metrics(trio: Cluster) -> None:
    url = trio.decode
    with ExitStack() as streams:
        for number in range(STREAMS):
            streams.enter_context(streaming(url, f"Question {number}", US if number else THEM))
        wait_for(lambda: in_metrics(url) == (STREAMS, 0), "vLLM to say that all run")
        report = ready(url, **US)
        assert (report["state"], report["running"], report["waiting"]) == ("serving", STREAMS, 0)
        assert (report["others"], ready(url, **THEM)["others"], ready(url)["others"]) == (1, 2, STREAMS)
        assert report["seats"] == 32  # --max-num-seqs
        assert report["prompt_tokens"] > STREAMS
        assert 0 < report["kv"] <= 1
        assert report["revision"].startswith("files:")
    wait_for(lambda: ready(url, **US)["others"] == 0, "the end of the streams that were cut")
    assert ready(url)["running"] == ready(url)["waiting"] == 0


def test_the_answer_of_a_prefill_says_what_others_have_there(trio: Cluster) -> None:
    leg = chat("What is decode?", max_tokens=1, kv_transfer_params=ASK_PINNED)
    with streaming(trio.prefill, "Others", THEM):
        wait_for(lambda: in_metrics(trio.prefill) == (1, 0), "vLLM to say that it runs")
        answer = httpx.post(f"{trio.prefill}/v1/chat/completions", json=leg, headers=US, timeout=LIMIT)
        others, running, waiting, tokens, kv, seats, senders = answer.headers["x-baton-load"].split(",")
        assert (others, running, waiting, seats) == ("1", "1", "0", "32")
        assert int(tokens) > 0
        assert int(kv) >= 0
        assert int(senders) >= 1
    plain = httpx.post(f"{trio.prefill}/v1/chat/completions", json=leg, timeout=LIMIT)
    assert "x-baton-load" not in plain.headers


def test_drain_waits_for_a_stream_and_nobody_else_is_sent_there(trio: Cluster) -> None:
    admin = httpx.Client(base_url=trio.admin, timeout=LIMIT_S)
    rows = admin.get("/admin/workers").json()
    name = next(row["address"]["name"] for row in rows if row["address"]["url"] == trio.decode)
    codes: list[int] = []
    command = ["drain", "--self", "--wait", "--url", trio.decode, "--timeout-s", "120"]
    draining = threading.Thread(target=lambda: codes.append(main(command)))
    with streaming(trio.decode, "Drain", {}):
        draining.start()
        wait_for(lambda: state(admin, name) == ("draining", True), "the orchestrator to hear of it")
        assert not codes
        path = f"{trio.front}/v1/chat/completions"
        assert httpx.post(path, json=chat("Hi"), timeout=LIMIT).status_code == 200
        assert ready(trio.decode)["running"] == 1  # the answer came from elsewhere
    draining.join(LIMIT_S)
    assert codes == [Exit.OK]
    assert ready(trio.decode)["state"] == "draining"
    assert main(["undrain", "--self", "--url", trio.decode]) == Exit.OK
    wait_for(lambda: state(admin, name) == ("ready", False), "the worker to serve again")
    admin.close()


def state(admin: httpx.Client, name: str) -> tuple[str, bool]:
    row = next(row for row in admin.get("/admin/workers").json() if row["address"]["name"] == name)
    return row["state"], row["drains_itself"]
