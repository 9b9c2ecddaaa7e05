"""What an answer costs on its way out of a FastAPI endpoint, by the way that it takes.

    .venv/bin/python -m bench.micro.responses [--rounds N] [--json FILE]

Three answers, each given by the same endpoint in several ways: as a pydantic response model, as a dict that
goes through FastAPI's encoder, as a `Response` that orjson wrote, with numpy arrays left to orjson, and as
bytes that were there already. The application is called without a server, so that nothing else is in the
figures: CPU time per answer, the median of the rounds and their spread. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import orjson
from fastapi import FastAPI, Response
from pydantic import BaseModel

from bench.shared.machine import machine

MODEL, DICT, ORJSON, NUMPY, BYTES = "pydantic model", "dict", "orjson", "orjson and numpy", "bytes"

Endpoint = Callable[[], Awaitable[Any]]


class Card(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Listing(BaseModel):
    object: str
    data: list[Card]


class Message(BaseModel):
    role: str
    content: str
    refusal: str | None


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, Any] | None
    finish_reason: str
    stop_reason: str | int | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Embedding(BaseModel):
    index: int
    object: str
    embedding: list[float]


class Embeddings(BaseModel):
    object: str
    model: str
    data: list[Embedding]
    usage: Usage


@dataclass(frozen=True)
class Way:
    """One way of one answer."""

    answer: str
    name: str
    endpoint: Endpoint
    model: type[BaseModel] | None = None

    @property
    def path(self) -> str:
        return f"/{self.answer}/{self.name}".replace(" ", "-")


@dataclass(frozen=True)
class Figures:
    way: Way
    size: int  # bytes
    ms: list[float]  # per answer, one for each round

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


# --- the answers --------------------------------------------------------------------------------


def document_ways(answer: str, document: dict[str, Any], model: type[BaseModel]) -> list[Way]:
    """`document` is what the endpoint knows."""
    content = orjson.dumps(document)

    async def given() -> dict[str, Any]:
        return document

    async def by_orjson() -> Response:
        return json_response(orjson.dumps(document))

    async def ready() -> Response:
        return json_response(content)

    return [
        Way(answer, MODEL, given, model),
        Way(answer, DICT, given),
        Way(answer, ORJSON, by_orjson),
        Way(answer, BYTES, ready),
    ]


def embedding_ways(count: int, dimensions: int) -> list[Way]:
    """The endpoint knows the vectors as an array; which of the ways need lists, make them."""
    answer = f"embeddings {count} x {dimensions}"
    vectors = numpy.random.default_rng(0).standard_normal((count, dimensions), numpy.float32)

    async def lists() -> dict[str, Any]:
        return embeddings_of(vectors.tolist())

    async def by_orjson() -> Response:
        return json_response(orjson.dumps(embeddings_of(vectors.tolist())))

    async def by_numpy() -> Response:
        return json_response(orjson.dumps(embeddings_of(vectors), option=orjson.OPT_SERIALIZE_NUMPY))

    async def raw() -> Response:
        return Response(vectors.tobytes(), media_type="application/octet-stream")

    return [
        Way(answer, MODEL, lists, Embeddings),
        Way(answer, DICT, lists),
        Way(answer, ORJSON, by_orjson),
        Way(answer, NUMPY, by_numpy),
        Way(answer, BYTES, raw),
    ]


def json_response(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def listing(models: int) -> dict[str, Any]:
    names = [f"organization-{index % 7}/model-{index}" for index in range(models)]
    cards = [
        {
            "id": name,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "baton",
            "root": f"/models/{name}",
            "parent": None,
            "max_model_len": 131_072,
        }
        for name in names
    ]
    return {"object": "list", "data": cards}


def completion(choices: int) -> dict[str, Any]:
    text = "Prefill reads the prompt and fills the cache; decode takes it over and writes. " * 13
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
            for index in range(choices)
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 256 * choices,
            "total_tokens": 20 + 256 * choices,
        },
    }


def embeddings_of(vectors: Any) -> dict[str, Any]:
    items = [
        {"index": index, "object": "embedding", "embedding": vector} for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": 8, "completion_tokens": 0, "total_tokens": 8}
    return {"object": "list", "model": "m", "data": items, "usage": usage}


# --- measuring ----------------------------------------------------------------------------------


def app_of(ways: list[Way]) -> FastAPI:
    app = FastAPI()
    for way in ways:
        app.add_api_route(way.path, way.endpoint, response_model=way.model)
    return app


async def call(app: FastAPI, path: str) -> int:
    """One request; returns the bytes of the answer's body."""
    size = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal size
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"{path} answered {message['status']}")
        size += len(message.get("body", b""))

    await app(scope_of(path), receive, send)
    return size


def scope_of(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


async def measure(ways: list[Way], rounds: int, round_s: float) -> list[Figures]:
    app = app_of(ways)
    figures = [Figures(way, await call(app, way.path), []) for way in ways]  # the first call warms up
    calls = {way.path: max(1, int(round_s * 1e3 / await cpu_ms(app, way.path, 1))) for way in ways}
    for _ in range(rounds):
        for one in figures:
            one.ms.append(await cpu_ms(app, one.way.path, calls[one.way.path]))
    return figures


async def cpu_ms(app: FastAPI, path: str, calls: int) -> float:
    """Milliseconds of CPU per call."""
    before = time.process_time()
    for _ in range(calls):
        await call(app, path)
    return (time.process_time() - before) / calls * 1e3


# --- the result ---------------------------------------------------------------------------------


def table(figures: list[Figures]) -> str:
    """Each way beside orjson's."""
    lines = [f"{'answer':<24}{'way':<18}{'KB':>8}{'CPU ms':>10}{'min-max':>18}{'x orjson':>10}"]
    orjson_ms = {one.way.answer: one.median for one in figures if one.way.name == ORJSON}
    for one in figures:
        spread = f"{min(one.ms):.3f}-{max(one.ms):.3f}"
        ratio = one.median / orjson_ms[one.way.answer]
        lines.append(
            f"{one.way.answer:<24}{one.way.name:<18}{one.size / 1e3:>8.0f}{one.median:>10.3f}"
            f"{spread:>18}{ratio:>10.2f}"
        )
    return "\n".join(lines)


def document_of(figures: list[Figures]) -> dict[str, Any]:
    rows = [
        {"answer": one.way.answer, "way": one.way.name, "bytes": one.size, "cpu_ms": one.ms}
        for one in figures
    ]
    return {"machine": machine(), "rows": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-s", type=float, default=0.2, help="CPU seconds for each way in each round")
    parser.add_argument("--models", type=int, default=5800, help="of the listing; the default makes 1 MB")
    parser.add_argument("--choices", type=int, default=100)
    parser.add_argument("--vectors", type=int, default=256)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    options = parser.parse_args(argv)
    ways = [
        *document_ways(f"listing of {options.models}", listing(options.models), Listing),
        *document_ways(f"completion of {options.choices}", completion(options.choices), Completion),
        *embedding_ways(options.vectors, options.dimensions),
    ]
    figures = asyncio.run(measure(ways, options.rounds, options.round_s))
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(document_of(figures), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
