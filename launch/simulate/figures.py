"""What a run was like, as figures: of one seed, and of several with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

from launch.bench.results import quantile
from launch.simulate.engine import Engine
from launch.simulate.site import Job, Site

Figures = dict[str, float]  # by name; NaN where there is nothing to say it of

SPREAD: Final = "_spread"  # behind a figure's name: the standard deviation over the seeds
QUANTILES: Final = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


class Slo:
    """A good request keeps to this."""

    __slots__ = ("tpot_s", "ttft_s")

    def __init__(self, ttft_s: float = 5.0, tpot_s: float = 0.1) -> None:
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s

    def is_kept(self, job: Job) -> bool:
        """Tell whether a request was answered, began in time, and got its tokens in time on average."""
        return not job.is_refused and ttft_s(job) <= self.ttft_s and tpot_s(job) <= self.tpot_s


def ttft_s(job: Job) -> float:
    return job.first_at - job.received_at


def tpot_s(job: Job) -> float:
    """Return the mean seconds of a token after the first; 0.0 if there is no second."""
    later = job.arrival.output_tokens - 1
    return (job.ended_at - job.first_at) / later if later else 0.0


def prefill_s(job: Job) -> float:
    """Return how long a request that two workers served was with its prefill worker."""
    return job.record.prefill_done - job.record.admitted


def handoff_s(job: Job) -> float:
    """Return how long after that its first token came: after a transfer, and a step of the decode worker."""
    return job.first_at - job.record.prefill_done


def measure(site: Site, slo: Slo, warm_up: float) -> Figures:
    """Return the figures of the requests that came after a share `warm_up` of the time in which they did."""
    first, last = site.jobs[0].received_at, max(job.received_at for job in site.jobs)
    begin = first + warm_up * (last - first)
    jobs = [job for job in site.jobs if job.received_at >= begin]
    answered = [job for job in jobs if not job.is_refused]
    figures = {"requests": float(len(jobs)), "refused": float(len(jobs) - len(answered))}
    figures |= _spread("ttft", [ttft_s(job) for job in answered])
    figures |= _spread("tpot", [tpot_s(job) for job in answered if job.arrival.output_tokens > 1])
    figures |= _spread("prefill", [prefill_s(job) for job in answered if job.record.prefill_done])
    figures |= _spread("handoff", [handoff_s(job) for job in answered if job.record.prefill_done])
    figures["cached_ratio"] = _ratio(
        sum(job.cached_tokens for job in answered), sum(job.arrival.prompt_tokens for job in answered)
    )
    figures["good"] = sum(map(slo.is_kept, jobs)) / len(jobs)
    figures["whole"] = _ratio(sum(_is_whole(job) for job in answered), len(answered))
    return figures | _load(site)


def _spread(name: str, values: list[float]) -> Figures:
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys((f"{name}_{key}_s" for key in (*QUANTILES, "mean")), math.nan)
    found = {f"{name}_{key}_s": quantile(ordered, share) for key, share in QUANTILES.items()}
    return {**found, f"{name}_mean_s": statistics.fmean(ordered)}


def _is_whole(job: Job) -> bool:
    return job.plan is not None and job.plan.prefill is None


def _load(site: Site) -> Figures:
    """Return how busy with prompts the workers were that had some, and how uneven that was."""
    engines: list[Engine] = [engine for engine in site.engines.values() if engine.busy_s]
    if not engines:
        return {"imbalance": math.nan, "busy": math.nan}
    busy_s = [engine.busy_s for engine in engines]
    mean_s = statistics.fmean(busy_s)
    elapsed_s = max(job.ended_at for job in site.jobs) - site.jobs[0].received_at
    return {"imbalance": max(busy_s) / mean_s, "busy": _ratio(mean_s, elapsed_s)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def summed_up(runs: Sequence[Figures]) -> Figures:
    """Return the mean of each figure over the seeds, and its spread if there are several."""
    found: Figures = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = statistics.fmean(values)
        if len(runs) > 1:
            found[name + SPREAD] = statistics.stdev(values)
    return found
