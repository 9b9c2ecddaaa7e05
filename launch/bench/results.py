"""What a bench found, as it is written to a file: frozen values, made from samples by pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from launch.bench.errors import BenchError
from launch.bench.sample import Sample, Slo

FORMAT = "baton-bench/1"
AB_FORMAT = "baton-bench-ab/1"


class Unit(StrEnum):
    """What a load counts."""

    RATE = "req/s"  # open loop: requests come whether or not the last ones are answered
    CONCURRENT = "at once"  # closed loop: each client waits for its answer


class Load(msgspec.Struct, frozen=True):
    value: float
    unit: Unit

    def __str__(self) -> str:
        digits = ".3g" if self.value < 1000 else ".0f"
        return f"{self.value:{digits}} {self.unit}"


class Spread(msgspec.Struct, frozen=True):
    """A distribution, in milliseconds."""

    count: int
    mean: float
    min: float
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float
    p95: float
    p99: float
    max: float


QUANTILES = {
    "min": 0.0,
    "p10": 0.1,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p95": 0.95,
    "p99": 0.99,
    "max": 1.0,
}


class ClientLoad(msgspec.Struct, frozen=True):
    """What the run cost the client itself."""

    cpu: float  # of one core, as a share; the client uses no second one
    connects: int
    reuses: int  # requests on a connection that was there


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One workload under one load."""

    workload: str
    load: Load
    seconds: float  # from the start to the last answer
    requests: int
    ok: int
    good: int  # within the SLO
    errors: dict[str, int]  # by kind
    error_details: dict[str, str]  # by kind, the first one's text
    prompt_tokens: int
    cached_tokens: int  # of them, found in a cache
    output_tokens: int
    times: dict[str, Spread]  # by the keys of NAMES, of the requests that succeeded; `late` of all
    stages: dict[str, Spread]  # from server-timing
    paths: dict[str, int]  # from x-baton-path
    client: ClientLoad

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.ok / self.seconds

    @property
    def goodput(self) -> float:
        """Answers per second that kept to the SLO."""
        return self.good / self.seconds

    @property
    def token_rate(self) -> float:
        return self.output_tokens / self.seconds

    def holds(self, slo: Slo) -> bool:
        """Enough of the requests were good; one that failed was not."""
        return self.good >= slo.share * self.requests


NAMES = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end to end", "late": "sent late"}


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What must be the same for two results to be comparable."""

    model: str
    profile: str
    seed: int
    slo: Slo
    tokens_per_word: float
    fixed_length: bool  # answers are as long as asked for, not as the model likes


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A file of `baton bench`."""

    format: str
    created: str  # ISO 8601, UTC
    url: str
    salt: str  # with the same one, and the same setup, the text is the same
    setup: Setup
    steps: list[Step]
    sustained: dict[str, float] = {}  # the highest rate that held, by workload; 0 if none did


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How one arm compares to the first, for one metric: one ratio per round."""

    workload: str
    metric: str
    arm: str
    median: float
    low: float
    high: float
    noise_low: float  # the same for the first arm against itself
    noise_high: float

    @property
    def is_beyond_noise(self) -> bool:
        """No round of this arm is within the range that the first arm has against itself."""
        return self.low > self.noise_high or self.high < self.noise_low


class AbResult(msgspec.Struct, frozen=True, kw_only=True):
    """A file of `baton bench --ab`."""

    format: str
    created: str
    study: str
    salt: str
    arms: dict[str, str]  # URL by label; the first is the one that others are compared to
    setup: Setup
    rounds: int
    ratios: list[Ratio]
    steps: dict[str, list[Step]]  # by label, `LABEL again` for the second run of the first arm


# --- from samples -------------------------------------------------------------------------------


def summarize(
    workload: str, load: Load, samples: Sequence[Sample], seconds: float, slo: Slo, client: ClientLoad
) -> Step:
    ok = [sample for sample in samples if sample.is_ok]
    failed = [sample for sample in samples if not sample.is_ok]
    usages = [sample.usage for sample in ok if sample.usage is not None]
    return Step(
        workload=workload,
        load=load,
        seconds=seconds,
        requests=len(samples),
        ok=len(ok),
        good=sum(sample.is_good(slo) for sample in ok),
        errors=dict(Counter(str(sample.error) for sample in failed)),
        error_details={str(sample.error): sample.detail for sample in reversed(failed)},
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        output_tokens=sum(sample.output_tokens for sample in ok),
        times=_times(ok, samples),
        stages=_stages(ok),
        paths=dict(Counter(sample.path for sample in ok if sample.path is not None)),
        client=client,
    )


def spread(values_ms: Iterable[float]) -> Spread | None:
    """None of nothing."""
    ordered = sorted(values_ms)
    if not ordered:
        return None
    quantiles = {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    return Spread(count=len(ordered), mean=sum(ordered) / len(ordered), **quantiles)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, in proportion."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _times(ok: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, Spread]:
    seconds = {
        "ttft": [sample.ttft_s for sample in ok],
        "itl": [gap for sample in ok for gap in sample.gaps_s()],
        "tpot": [sample.tpot_s for sample in ok if sample.tpot_s is not None],
        "e2e": [sample.end_to_end_s for sample in ok],
        "late": [sample.late_s for sample in samples],
    }
    return _spreads({name: [value * 1e3 for value in values] for name, values in seconds.items()})


def _stages(ok: Sequence[Sample]) -> dict[str, Spread]:
    stages: dict[str, list[float]] = {}
    for sample in ok:
        for name, duration in sample.stages.items():
            stages.setdefault(name, []).append(duration)
    return _spreads(stages)


def _spreads(values_ms: dict[str, list[float]]) -> dict[str, Spread]:
    found = ((name, spread(values)) for name, values in values_ms.items())
    return {name: value for name, value in found if value is not None}


# --- files --------------------------------------------------------------------------------------


def save(result: Result | AbResult, path: str) -> None:
    """Raises `BenchError`."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error


def load(path: str) -> Result:
    """Raises `BenchError`."""
    try:
        result = msgspec.json.decode(Path(path).read_bytes(), type=Result)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is no result of baton bench: {error}") from error
    if result.format != FORMAT:
        raise BenchError(f"{path} has the format {result.format!r}, not {FORMAT!r}")
    return result
