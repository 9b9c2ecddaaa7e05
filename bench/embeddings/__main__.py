"""This measures what embeddings cost from end to end, by the form in which they travel.

    .venv/bin/python -m bench.embeddings [--rounds N] [--json FILE]

A simulated worker, the orchestrator in front of it and one client that asks again and again, each form in
turn in every round. The worker computes the same vectors for each, so the differences are the forms'. Forms:

    floats, untouched    the worker writes JSON floats (orjson, numpy), the orchestrator passes them on
    floats               base64 between worker and orchestrator, which makes the floats in its other process
    base64               base64 all the way, as OpenAI's client library asks for it
    raw                  base64 to the orchestrator, `Accept: application/octet-stream` from there
    bytes                the same with vLLM's header

CPU is user and system time per request, of whole process trees; latency is the client's, without what it does
with the answer; `parse` is the CPU that it then needs to have a float32 array. Medians of the rounds, and the
spread of the orchestrator's CPU.
"""

from __future__ import annotations

import base64
import http.client
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import orjson

from bench.shared import record
from bench.shared.baton import Process, baton, config, sim_worker, urls, wait_ready
from bench.shared.bodies import MODEL
from bench.shared.command import parser, run
from bench.shared.figures import aligned, in_rounds, spread
from bench.shared.processes import cpu_seconds, free_port

Array = Any


@dataclass(frozen=True)
class Form:
    """A client asks for a form by fields of its request, or by `accept`."""

    name: str
    fields: Mapping[str, str]
    parse: Callable[[bytes], Array]
    accept: str = "*/*"
    worker_form: str = "base64"  # what the orchestrator asks the worker for


def from_floats(body: bytes) -> Array:
    return numpy.array([item["embedding"] for item in orjson.loads(body)["data"]], numpy.float32)


def from_base64(body: bytes) -> Array:
    data = b"".join(base64.b64decode(item["embedding"]) for item in orjson.loads(body)["data"])
    return numpy.frombuffer(data, numpy.float32)


def from_bytes(body: bytes) -> Array:
    return numpy.frombuffer(body, numpy.float32)


_FORMS = [
    # The orchestrator leaves alone what says more of its form than it looks at.
    Form("floats, untouched", {"embed_dtype": "float32"}, from_floats, worker_form="float"),
    Form("floats", {}, from_floats),
    Form("base64", {"encoding_format": "base64"}, from_base64),
    Form("raw", {}, from_bytes, accept="application/octet-stream"),
    Form("bytes", {"encoding_format": "bytes"}, from_bytes),
]
FORMS = {form.name: form for form in _FORMS}


@dataclass
class Sample:
    """One form in one round has these figures per request."""

    orchestrator_ms: float
    worker_ms: float
    latency_ms: float
    parse_ms: float


@dataclass
class Row:
    """A form has bodies of a size, and a sample per round."""

    form: Form
    from_worker: int  # bytes of a body
    to_client: int
    samples: list[Sample]

    def median(self, figure: str) -> float:
        return float(statistics.median(getattr(sample, figure) for sample in self.samples))


class Client:
    """A client has one connection, and keeps it."""

    def __init__(self, port: int, inputs: list[str], dimensions: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._document = {"model": MODEL, "input": inputs, "dimensions": dimensions}

    def ask(self, fields: Mapping[str, str], accept: str = "*/*") -> bytes:
        body = orjson.dumps({**self._document, **fields})
        headers = {"content-type": "application/json", "accept": accept}
        self._connection.request("POST", "/v1/embeddings", body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:200]!r}")
        return content


@contextmanager
def at_work(cores: list[int]) -> Iterator[tuple[Process, Process]]:
    """Run a worker, and an orchestrator in front of it, each on a core of its own."""
    with sim_worker(cores={cores[-1]}) as worker:
        port = free_port()
        document = config(port, {"both": urls(worker.port)}, admin=None)
        with baton("orchestrator", document, port, cores={cores[0]}) as orchestrator:
            wait_ready(port)
            yield worker, orchestrator


# --- measuring ----------------------------------------------------------------------------------


def measure(rounds: int, requests: int, vectors: int, dimensions: int) -> list[Row]:
    inputs = [f"Sentence number {index}." for index in range(vectors)]
    with at_work(sorted(os.sched_getaffinity(0))) as (worker, orchestrator):
        direct = Client(worker.port, inputs, dimensions)
        client = Client(orchestrator.port, inputs, dimensions)
        sizes = {name: sizes_of(form, client, direct) for name, form in FORMS.items()}
        pids = (orchestrator.pid, worker.pid)
        samples = in_rounds(list(FORMS), rounds, lambda name: sample(FORMS[name], client, pids, requests))
    return [Row(form, *sizes[name], samples[name]) for name, form in FORMS.items()]


def sizes_of(form: Form, client: Client, direct: Client) -> tuple[int, int]:
    """Warm up, too: the first floats start the orchestrator's other process."""
    from_worker = len(direct.ask({"encoding_format": form.worker_form}))
    return from_worker, len(client.ask(form.fields, form.accept))


def sample(form: Form, client: Client, pids: tuple[int, int], requests: int) -> Sample:
    """`pids` are the orchestrator's and the worker's."""
    before = [cpu_seconds(pid) for pid in pids]
    latencies, parse_s = [], 0.0
    for _ in range(requests):
        begun = time.perf_counter()
        body = client.ask(form.fields, form.accept)
        latencies.append(time.perf_counter() - begun)
        begun = time.process_time()
        form.parse(body)
        parse_s += time.process_time() - begun
    orchestrator_s, worker_s = (cpu_seconds(pid) - cpu for pid, cpu in zip(pids, before, strict=True))
    return Sample(
        orchestrator_ms=orchestrator_s / requests * 1e3,
        worker_ms=worker_s / requests * 1e3,
        latency_ms=statistics.median(latencies) * 1e3,
        parse_ms=parse_s / requests * 1e3,
    )


# --- the result ---------------------------------------------------------------------------------


HEADINGS = (
    "form",
    "KB from worker",
    "KB to client",
    "router ms",
    "min-max",
    "worker ms",
    "latency ms",
    "parse ms",
)


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.form.name,
        f"{row.from_worker / 1e3:.0f}",
        f"{row.to_client / 1e3:.0f}",
        f"{row.median('orchestrator_ms'):.1f}",
        spread([one.orchestrator_ms for one in row.samples], 1),
        f"{row.median('worker_ms'):.1f}",
        f"{row.median('latency_ms'):.1f}",
        f"{row.median('parse_ms'):.2f}",
    )


def row_of(row: Row) -> dict[str, Any]:
    rounds = [vars(sample) for sample in row.samples]
    sizes = {"bytes_from_worker": row.from_worker, "bytes_to_client": row.to_client}
    return {"form": row.form.name, **sizes, "rounds": rounds}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--requests", type=int, default=40, help="of each form in each round")
    options.add_argument("--vectors", type=int, default=256)
    options.add_argument("--dimensions", type=int, default=1024, help="at most 1024, the simulated model's")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    given = options.parse_args()
    rows = measure(given.rounds, given.requests, given.vectors, given.dimensions)
    table = "\n".join(aligned([HEADINGS, *map(cells, rows)]))
    print(f"{given.vectors} vectors of {given.dimensions}\n\n{table}")
    record.write_rows(given.json, [*map(row_of, rows)])


if __name__ == "__main__":
    run("embeddings", main)
