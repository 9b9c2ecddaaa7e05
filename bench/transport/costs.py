"""A request costs bytes between processes, CPU at the orchestrator, and CPU of a worker's event loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import uvloop

from bench.shared.bodies import encoded
from bench.shared.cores import Cores
from bench.shared.figures import Column, Sample, in_rounds
from bench.shared.load import JSON_HEADER, Result, run_load
from bench.shared.processes import Failed
from bench.transport.legs import ABSENT, AGAIN, ARMS, PATHS, Arm, Kind, Prompt, Request
from bench.transport.rounds import Panel
from bench.transport.workers import Engine, Server, Servers, orchestrators, workers
from worker import token_ids

# Up to how many tokens a prompt is also served, not only taken in: vLLM's engine has to compute it once for
# each worker, on a CPU.
SERVED_TOKENS: dict[Engine, int] = {"sim": 100_000, "vllm": 10_000}
FEWEST, MOST = 3, 2000  # requests in a sample


@dataclass(frozen=True)
class Extent:
    """A run measures so much: sizes in tokens, and seconds per sample."""

    sizes: Sequence[int]
    rounds: int
    seconds: float
    cores: Cores


# --- bytes ----------------------------------------------------------------------------------------------

_BYTES = [
    Column("client", "client's request", 0),
    Column("prefill", "prefill leg", 0),
    Column("answer", "prefill answer", 0),
    Column("decode", "decode leg", 0),
]


def bytes_on_the_wire(extent: Extent) -> Iterator[Panel]:
    """Measure bodies only: heads have some 300 bytes in any encoding. `ids` are those that a client sent."""
    for kind, arms in ARMS.items():
        for tokens in extent.sizes:
            rows = {arm.name: [_sizes(Prompt(kind, tokens), arm)] for arm in _as_sent(kind, arms)}
            yield Panel("bytes", kind, tokens, _BYTES, rows)


def _sizes(prompt: Prompt, arm: Arm) -> Sample:
    return {
        "client": len(prompt.from_client()),
        "prefill": len(prompt.prefill_leg(arm).body),
        "answer": len(_prefill_answer(prompt, arm)),
        "decode": len(prompt.decode_leg(arm).body),
    }


def _prefill_answer(prompt: Prompt, arm: Arm) -> bytes:
    """The hand-off is that of the decode leg: only its size counts."""
    message = {"role": "assistant", "content": " token"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    chat = {"object": "chat.completion", "model": prompt.model, "choices": [choice]}
    document = {**chat, "kv_transfer_params": {}}
    whole = len(prompt.params()) * b" "
    if arm.ids in (None, "list"):
        ids = prompt.ids if arm.ids else None
        return encoded({**document, token_ids.IDS_KEY: ids}) + whole
    return token_ids.encode_answer(document, arm.ids, token_ids.pack(prompt.ids))[0] + whole


def _as_sent(kind: Kind, arms: list[Arm]) -> list[Arm]:
    """Return each arm once; of what a client sends as ids, Baton packs nothing."""
    return [arm for arm in arms if not arm.name.endswith(AGAIN) and (kind == "chat" or arm.ids is None)]


# --- the orchestrator -----------------------------------------------------------------------------------

_ORCHESTRATOR = [
    Column("cpu_us", "CPU us/request", 0),
    Column("loop_us", "event loop us/request", 0),
]


def at_the_orchestrator(extent: Extent) -> Iterator[Panel]:
    """Measure CPU per request of two legs: read, routed, both legs written, both answers read."""
    with orchestrators(ARMS["chat"], extent.cores) as servers:
        for kind, arms in ARMS.items():
            for tokens in extent.sizes:
                prompt = Prompt(kind, tokens)
                request = Request(PATHS[kind], JSON_HEADER, prompt.from_client())
                named = {
                    arm.name: (servers[arm.name], request) for arm in arms if kind == "chat" or not arm.ids
                }
                rows = _costs(named, 200, extent)
                yield Panel("orchestrator", kind, tokens, _ORCHESTRATOR, rows)


# --- a worker -------------------------------------------------------------------------------------------

_WORKER = [
    Column("loop_us", "event loop us/request", 0),
    Column("cpu_us", "API server us/request", 0),
]


def on_a_worker(engine: Engine, extent: Extent) -> Iterator[Panel]:
    """Measure CPU of the API server per decode leg: its event loop's thread alone, and all of its threads.

    taken in: read, decoded, validated, and then refused because there is no such model
    served: answered with one token; the prefix cache holds the prompt, so it is not computed
    """
    with workers(engine, ARMS["chat"], extent.cores) as servers:
        for kind in ARMS:
            for tokens in extent.sizes:
                yield _worker_panel(engine, "taken in", Prompt(kind, tokens, ABSENT), 404, servers, extent)
                if tokens <= SERVED_TOKENS[engine]:
                    yield _worker_panel(engine, "served", Prompt(kind, tokens), 200, servers, extent)


def _worker_panel(
    engine: Engine, what: str, prompt: Prompt, status: int, servers: Servers, extent: Extent
) -> Panel:
    named = {arm.name: (servers[arm.server], prompt.decode_leg(arm)) for arm in ARMS[prompt.kind]}
    rows = _costs(named, status, extent)
    return Panel(f"{engine} worker", f"{prompt.kind} {what}", prompt.tokens, _WORKER, rows)


# --- a sample -------------------------------------------------------------------------------------------


def _costs(
    named: Mapping[str, tuple[Server, Request]], status: int, extent: Extent
) -> dict[str, list[Sample]]:
    counts = {name: _count(*one, status, extent.seconds) for name, one in named.items()}
    return in_rounds(list(named), extent.rounds, lambda name: _cost(*named[name], status, counts[name]))


def _count(server: Server, request: Request, status: int, seconds: float) -> int:
    """Return how many requests fill a sample. The first few warm up, and their prompt is computed."""
    send(server, request, status, FEWEST)
    each = send(server, request, status, FEWEST).seconds / FEWEST
    return max(FEWEST, min(MOST, round(seconds / each)))


def _cost(server: Server, request: Request, status: int, count: int) -> Sample:
    loop_s, cpu_s = server.loop_seconds(), server.cpu_seconds()
    send(server, request, status, count)
    loop_s, cpu_s = server.loop_seconds() - loop_s, server.cpu_seconds() - cpu_s
    return {"loop_us": loop_s / count * 1e6, "cpu_us": cpu_s / count * 1e6}


def send(server: Server, request: Request, status: int, count: int) -> Result:
    """Send requests one after the other. Raises `Failed` if an answer is another one than expected."""
    load = run_load(
        server.port,
        request.body,
        requests=count,
        connections=1,
        path=request.path,
        headers=request.headers,
        status=status,
    )
    result: Result = uvloop.run(load)
    if result.failed:
        raise Failed(f"{request.path}, {len(request.body):,} bytes: not all answers are HTTP {status}")
    return result
