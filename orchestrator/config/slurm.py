"""The section `launch.slurm` says how jobs ask Slurm for places."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from orchestrator.config.base import Model

# What Slurm takes for a time: minutes, minutes:seconds, hours:minutes:seconds, and days before hours.
_TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_ENDLESS: Final = ("infinite", "unlimited")

# A script for sbatch is as Baton writes it in these; all others are the user's.
OURS: Final = {
    "-a": "--array",
    "-e": "--error",
    "-J": "--job-name",
    "-n": "--ntasks",
    "-N": "--nodes",
    "-o": "--output",
    "-W": "--wait",
    "--no-requeue": "--requeue",
    **{
        name: name
        for name in (
            *("--array", "--error", "--job-name", "--ntasks", "--nodes", "--output", "--wait", "--requeue"),
            *("--open-mode", "--signal", "--wrap", "--parsable", "--test-only", "--kill-on-invalid-dep"),
        )
    },
}


def seconds_of(time: str) -> float:
    """Return how long a time of Slurm's is: `90`, `1:30:00`, `7-0`. Raises `ValueError`."""
    if time.lower() in _ENDLESS:
        return float("inf")
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(
            f"expected a time of Slurm's, such as 90 (minutes), 1:30:00 or 7-0 (days-hours), got {time!r}"
        )
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        return float(days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0))
    if third is not None:
        return float((first or 0) * 3600 + (second or 0) * 60 + third)
    return float((first or 0) * 60 + (second or 0))


def _time(value: str) -> str:
    if seconds_of(value) == 0:
        raise ValueError(f"a job that has no time ends at once, got {value!r}")
    return value


def _word(value: str) -> str:
    if not re.fullmatch(r"[\w.,+@-]+", value):
        raise ValueError(f"expected a name, or several with commas between them, got {value!r}")
    return value


def _option(value: str) -> str:
    text = value.removeprefix("#SBATCH").strip()
    name = re.split(r"[=\s]", text, maxsplit=1)[0]
    if not name.startswith("-") or not text.isprintable():
        raise ValueError(f"expected one option of sbatch, such as --account=lab, got {value!r}")
    ours = OURS.get(name) or (OURS.get(name[:2]) if not name.startswith("--") else None)
    if ours is not None:
        raise ValueError(f"Baton gives {ours} itself, so {value!r} cannot be given")
    return text


def _folder(value: str) -> str:
    if not value or not value.isprintable() or any(character in value for character in '"\\'):
        raise ValueError(f"expected a folder whose path has no quotes and no backslashes, got {value!r}")
    return value


def _network(value: str) -> str:
    ip_network(value)
    return value


Partition = Annotated[str, AfterValidator(_word)]
Time = Annotated[str, AfterValidator(_time)]
SbatchOption = Annotated[str, AfterValidator(_option)]


class SlurmPoolConfig(Model):
    """The jobs of one pool ask in another way than those of other pools."""

    pool: str = Field(description="This is the pool, MODEL/ROLE.")
    partition: Partition | None = Field(
        None, description="Jobs of this pool have this partition in place of `launch.slurm.partition`."
    )
    time: Time | None = Field(None, description="Jobs of this pool may run so long.")
    sbatch: list[SbatchOption] = Field(
        [], description="Jobs of this pool have these options of sbatch, too: after those of all pools."
    )


class SlurmConfig(Model):
    """`baton up --on slurm` asks Slurm for places in this way: a job array for each pool."""

    partition: Partition | None = Field(
        None, description="Jobs ask for a place in this partition; without it Slurm takes its default one."
    )
    time: Time | None = Field(
        None,
        description="A worker's job may run so long, as Slurm writes times: 90 (minutes), 12:00:00, 7-0 "
        "(days-hours). Before its end the worker is drained, and gets another place. Without it the "
        "partition's default is taken.",
    )
    sbatch: list[SbatchOption] = Field(
        [],
        description="Jobs have these options of sbatch, too: `[--account=lab, --mem=64G]`. They win over "
        "what Baton asks for by itself, such as --gres=gpu:N for `gpus_per_replica`.",
    )
    folder: Annotated[str, AfterValidator(_folder)] | None = Field(
        None,
        description="All nodes, and the machine that `baton up` runs on, have this folder in common. Workers "
        "say there where they are, and write their logs. Without it that is the run's directory, below "
        "`.baton`.",
    )
    network: Annotated[str, AfterValidator(_network)] | None = Field(
        None,
        description="Workers listen at the address that their node has in this network, such as 10.1.0.0/16; "
        "without it at the one from which the node reaches the machine that `baton up` runs on.",
    )
    pools: list[SlurmPoolConfig] = Field(
        [],
        description="Some pools have values of their own: `[{pool: qwen/prefill, partition: h100}]`.",
    )

    def of_pool(self, pool: str) -> SlurmConfig:
        """Return how the jobs of a pool, MODEL/ROLE, ask."""
        own = next((each for each in self.pools if each.pool == pool), None)
        if own is None:
            return self
        given = {name: getattr(own, name) for name in ("partition", "time") if getattr(own, name) is not None}
        return self.model_copy(update={**given, "sbatch": [*self.sbatch, *own.sbatch]})
