"""No client adds a series: 10,000 names that nobody knows leave `/metrics` as it was."""

from __future__ import annotations

import asyncio
import json
import random
import string
from array import array
from hashlib import sha256

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from orchestrator.config.keys import Key, KeyRing
from orchestrator.config.options import LogConfig
from orchestrator.control.metrics import BatonCollector, Sources, render
from orchestrator.control.worker_watch import WorkerWatch
from orchestrator.telemetry.access_log import AccessLog, Note
from orchestrator.telemetry.answers import AnswerWriter
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.figures import CELLS, FigureWriter
from tests.orchestrator.fakes import FakeCluster, FakeExchange

COUNT = 10_000
KEY = "sk-known"
RING = KeyRing([Key("alice", sha256(KEY.encode()).digest(), frozenset({"infer"}))])
HOSTILE = 'm"} 1\nfake{model="m\\'
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class Site:
    """A data plane with keys, and all that counts what it does."""

    def __init__(self) -> None:
        self.cluster = FakeCluster(keys=RING)
        registry, telemetry = self.cluster.registry, self.cluster.telemetry
        cells = array("q", bytes(8 * CELLS * len(registry.workers)))
        slots = {worker.name: worker.slot for worker in registry.workers}
        figures = FigureWriter(cells, lambda: slots)
        answers = AnswerWriter(telemetry.layout, telemetry.row)
        notes: list[Note] = [
            lambda records, _: figures.note(records),
            lambda records, _: answers.note(records),
        ]
        self.log = AccessLog(telemetry.records, ["m"], LogConfig(), lambda line: None, notes=notes)
        watch = WorkerWatch(
            self.cluster.config, registry, lambda slot: cells[slot * CELLS : (slot + 1) * CELLS], Events()
        )
        self.sources = Sources(
            telemetry.layout,
            lambda: telemetry.row,
            registry.statuses,
            self.cluster.upstream.stats,
            tuple,
            dict,
            dict,
            figures=lambda: [(worker, watch.figures(worker)) for worker in registry.workers],
        )

    async def ask(self, model: str, key: str, path: str = PATHS[0], **headers: str) -> int:
        body = {"model": model, "messages": [], "prompt": "p", "input": "i", "user": model}
        fields = [(b"authorization", f"Bearer {key}".encode())]
        fields += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        exchange = FakeExchange(json.dumps(body).encode(), path=path, headers=fields)
        await self.cluster.serve(exchange)
        self.log.flush(1)
        return exchange.status

    async def samples(self) -> list[Sample]:
        page = (await render([BatonCollector(self.cluster.config, self.sources)])).decode()
        return [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    async def series(self) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {(sample.name, frozenset(sample.labels.items())) for sample in await self.samples()}


def word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters, k=12))


def test_names_of_clients_add_no_series() -> None:
    async def main() -> None:
        site, rng = Site(), random.Random(1)
        assert await site.ask("m", KEY) == 200
        before = await site.series()
        statuses = set()
        for number in range(COUNT):
            name = HOSTILE if number % 1000 == 0 else word(rng)
            asked = (name, KEY) if number % 2 else ("m", name.splitlines()[0])
            statuses.add(await site.ask(*asked, rng.choice(PATHS), x_request_id=name[:9], user_agent=name))
        assert statuses == {401, 404}
        assert await site.series() == before
        refused = sum(sample.value for sample in await site.samples() if sample.name == "baton_errors_total")
        assert refused == COUNT
        await site.cluster.aclose()

    asyncio.run(main())
