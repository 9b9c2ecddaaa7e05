"""`python -m bench.routing --trace-dir DIR` compares policies, and other routers' formulas, on traces.

All run in `baton simulate`: the policies are those that serve. The tables are in `docs/routing.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from bench.routing.cases import Case, TraceOf, of_agents, of_file
from bench.routing.formulas import FORMULAS, enter
from bench.routing.rules import APART, RULES
from launch.simulate.figures import SPREAD, Figures
from launch.simulate.network import Network
from launch.simulate.site import Conditions

OURS: Final = ("least_loaded", "prefix")
NAMES: Final = (*OURS, "prefix@auto", *FORMULAS)
GOOD: Final = 0.9  # the load that a policy carries has so many good requests
RATES: Final = (1.0, 3.0)  # between which that load is looked for
CLOSE: Final = 0.04
PREFILL_NAMES: Final = tuple(f"m/prefill/{index}" for index in range(8))

Traces = dict[str, TraceOf]


def main() -> int:
    arguments = _parser().parse_args()
    enter()
    traces = _traces(Path(arguments.trace_dir))
    seeds = range(arguments.seeds)
    names = arguments.only.split(",") if arguments.only else list(TABLES)
    for name in names:
        started = time.monotonic()
        print(f"\n### {name}\n")
        for line in TABLES[name](traces, seeds, arguments.policies):
            print(line, flush=True)
        print(f"({time.monotonic() - started:.0f} s)", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.routing", description=__doc__)
    parser.add_argument("--trace-dir", required=True, help="where Mooncake's and Azure's traces are")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--only", help=f"tables with commas between: {', '.join(TABLES)}")
    parser.add_argument(
        "--policies",
        type=lambda text: text.split(","),
        default=NAMES,
        help=f"variants with commas between, as of `baton simulate`; default: {','.join(NAMES)}",
    )
    return parser


def _traces(folder: Path) -> Traces:
    files = {
        "conversation": "conversation_trace*.jsonl",
        "synthetic": "synthetic_trace*.jsonl",
        "azure code": "AzureLLMInferenceTrace_code.csv",
        "azure conv": "AzureLLMInferenceTrace_conv.csv",
    }
    found = {name: of_file(folder, pattern) for name, pattern in files.items()}
    return {name: trace for name, trace in found.items() if trace is not None}


# --- every load ---------------------------------------------------------------------------------


def _loads(traces: Traces) -> Iterator[Case]:
    """Yield the cases of the first tables, those whose traces are there."""
    for name, rates, prefill, decode in (
        ("conversation", (1.5, 1.8, 2.2), 8, 8),
        ("synthetic", (1.5, 2.2), 8, 8),
        ("azure code", (5.0,), 4, 4),
        ("azure conv", (4.0,), 4, 6),
    ):
        for rate in rates if name in traces else ():
            yield Case(f"{name} x{rate:g}, {prefill}P+{decode}D", traces[name], rate, prefill, decode)
    for rate in (0.06, 0.10, 0.14):
        yield Case(f"agentic {rate:g} sessions/s, 6P+10D", of_agents(160, rate), 1.0, 6, 10)


def policies(traces: Traces, seeds: range, names: Sequence[str]) -> Iterator[str]:
    """Our policies and the formulas under each load, and how `prefix` stands to the best formula."""
    matrix: dict[str, dict[str, Figures]] = {}
    for case in _loads(traces):
        found = {name: case.figures(name, seeds) for name in names}
        matrix[case.name] = found
        yield from _table(case.name, found)
        formulas = [figures for name, figures in found.items() if name in FORMULAS]
        for name in found if formulas else ():
            if name not in FORMULAS:
                yield _beside(name, found[name], formulas)
        yield ""
    yield from _matrix(matrix)


def _matrix(found: dict[str, dict[str, Figures]]) -> Iterator[str]:
    """Yield one table of all cases: TTFT p50 / p99 in seconds, and the share of good requests."""
    yield f"| | {' | '.join(found)} |"
    yield f"|---|{'---|' * len(found)}"
    for name in next(iter(found.values())):
        cells = [
            f"{case[name]['ttft_p50_s']:.2f} / {case[name]['ttft_p99_s']:.1f} {case[name]['good']:.3f}"
            for case in found.values()
        ]
        yield f"| `{name}` | {' | '.join(cells)} |"


def _beside(name: str, figures: Figures, formulas: Sequence[Figures]) -> str:
    ratios = ", ".join(
        f"{key[5:8]} {figures[key] / min(other[key] for other in formulas):.2f}"
        for key in ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s")
    )
    more = figures["good"] - max(other["good"] for other in formulas)
    return f"`{name}` by the best formula in each figure: {ratios}; good {more:+.3f}."


def carried(traces: Traces, seeds: range, names: Sequence[str]) -> Iterator[str]:
    """The highest rate of the conversations at which enough requests are good."""
    case = Case("conversation", traces["conversation"], 1.0, 8, 8)
    yield f"| conversation, 8P+8D | rate with good >= {GOOD} |"
    yield "|---|---|"
    for name in names:
        yield f"| `{name}` | {_carried(case, name, seeds):.2f} |"


def _carried(case: Case, variant: str, seeds: range) -> float:
    low, high = RATES
    while high - low > CLOSE:
        middle = (low + high) / 2
        if case.at(middle).figures(variant, seeds)["good"] >= GOOD:
            low = middle
        else:
            high = middle
    return low


# --- what is not as it should be ----------------------------------------------------------------


def slow(traces: Traces, seeds: range, names: Sequence[str]) -> Iterator[str]:
    """A prefill worker that is five times slower, which nobody is told."""
    for label, found in (("no worker slow", {}), ("one of 8 five times slower", {PREFILL_NAMES[3]: 5.0})):
        case = Case(label, traces["conversation"], 1.2, 8, 8, conditions=Conditions(slow=found))
        title = f"conversation x1.2, 8P+8D, {label}"
        yield from _table(title, {name: case.figures(name, seeds) for name in names})


def conditions(traces: Traces, seeds: range, names: Sequence[str]) -> Iterator[str]:
    """`prefix` where its index, its estimates or its processes are not as they should be."""
    conversation = traces["conversation"]
    restarts = [(600.0 / 1.8 + 60.0 * index, name) for index, name in enumerate(PREFILL_NAMES[:4])]
    half, twice = ({"prefill": {"policy": "prefix", "kept": kept}} for kept in (0.5, 2.0))
    silent = Conditions(shares=False)
    cases = [
        Case("as it should be", conversation, 1.8, 8, 8),
        Case("index halved", conversation, 1.8, 8, 8, routing=half),
        Case("index doubled", conversation, 1.8, 8, 8, routing=twice),
        Case("4 processes, told after 0.1 s", conversation, 1.8, 8, 8, processes=4),
        Case("4 processes, not told", conversation, 1.8, 8, 8, processes=4, conditions=silent),
        Case("engines 3 x slower than expected", conversation, 1.8, 8, 8, slowness=3.0),
        Case("engines 3 x faster than expected", conversation, 1.8, 8, 8, slowness=1 / 3),
        Case("4 restarts, not told", conversation, 1.8, 8, 8, conditions=Conditions(restarts=restarts)),
    ]
    found = {case.name: case.figures("prefix", seeds) for case in cases}
    yield from _table("`prefix`, conversation x1.8, 8P+8D", found)
    base = found["as it should be"]
    for name, figures in found.items():
        ratios = [figures[key] / base[key] for key in ("ttft_p50_s", "ttft_p99_s")]
        yield f"{name}: p50 x {ratios[0]:.2f}, p99 x {ratios[1]:.2f}."


def zones(traces: Traces, seeds: range, names: Sequence[str]) -> Iterator[str]:
    """Two zones, between which hand-offs take longer: pairs that are chosen together, and apart."""
    variants = (f"prefix@always/{APART}", "prefix", "prefix@auto")
    for factor in (1.0, 4.0, 20.0):
        there = Conditions(network=Network(("east", "west"), factor))
        title = f"conversation x1.5, 8P+8D in 2 zones, hand-offs between them x{factor:g}"
        case = Case(title, traces["conversation"], 1.5, 8, 8, conditions=there)
        yield from _table(title, {name: case.figures(name, seeds) for name in variants})


# --- one worker or two --------------------------------------------------------------------------


def modes(traces: Traces, seeds: range, names: Sequence[str]) -> Iterator[str]:
    """Two workers for each request, one, or as `auto` decides."""
    mixes = [
        ("conversation", 1.8, 8, 8),
        ("conversation", 1.5, 5, 6),
        ("azure conv", 4.0, 4, 6),
        ("azure code", 5.0, 4, 4),
    ]
    cases = [
        Case(f"{name} x{rate:g}, {prefill}P+{decode}D", traces[name], rate, prefill, decode)
        for name, rate, prefill, decode in mixes
        if name in traces
    ]
    cases.append(Case("agentic 0.1 sessions/s, 6P+10D", of_agents(160, 0.1), 1.0, 6, 10))
    fixed = ("prefix@always", *(f"prefix@always/{rule}" for rule in RULES), "prefix+prefix@never")
    for case in cases:
        ours = [name for name in names if name.endswith("@auto")]
        found = {name: case.figures(name, seeds) for name in (*fixed, *ours)}
        yield from _table(case.name, found)
        best = max(fixed, key=lambda name: found[name]["good"])
        yield f"Best fixed rule in hindsight: `{best}`."
        for name in ours:
            tpot = found[name]["tpot_p99_s"] / found[fixed[0]]["tpot_p99_s"]
            good = found[name]["good"] - found[best]["good"]
            yield f"`{name}`: good {good:+.3f} by that; TPOT p99 x {tpot:.2f} of `always`."
        yield ""


# --- tables -------------------------------------------------------------------------------------


def _table(title: str, found: dict[str, Figures]) -> Iterator[str]:
    yield f"| {title} | TTFT p50 s | p90 | p99 | TPOT p99 ms | cached | whole | good |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, figures in found.items():
        cells = [
            _cell(figures, "ttft_p50_s", 3),
            _cell(figures, "ttft_p90_s", 2),
            _cell(figures, "ttft_p99_s", 2),
            _cell(figures, "tpot_p99_s", 1, 1e3),
            _cell(figures, "cached_ratio", 3),
            f"{figures['whole']:.2f}",
            _cell(figures, "good", 3),
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _cell(figures: Figures, name: str, digits: int, factor: float = 1.0) -> str:
    spread = figures.get(name + SPREAD)
    text = f"{figures[name] * factor:.{digits}f}"
    return text if spread is None else f"{text} ±{spread * factor:.{digits}f}"


TABLES: Final[dict[str, Callable[[Traces, range, Sequence[str]], Iterator[str]]]] = {
    "policies": policies,
    "carried": carried,
    "slow": slow,
    "conditions": conditions,
    "zones": zones,
    "modes": modes,
}

if __name__ == "__main__":
    sys.exit(main())
