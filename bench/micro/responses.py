"""This measures what an answer costs on its way out of a FastAPI endpoint, by the way that it takes.

    .venv/bin/python -m bench.micro.responses [--rounds N] [--json FILE]

Three answers, each given by the same endpoint in several ways: as a pydantic response model, as a dict that
goes through FastAPI's encoder, as a `Response` that orjson wrote, with numpy arrays left to orjson, and as
bytes that were there already. The application is called without a server, so that nothing else is in the
figures: CPU time per answer, the median of the rounds and their spread. Rounds are interleaved.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import orjson
from fastapi import FastAPI, Response
from pydantic import BaseModel

from bench.micro.asgi import call
from bench.shared import record
from bench.shared.command import parser
from bench.shared.figures import in_rounds, spread

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
    """An answer takes one of several ways."""

    answer: str
    name: str
    endpoint: Endpoint
    model: type[BaseModel] | None = None

    @property
    def path(self) -> str:
        return f"/{self.answer}/{self.name}".replace(" ", "-")


@dataclass(frozen=True)
class Figures:
    """A way has these figures."""

    way: Way
    size: int  # bytes
    ms: list[float]  # per answer, one for each round

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


# --- the answers --------------------------------------------------------------------------------


def document_ways(answer: str, document: dict[str, Any], model: type[BaseModel]) -> list[Way]:
    """Return the ways of an answer whose endpoint knows `document`."""
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


def measure(ways: list[Way], rounds: int, round_s: float) -> list[Figures]:
    app = app_of(ways)
    with asyncio.Runner() as runner:

        def cpu_ms(path: str, count: int) -> float:
            return runner.run(_cpu_ms(app, path, count))

        sizes = {way.path: runner.run(size_of(app, way.path)) for way in ways}  # the first call warms up
        counts = {path: max(1, int(round_s * 1e3 / cpu_ms(path, 1))) for path in sizes}
        times = in_rounds(list(sizes), rounds, lambda path: cpu_ms(path, counts[path]))
    return [Figures(way, sizes[way.path], times[way.path]) for way in ways]


async def size_of(app: FastAPI, path: str) -> int:
    sent = await call(app, path)
    if sent.status != 200:
        raise RuntimeError(f"{path} answered {sent.status}")
    return sent.size


async def _cpu_ms(app: FastAPI, path: str, count: int) -> float:
    """Return milliseconds of CPU per call."""
    before = time.process_time()
    for _ in range(count):
        await call(app, path)
    return (time.process_time() - before) / count * 1e3


# --- the result ---------------------------------------------------------------------------------


def table(figures: list[Figures]) -> str:
    """Show each way beside orjson's."""
    lines = [f"{'answer':<24}{'way':<18}{'KB':>8}{'CPU ms':>10}{'min-max':>18}{'x orjson':>10}"]
    orjson_ms = {one.way.answer: one.median for one in figures if one.way.name == ORJSON}
    for one in figures:
        ratio = one.median / orjson_ms[one.way.answer]
        lines.append(
            f"{one.way.answer:<24}{one.way.name:<18}{one.size / 1e3:>8.0f}{one.median:>10.3f}"
            f"{spread(one.ms, 3):>18}{ratio:>10.2f}"
        )
    return "\n".join(lines)


def row_of(one: Figures) -> dict[str, Any]:
    return {"answer": one.way.answer, "way": one.way.name, "bytes": one.size, "cpu_ms": one.ms}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--round-s", type=float, default=0.2, help="CPU seconds of each way in each round")
    options.add_argument("--models", type=int, default=5800, help="of the listing; the default makes 1 MB")
    options.add_argument("--choices", type=int, default=100)
    options.add_argument("--vectors", type=int, default=256)
    options.add_argument("--dimensions", type=int, default=1024)
    options.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    given = options.parse_args()
    ways = [
        *document_ways(f"listing of {given.models}", listing(given.models), Listing),
        *document_ways(f"completion of {given.choices}", completion(given.choices), Completion),
        *embedding_ways(given.vectors, given.dimensions),
    ]
    figures = measure(ways, given.rounds, given.round_s)
    print(table(figures))
    record.write_rows(given.json, [*map(row_of, figures)])


if __name__ == "__main__":
    main()
