"""Calibration fits the latency model to a result of `baton bench`, and says how far off it is then.

Each step of the bench is simulated as it was asked for: as many requests, at the same rate or by as many
clients, with prompts and answers of the same mean length. What the endpoint had in its caches is left out of
the prompts. Where it tells its stages (`server-timing`), prefill and transfer are fitted each by its own;
else what a transfer takes counts as prefill.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
_Measure = Callable[[Step], float]

# What is compared of each step: the name, what the simulation calls it, and what a result has of it.
TTFT, TPOT, PREFILL, HANDOFF = "ttft p10", "tpot p50", "prefill p10", "hand-off p10"
COMPARED: Final[Mapping[str, tuple[str, _Measure]]] = {
    TTFT: ("ttft_p10_s", lambda step: step.times["ttft"].p10),
    "ttft p50": ("ttft_p50_s", lambda step: step.times["ttft"].p50),
    "ttft p99": ("ttft_p99_s", lambda step: step.times["ttft"].p99),
    TPOT: ("tpot_p50_s", lambda step: step.times["tpot"].p50),
}
STAGES: Final[Mapping[str, tuple[str, _Measure]]] = {
    PREFILL: ("prefill_p10_s", lambda step: step.stages["prefill"].p10),
    HANDOFF: ("handoff_p10_s", lambda step: step.stages["decode"].p10),
}
LEAST_MS: Final = 1e-3  # of anything

Pairs = dict[str, tuple[float, float]]  # by figure: measured and simulated in milliseconds


class Calibration:
    """These times fit, and so far is what they make from what was measured."""

    __slots__ = ("latency", "steps")

    def __init__(self, latency: Latency, steps: Sequence[tuple[str, Pairs]]) -> None:
        """`steps` are named after their workload and load."""
        self.latency = latency
        self.steps = steps

    @property
    def rows(self) -> list[tuple[str, str, float, float]]:
        """They are the step, the figure, and what it is as measured and as simulated."""
        return [(step, figure, *pair) for step, pairs in self.steps for figure, pair in pairs.items()]

    @property
    def error(self) -> float:
        """It is the mean of the logarithms of measured by simulated, without their signs."""
        return statistics.fmean(abs(math.log(_ratio(*row[2:]))) for row in self.rows)

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


def _ratio(measured: float, simulated: float) -> float:
    return max(measured, LEAST_MS) / max(simulated, LEAST_MS)


def calibrate(path: str, config: Config, model: ModelConfig) -> Calibration:
    """Fit the times of `model`'s workers, as many as there are. Raises `SimulationError`."""
    try:
        steps = [step for step in load(path).steps if step.ok and {"ttft", "tpot"} <= step.times.keys()]
    except BenchError as error:
        raise SimulationError(str(error)) from error
    if not steps:
        raise SimulationError(f"{path}: no step has answers with more than one token")
    decoders = sum(pool.count for role, pool in model.pools() if role != "prefill")
    fits = [_Fit(step, max(1, decoders)) for step in steps]
    best = None
    for _ in range(ROUNDS):
        latency = _latency(fits)
        pairs = [_compared(index, step, config, model, latency) for index, step in enumerate(steps)]
        found = Calibration(latency, [*zip(map(_label, steps), pairs, strict=True)])
        if best is None or found.error < best.error:
            best = found
        for fit, compared in zip(fits, pairs, strict=True):
            fit.correct(latency, compared)
    assert best is not None  # noqa: S101  # for the type checker
    return best


# --- what fits ----------------------------------------------------------------------------------


class _Fit:
    """A step says of the engines how long a prompt, a hand-off and a decode step of its kind takes: at first
    by what was measured of those that waited least, then corrected by how far off the simulation is.
    """

    def __init__(self, step: Step, decoders: int) -> None:
        self.tokens = _new_tokens(step)
        self.running = max(0.0, _running(step) / decoders - 1.0)  # beside one
        self.has_stages = _has_stages(step)
        self.prefill_ms = max(LEAST_MS, _prefill_ms(step))
        self.transfer_ms = _transfer_ms(step) if self.has_stages else 0.0
        self.step_ms = max(LEAST_MS, step.times["tpot"].p50)

    def correct(self, latency: Latency, found: Pairs) -> None:
        """Take the times that were simulated, each corrected by how far off it was: those of prompts by what
        waited least, as the same queue does not come twice.
        """
        tokens, steps = round(self.tokens), found.get(TPOT, (1.0, 1.0))
        ratio = _bounded(*found.get(PREFILL, found.get(TTFT, (1.0, 1.0))))
        self.prefill_ms = max(LEAST_MS, latency.prefill_s(tokens) * 1e3) * ratio
        step_ms = latency.decode_ms_per_token + latency.decode_ms_per_running * self.running
        self.step_ms = max(LEAST_MS, step_ms) * _bounded(*steps)
        if HANDOFF in found:  # a transfer is what a hand-off takes beyond a step
            measured, simulated = (whole - one for whole, one in zip(found[HANDOFF], steps, strict=True))
            self.transfer_ms = max(LEAST_MS, latency.transfer_s(tokens) * 1e3) * _bounded(measured, simulated)


def _bounded(measured: float, simulated: float) -> float:
    return min(max(_ratio(measured, simulated), 1 / MOST_STEP), MOST_STEP)


def _latency(fits: Sequence[_Fit]) -> Latency:
    fixed_ms, token_ms = _line([(fit.tokens, fit.prefill_ms) for fit in fits])
    transfers = [(fit.tokens, fit.transfer_ms) for fit in fits if fit.has_stages]
    link_ms, link_token_ms = _line(transfers) if transfers else (0.0, 0.0)
    step_ms, running_ms = _line([(fit.running, fit.step_ms) for fit in fits], flat=True)
    return Latency(
        prefill_ms=fixed_ms,
        prefill_us_per_token=token_ms * 1e3,
        transfer_ms=link_ms,
        transfer_us_per_token=link_token_ms * 1e3,
        decode_ms_per_token=step_ms,
        decode_ms_per_running=running_ms,
    )


def _new_tokens(step: Step) -> float:
    return max(1.0, (step.prompt_tokens - step.cached_tokens) / step.ok)


def _prefill_ms(step: Step) -> float:
    stage = step.stages.get("prefill")
    return step.times["ttft"].p10 if stage is None else stage.p10


def _has_stages(step: Step) -> bool:
    """Tell whether two workers have served, and it is known how long each took."""
    return "prefill" in step.stages and "decode" in step.stages


def _transfer_ms(step: Step) -> float:
    """Return what is left of the time to the decode worker's first token without a step of it."""
    return max(LEAST_MS, step.stages["decode"].p10 - step.times["tpot"].p10)


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


def _compared(index: int, step: Step, config: Config, model: ModelConfig, latency: Latency) -> Pairs:
    """Return what a step is like as it was measured, and as it is with these times."""
    trace = _trace_of(step, Random(f"bench {index}"))  # noqa: S311  # no secret
    conditions = Conditions(noise=0.0)
    experiment = Experiment(config, model, trace, warm_up=0.0, latency=latency, conditions=conditions)
    figures = experiment.figures(config.routing)
    wanted = {**COMPARED, **(STAGES if _has_stages(step) else {})}
    pairs = {name: (measured(step), figures[key] * 1e3) for name, (key, measured) in wanted.items()}
    return {name: pair for name, pair in pairs.items() if not math.isnan(pair[1])}


def _label(step: Step) -> str:
    return f"{step.workload}, {step.load}"


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
