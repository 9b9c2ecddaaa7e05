"""Clients that ask until they are told to stop, and note what failed."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.cluster.hosts import Host
from tests.orchestrator.running import MODEL
from tests.waiting import LIMIT_S, wait_for

CLIENTS = 6


@dataclass
class Load:
    """Clients ask at one URL without end, every other one for streams, each anew over one connection."""

    url: str
    host: Host | None = None  # that they are on; None: the one of the test
    model: str = MODEL
    answered: int = 0
    slowest_s: float = 0.0
    texts: Counter[str] = field(default_factory=Counter)  # how often each was an answer
    failures: list[str] = field(default_factory=list)
    rounds: list[int] = field(default_factory=lambda: [0] * CLIENTS)  # of each client
    is_over: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        with contextlib.nullcontext() if self.host is None else self.host.entered():
            self._ask(number)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not self.is_over.is_set():
                try:
                    self._check(client, stream=bool(number % 2))
                except (httpx.HTTPError, AssertionError) as error:
                    self.failures.append(f"{time.time():.2f} {error!r}")
                self.rounds[number] += 1

    def _check(self, client: httpx.Client, *, stream: bool) -> None:
        began = time.monotonic()
        body: dict[str, Any] = {"model": self.model, "prompt": "Go on", "max_tokens": 16, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body | {"stream": stream})
        assert answer.status_code == 200, answer.text
        self.texts[_streamed(answer.text) if stream else _whole(answer.text)] += 1
        self.answered += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def wait_for_round(self) -> None:
        """Wait until nothing is under way any more that is under way now."""
        before = list(self.rounds)
        wait_for(lambda: all(now > then for now, then in zip(self.rounds, before, strict=True)), "a round")

    def wait_for(self, more: int, limit_s: float = LIMIT_S) -> None:
        """Wait until so many more were answered, or one has failed."""
        wanted = self.answered + more
        wait_for(lambda: self.failures or self.answered >= wanted, f"{more} more answers", limit_s)


def _whole(body: str) -> str:
    choice = json.loads(body)["choices"][0]
    assert choice["finish_reason"] == "length"
    text: str = choice["text"]
    return text


def _streamed(body: str) -> str:
    assert body.endswith("data: [DONE]\n\n"), body
    assert 'data: {"error"' not in body
    events = [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n")[:-2]]
    return "".join(choice["text"] for event in events for choice in event["choices"])


@contextlib.contextmanager
def loaded(url: str, host: Host | None = None, model: str = MODEL) -> Iterator[Load]:
    """Have clients ask until the block ends; after that nothing is under way."""
    load = Load(url, host, model)
    threads = [threading.Thread(target=load.ask, args=[number]) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.is_over.set()
        for thread in threads:
            thread.join()
