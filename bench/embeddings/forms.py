"""This measures what it costs vLLM to write embeddings, by form. It needs vLLM, but no model and no engine.

    .venv/bin/python -m bench.embeddings.forms [--rounds N] [--json FILE]

vLLM's own code makes the answer of tensors and sends it, without a server. It writes JSON with orjson where
that is installed, else with the standard library; both are measured. CPU milliseconds per answer, the median
of the rounds and their spread; how many ASGI messages the body has; and how long the headers are.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fastapi.responses import JSONResponse
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.utils import build_pooling_bytes_streaming_response, get_json_response_cls
from vllm.outputs import PoolingOutput, PoolingRequestOutput

from bench.micro.asgi import Sent, call
from bench.shared import record
from bench.shared.command import parser
from bench.shared.figures import aligned, in_rounds, spread

ORJSON = get_json_response_cls()
ABOUT = ("embd-0", 1_700_000_000, "m")
NUMBERS = ("float32", "native")


@dataclass(frozen=True)
class Form:
    """vLLM writes an answer in this form."""

    encoding: str
    json_class: type[JSONResponse] | None = None  # None: no JSON

    def response(self, outputs: list[PoolingRequestOutput]) -> Any:
        if self.json_class is None:
            return build_pooling_bytes_streaming_response(outputs, *ABOUT, self.encoding, *NUMBERS)
        serving: Any = SimpleNamespace(json_response_cls=self.json_class)
        return ServingEmbedding._openai_json_response(serving, outputs, *ABOUT, self.encoding, *NUMBERS)


FORMS = {
    "float, orjson": Form("float", ORJSON),
    "float, json": Form("float", JSONResponse),
    "base64, orjson": Form("base64", ORJSON),
    "base64, json": Form("base64", JSONResponse),
    "bytes": Form("bytes"),
    "bytes_only": Form("bytes_only"),
}
Measured = dict[str, tuple[Sent, list[float]]]  # by form: an answer, and CPU ms by round


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


def measure(outputs: list[PoolingRequestOutput], rounds: int) -> Measured:
    with asyncio.Runner() as runner:

        def send(name: str) -> Sent:
            return runner.run(answer(FORMS[name], outputs))

        def cpu_ms(name: str) -> float:
            before = time.process_time()
            send(name)
            return (time.process_time() - before) * 1e3

        sent = {name: send(name) for name in FORMS}  # warm-up
        times = in_rounds(list(FORMS), rounds, cpu_ms)
    return {name: (sent[name], times[name]) for name in FORMS}


async def answer(form: Form, outputs: list[PoolingRequestOutput]) -> Sent:
    return await call(form.response(outputs))


def table(measured: Measured) -> str:
    lines = [["form", "CPU ms", "min-max", "KB", "messages", "header KB"]]
    for name, (sent, cpu_ms) in measured.items():
        answer = [f"{sent.size / 1e3:.0f}", str(sent.messages), f"{sent.header_bytes / 1e3:.1f}"]
        lines.append([name, f"{statistics.median(cpu_ms):.2f}", spread(cpu_ms, 2), *answer])
    return "\n".join(aligned(lines))


def row_of(name: str, sent: Sent, cpu_ms: list[float]) -> dict[str, Any]:
    about = {"bytes": sent.size, "messages": sent.messages, "header_bytes": sent.header_bytes}
    return {"form": name, **about, "cpu_ms": cpu_ms}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--vectors", type=int, default=256)
    options.add_argument("--dimensions", type=int, default=1024)
    options.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    given = options.parse_args()
    warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")  # vLLM uses it
    measured = measure(outputs_of(given.vectors, given.dimensions), given.rounds)
    print(f"{given.vectors} vectors of {given.dimensions}\n\n{table(measured)}")
    record.write_rows(given.json, [row_of(name, *found) for name, found in measured.items()])


if __name__ == "__main__":
    main()
