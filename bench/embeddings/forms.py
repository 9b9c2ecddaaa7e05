"""What it costs vLLM to write an answer of embeddings, by form. Needs vLLM, but no model and no engine.

    .venv/bin/python -m bench.embeddings.forms [--rounds N] [--json FILE]

vLLM's own code makes the answer of tensors and sends it, without a server. It writes JSON with orjson where
that is installed, else with the standard library; both are measured. CPU milliseconds per answer, the median
of the rounds and their spread; how many ASGI messages the body has; and how long the headers are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fastapi.responses import JSONResponse
from starlette.responses import Response
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.utils import build_pooling_bytes_streaming_response, get_json_response_cls
from vllm.outputs import PoolingOutput, PoolingRequestOutput

from bench.shared.machine import machine

ORJSON = get_json_response_cls()
ABOUT = ("embd-0", 1_700_000_000, "m")
NUMBERS = ("float32", "native")


@dataclass
class Row:
    name: str
    encoding: str
    json_class: type[JSONResponse] | None  # None: no JSON
    size: int = 0
    messages: int = 0
    header_bytes: int = 0
    cpu_ms: list[float] = field(default_factory=list)

    def response(self, outputs: list[PoolingRequestOutput]) -> Response:
        if self.json_class is None:
            return build_pooling_bytes_streaming_response(outputs, *ABOUT, self.encoding, *NUMBERS)
        serving: Any = SimpleNamespace(json_response_cls=self.json_class)
        return ServingEmbedding._openai_json_response(serving, outputs, *ABOUT, self.encoding, *NUMBERS)

    async def send(self, outputs: list[PoolingRequestOutput]) -> None:
        self.size = self.messages = 0

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def take(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.header_bytes = sum(len(name) + len(value) + 4 for name, value in message["headers"])
            else:
                self.size += len(message["body"])
                self.messages += 1

        scope = {"type": "http", "method": "POST", "asgi": {"spec_version": "2.4"}}
        await self.response(outputs)(scope, receive, take)


def rows() -> list[Row]:
    return [
        Row("float, orjson", "float", ORJSON),
        Row("float, json", "float", JSONResponse),
        Row("base64, orjson", "base64", ORJSON),
        Row("base64, json", "base64", JSONResponse),
        Row("bytes", "bytes", None),
        Row("bytes_only", "bytes_only", None),
    ]


def outputs_of(vectors: int, dimensions: int) -> list[PoolingRequestOutput[PoolingOutput]]:
    return [
        PoolingRequestOutput(
            request_id=str(index),
            outputs=PoolingOutput(data=torch.randn(dimensions)),
            prompt_token_ids=[1] * 8,
            num_cached_tokens=0,
            finished=True,
        )
        for index in range(vectors)
    ]


async def measure(outputs: list[PoolingRequestOutput], rounds: int) -> list[Row]:
    measured = rows()
    for row in measured:
        await row.send(outputs)  # warm-up
    for _ in range(rounds):
        for row in measured:
            before = time.process_time()
            await row.send(outputs)
            row.cpu_ms.append((time.process_time() - before) * 1e3)
    return measured


def table(measured: list[Row]) -> str:
    lines = [f"{'form':<16}{'CPU ms':>8}{'min-max':>16}{'KB':>8}{'messages':>10}{'header KB':>11}"]
    for row in measured:
        spread = f"{min(row.cpu_ms):.2f}-{max(row.cpu_ms):.2f}"
        lines.append(
            f"{row.name:<16}{statistics.median(row.cpu_ms):>8.2f}{spread:>16}{row.size / 1e3:>8.0f}"
            f"{row.messages:>10}{row.header_bytes / 1e3:>11.1f}"
        )
    return "\n".join(lines)


def document_of(measured: list[Row]) -> dict[str, Any]:
    described = [
        {
            "form": row.name,
            "bytes": row.size,
            "messages": row.messages,
            "header_bytes": row.header_bytes,
            "cpu_ms": row.cpu_ms,
        }
        for row in measured
    ]
    return {"machine": machine(), "rows": described}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--vectors", type=int, default=256)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")  # vLLM uses it
    measured = asyncio.run(measure(outputs_of(options.vectors, options.dimensions), options.rounds))
    print(f"{options.vectors} vectors of {options.dimensions}\n\n{table(measured)}")
    if options.json is not None:
        options.json.write_text(json.dumps(document_of(measured), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
