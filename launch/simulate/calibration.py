"""Calibration fits the latency model to a result of `baton bench`, and says how far off it is then.

Each step of the bench is simulated as it was asked for: as many requests, at the same rate or by as many
clients, with prompts and answers of the same mean length. What the endpoint had in its caches is left out of
the prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, Final

from launch.bench.errors import BenchError
from launch.bench.results import Step, Unit, load
from launch.bench.shapes import WORKLOADS
from launch.simulate.errors import SimulationError
from launch.simulate.experiment import Experiment
from launch.simulate.models import TIMES
from launch.simulate.report import aligned
from launch.simulate.site import Conditions
from launch.simulate.trace import Arrival, Trace
from orchestrator.config.options import Config, ModelConfig
from worker.sim.latency import Latency

ROUNDS: Final = 6  # of simulating and correcting
MOST_STEP: Final = 2.0  # in one round a time is corrected by this factor at most
DISTINCT: Final = 1.5  # steps whose lengths differ by less tell nothing of a slope
BLOCK_TOKENS: Final = 512
COMPARED: Final = {"ttft p50": ("ttft", "p50"), "ttft p99": ("ttft", "p99"), "tpot p50": ("tpot", "p50")}

Row = tuple[str, str, float, float]  # step, figure, measured and simulated in milliseconds


class Calibration:
    """These times fit, and so far is what they make from what was measured."""

    __slots__ = ("latency", "rows")

    def __init__(self, latency: Latency, rows: Sequence[Row]) -> None:
        self.latency = latency
        self.rows = rows

    @property
    def error(self) -> float:
        """It is the mean of the logarithms of measured by simulated, without their signs."""
        return statistics.fmean(abs(math.log(_ratio(row))) for row in self.rows)

    def ratio(self, figure: str) -> float:
        """Return how much larger a figure was measured than simulated, in the geometric mean of all steps."""
        found = [math.log(_ratio(row)) for row in self.rows if row[1] == figure]
        return math.exp(statistics.fmean(found)) if found else 1.0

    def as_dict(self) -> dict[str, Any]:
        times = {name: getattr(self.latency, name) for name in TIMES}
        steps = [
            {"step": step, "figure": figure, "measured_ms": measured, "simulated_ms": simulated}
            for step, figure, measured, simulated in self.rows
        ]
        return {"sim": times, "mean_error": math.expm1(self.error), "steps": steps}

    def as_text(self) -> str:
        rows = [["step", "figure", "measured ms", "simulated ms", "off by"]]
        for step, figure, measured, simulated in self.rows:
            off = f"{simulated / measured - 1:+.1%}"
            rows.append([step, figure, f"{measured:.2f}", f"{simulated:.2f}", off])
        times = "\n".join(f"  {name}: {getattr(self.latency, name):.4g}" for name in TIMES)
        return f"sim:\n{times}\n\n{aligned(rows)}\n\noff by {math.expm1(self.error):.1%} on average"


def _ratio(row: Row) -> float:
    return max(row[2], 1e-6) / max(row[3], 1e-6)


def calibrate(path: str, config: Config, model: ModelConfig) -> Calibration:
    """Fit the times of `model`'s workers, as many as there are. Raises `SimulationError`."""
    try:
        steps = [step for step in load(path).steps if step.ok and {"ttft", "tpot"} <= step.times.keys()]
    except BenchError as error:
        raise SimulationError(str(error)) from error
    if not steps:
        raise SimulationError(f"{path}: no step has answers with more than one token")
    decoders = sum(pool.count for role, pool in model.pools() if role != "prefill")
    latency = _guess(steps, max(1, decoders))
    best = None
    for _ in range(ROUNDS):
        found = Calibration(latency, _compared(steps, config, model, latency))
        if best is None or found.error < best.error:
            best = found
        latency = _corrected(found)
    assert best is not None  # noqa: S101  # for the type checker
    return best


# --- a first guess ------------------------------------------------------------------------------


def _guess(steps: Sequence[Step], decoders: int) -> Latency:
    """Read the times off the requests that waited least."""
    prefills = [(_new_tokens(step), _prefill_ms(step)) for step in steps]
    fixed_ms, token_ms = _line(prefills)
    batches = [(max(0.0, _running(step) / decoders - 1.0), step.times["tpot"].p50) for step in steps]
    step_ms, running_ms = _line(batches, flat=True)
    return Latency(
        prefill_ms=fixed_ms,
        prefill_us_per_token=token_ms * 1e3,
        decode_ms_per_token=step_ms,
        decode_ms_per_running=running_ms,
    )


def _new_tokens(step: Step) -> float:
    return max(1.0, (step.prompt_tokens - step.cached_tokens) / step.ok)


def _prefill_ms(step: Step) -> float:
    stage = step.stages.get("prefill")
    return step.times["ttft"].p10 if stage is None else stage.p10


def _running(step: Step) -> float:
    """Return how many answers were being made at once, by Little's law."""
    times = step.times
    seconds = (times["e2e"].mean - times["ttft"].mean) / 1e3 if "e2e" in times else 0.0
    return step.ok / step.seconds * seconds


def _line(points: Sequence[tuple[float, float]], *, flat: bool = False) -> tuple[float, float]:
    """Return a line's value at 0 and its slope, neither negative: by least squares, of what lies apart. If
    nothing does, the line goes through 0, or is `flat`.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if max(xs) >= DISTINCT * max(min(xs), 1e-9) and max(xs) - min(xs) >= 1.0:
        slope, value = statistics.linear_regression(xs, ys)
        if slope >= 0.0 and value >= 0.0:
            return value, slope
        flat = slope < 0.0
    if flat:
        return statistics.fmean(ys), 0.0
    return 0.0, statistics.fmean(y / x for x, y in points)


# --- what it makes ------------------------------------------------------------------------------


def _compared(steps: Sequence[Step], config: Config, model: ModelConfig, latency: Latency) -> list[Row]:
    rows: list[Row] = []
    for index, step in enumerate(steps):
        trace = _trace_of(step, Random(f"bench {index}"))  # noqa: S311  # no secret
        experiment = Experiment(
            config, model, trace, warm_up=0.0, latency=latency, conditions=Conditions(noise=0.0)
        )
        figures = experiment.figures(config.routing)
        for name, (time, quantile) in COMPARED.items():
            simulated = figures[f"{time}_{quantile}_s"] * 1e3
            if not math.isnan(simulated):
                label = f"{step.workload}, {step.load}"
                rows.append((label, name, getattr(step.times[time], quantile), simulated))
    return rows


def _trace_of(step: Step, random: Random) -> Trace:
    """Make requests such as those of the step."""
    count = step.requests
    if step.load.unit is Unit.RATE:
        duration_s = count / step.load.value
        moments = sorted(random.uniform(0.0, duration_s) for _ in range(count))
        return Trace([_request(step, i, at_s, random) for i, at_s in enumerate(moments)], BLOCK_TOKENS)
    clients = max(1, min(count, int(step.load.value)))
    requests = [_request(step, index, 0.0, random) for index in range(count)]
    for index in range(clients, count):
        requests[index - clients].after = requests[index]
    return Trace(requests[:clients], BLOCK_TOKENS)


def _request(step: Step, index: int, at_s: float, random: Random) -> Arrival:
    workload = WORKLOADS.get(step.workload)
    spread = max(shape.spread for shape in workload.shapes) if workload is not None else 0.0
    lengths = _new_tokens(step), step.output_tokens / step.ok
    prompt, answer = (max(1, round(mean * random.uniform(1 - spread, 1 + spread))) for mean in lengths)
    return Arrival(index, at_s, prompt, answer)


def _corrected(found: Calibration) -> Latency:
    """Correct the times of prompts and of steps by how far TTFT and TPOT are off."""
    prefill = min(max(found.ratio("ttft p50"), 1 / MOST_STEP), MOST_STEP)
    decode = min(max(found.ratio("tpot p50"), 1 / MOST_STEP), MOST_STEP)
    latency = found.latency
    return replace(
        latency,
        prefill_ms=latency.prefill_ms * prefill,
        prefill_us_per_token=latency.prefill_us_per_token * prefill,
        decode_ms_per_token=latency.decode_ms_per_token * decode,
        decode_ms_per_running=latency.decode_ms_per_running * decode,
    )
