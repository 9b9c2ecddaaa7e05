"""A pool's script for sbatch is made here, purely: a job array, one task for each worker."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from launch.backends.node import gpus_of
from launch.plan import log_name
from orchestrator.config.options import Config
from orchestrator.config.slurm import SlurmConfig, seconds_of
from orchestrator.wire.info import Role

DRAIN_MARGIN_S = 30.0  # beyond the longest request, for engines to end and Slurm to notice
_MOST_SIGNAL_S = 65535  # that Slurm takes for --signal
_PREFIX = "baton"
_ENDS = ".sbatch"
SCRIPTS = f"*{_ENDS}"  # of a run, in its folder


@dataclass(frozen=True, slots=True)
class Job:
    """A job is an array of tasks of one pool."""

    model: str
    role: Role
    indexes: Sequence[int]  # one task for each: these workers of the pool
    run: str  # tells the run from all others of this user
    folder: Path  # absolute; all nodes have it
    options: SlurmConfig
    gpus: int  # for each worker
    drain_s: float  # see `drain_s`
    python: str
    imports: Mapping[str, str]

    @property
    def pool(self) -> str:
        return f"{self.model}/{self.role}"

    @property
    def name(self) -> str:
        """Return what the queue calls it; `run_of` understands that."""
        return f"{_PREFIX} {self.pool} {self.run}"

    @property
    def file_name(self) -> str:
        """Return a name for its script that no other pool's has."""
        return log_name(f"{self.pool}/0").removesuffix("-0.log") + _ENDS


def job_of(config: Config, model: str, role: Role, indexes: Sequence[int], **where: object) -> Job:
    """Return the job of some workers of a pool of the config; `where` are the fields that no config tells."""
    return Job(
        model=model,
        role=role,
        indexes=indexes,
        options=config.launch.slurm.of_pool(f"{model}/{role}"),
        gpus=gpus_of(config, f"{model}/{role}/0"),
        drain_s=drain_s(config),
        **where,  # type: ignore[arg-type]  # the callers give what is left
    )


def drain_s(config: Config) -> float:
    """Return how long a worker that is asked to end goes on with its requests."""
    return config.orchestrator.limits.request_timeout_s + DRAIN_MARGIN_S


def run_of(name: str) -> tuple[str, str] | None:
    """Return the pool and the run of a job, by its name in the queue; None if it is none of ours."""
    parts = name.split(" ")
    return (" ".join(parts[1:-1]), parts[-1]) if len(parts) >= 3 and parts[0] == _PREFIX else None


def script(job: Job) -> str:
    """Return what sbatch is to be given."""
    options = "".join(f"#SBATCH {option}\n" for option in _options(job))
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(job.imports.items()))
    task = shlex.join((job.python, "-m", "launch.backends.slurm.task", str(job.folder), job.pool))
    # A signal that comes before Python hears it must not end the task; its children get the defaults back.
    return f"#!/bin/bash\n{options}{exports}trap '' USR1 USR2\nexec {task}\n"


def _options(job: Job) -> Iterator[str]:
    """Yield options of sbatch, of which later ones win."""
    yield f"--job-name={_quoted(job.name)}"
    yield f"--array={ranges(job.indexes)}"
    yield from ("--nodes=1", "--ntasks=1")
    yield from ("--requeue", "--open-mode=append")
    yield f"--output={_quoted(log_pattern(job))}"
    yield f"--signal=B:TERM@{_notice_s(job)}"
    if job.options.partition is not None:
        yield f"--partition={job.options.partition}"
    if job.options.time is not None:
        yield f"--time={job.options.time}"
    if job.gpus:
        yield f"--gres=gpu:{job.gpus}"
    yield from job.options.sbatch


def _notice_s(job: Job) -> int:
    """Return how long before the end of its time a job is told: at most the half of it."""
    limit_s = math.inf if job.options.time is None else seconds_of(job.options.time)
    return int(min(job.drain_s, limit_s / 2, _MOST_SIGNAL_S))


def log_pattern(job: Job) -> str:
    """Return where the tasks write, as Slurm has it: `%a` is a task's number, `%%` a percent sign."""
    path = str(job.folder / log_name(f"{job.pool}/@"))
    head, _, tail = path.replace("%", "%%").rpartition("@")
    return f"{head}%a{tail}"


def _quoted(text: str) -> str:
    """Return a value as sbatch reads it in a script. There is no way to write a quote."""
    return '"' + text.replace('"', "'").replace("\\", "/") + '"'


def ranges(indexes: Sequence[int]) -> str:
    """Return numbers as Slurm lists them: `0-3,7`."""
    runs = groupby(enumerate(sorted(indexes)), lambda pair: pair[1] - pair[0])
    spans = ([number for _, number in run] for _, run in runs)
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
