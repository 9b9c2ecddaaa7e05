"""What embeddings cost from end to end, by the form in which they travel.

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

import argparse
import base64
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import orjson

from bench.shared.machine import machine
from bench.shared.processes import cpu_seconds, free_port, python, running

MODEL = "sim"
CONFIG = """
orchestrator: {{listen: "127.0.0.1:{port}", admin: null}}
models:
  - name: {model}
    both: {{urls: ["http://127.0.0.1:{worker}"]}}
"""

Array = Any


@dataclass(frozen=True)
class Form:
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


FORMS = [
    # The orchestrator leaves alone what says more of its form than it looks at.
    Form("floats, untouched", {"embed_dtype": "float32"}, from_floats, worker_form="float"),
    Form("floats", {}, from_floats),
    Form("base64", {"encoding_format": "base64"}, from_base64),
    Form("raw", {}, from_bytes, accept="application/octet-stream"),
    Form("bytes", {"encoding_format": "bytes"}, from_bytes),
]


@dataclass
class Sample:
    """One form in one round, per request."""

    orchestrator_ms: float
    worker_ms: float
    latency_ms: float
    parse_ms: float


@dataclass
class Row:
    form: Form
    from_worker: int  # bytes of a body
    to_client: int
    samples: list[Sample] = field(default_factory=list)

    def median(self, figure: str) -> float:
        return statistics.median(getattr(sample, figure) for sample in self.samples)


class Client:
    """One connection that is kept."""

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


@dataclass(frozen=True)
class Cluster:
    worker_pid: int
    worker_port: int
    orchestrator_pid: int
    port: int


@contextmanager
def cluster(cores: list[int]) -> Iterator[Cluster]:
    worker, port = free_port(), free_port()
    argv = python("-m", "worker.sim", "--model-name", MODEL, "--port", str(worker))
    with (
        tempfile.TemporaryDirectory() as folder,
        running(argv, worker, cores={cores[-1]}) as worker_pid,
    ):
        config = Path(folder, "bench.yaml")
        config.write_text(CONFIG.format(port=port, worker=worker, model=MODEL))
        argv = python("-m", "launch.cli", "orchestrator", str(config))
        with running(argv, port, cores={cores[0]}) as pid:
            wait_until_ready(port)
            yield Cluster(worker_pid, worker, pid, port)


def wait_until_ready(port: int, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/ready")
        if connection.getresponse().status == 200:
            return
        time.sleep(0.05)
    raise RuntimeError(f"the orchestrator is not ready after {limit_s:.0f} s")


# --- measuring ----------------------------------------------------------------------------------


def measure(rounds: int, requests: int, vectors: int, dimensions: int) -> list[Row]:
    inputs = [f"Sentence number {index}." for index in range(vectors)]
    with cluster(sorted(os.sched_getaffinity(0))) as started:
        direct = Client(started.worker_port, inputs, dimensions)
        client = Client(started.port, inputs, dimensions)
        rows = [first_row(form, client, direct) for form in FORMS]
        for _ in range(rounds):
            for row in rows:
                row.samples.append(sample(row.form, client, started, requests))
    return rows


def first_row(form: Form, client: Client, direct: Client) -> Row:
    """Warms up too: the first floats start the orchestrator's other process."""
    from_worker = len(direct.ask({"encoding_format": form.worker_form}))
    return Row(form, from_worker, len(client.ask(form.fields, form.accept)))


def sample(form: Form, client: Client, started: Cluster, requests: int) -> Sample:
    before = cpu_seconds(started.orchestrator_pid), cpu_seconds(started.worker_pid)
    latencies, parse_s = [], 0.0
    for _ in range(requests):
        begun = time.perf_counter()
        body = client.ask(form.fields, form.accept)
        latencies.append(time.perf_counter() - begun)
        begun = time.process_time()
        form.parse(body)
        parse_s += time.process_time() - begun
    after = cpu_seconds(started.orchestrator_pid), cpu_seconds(started.worker_pid)
    return Sample(
        orchestrator_ms=(after[0] - before[0]) / requests * 1e3,
        worker_ms=(after[1] - before[1]) / requests * 1e3,
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


def table(rows: list[Row]) -> str:
    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )


def cells(row: Row) -> tuple[str, ...]:
    router = [one.orchestrator_ms for one in row.samples]
    return (
        row.form.name,
        f"{row.from_worker / 1e3:.0f}",
        f"{row.to_client / 1e3:.0f}",
        f"{row.median('orchestrator_ms'):.1f}",
        f"{min(router):.1f}-{max(router):.1f}",
        f"{row.median('worker_ms'):.1f}",
        f"{row.median('latency_ms'):.1f}",
        f"{row.median('parse_ms'):.2f}",
    )


def document_of(rows: list[Row]) -> dict[str, Any]:
    described = [
        {
            "form": row.form.name,
            "bytes_from_worker": row.from_worker,
            "bytes_to_client": row.to_client,
            "rounds": [vars(one) for one in row.samples],
        }
        for row in rows
    ]
    return {"machine": machine(), "rows": described}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=40, help="of each form in each round")
    parser.add_argument("--vectors", type=int, default=256)
    parser.add_argument("--dimensions", type=int, default=1024, help="at most 1024, the simulated model's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    options = parser.parse_args(argv)
    rows = measure(options.rounds, options.requests, options.vectors, options.dimensions)
    print(f"{options.vectors} vectors of {options.dimensions}\n\n{table(rows)}")
    if options.json is not None:
        options.json.write_text(json.dumps(document_of(rows), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
