"""Configs and small traces for tests of the simulation."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from launch.simulate.experiment import Experiment
from launch.simulate.formats import read_trace
from launch.simulate.site import Conditions, Job, Site
from launch.simulate.variants import routing_of
from orchestrator.config.options import Config

# 10 ms per token, nothing else: a prompt of 100 tokens takes a second.
SLOW_PREFILL = {"prefill_us_per_token": 10_000, "num_blocks": 1000, "block_size": 512}
STEPS = {"decode_ms_per_token": 100, "num_blocks": 1000, "block_size": 512}


def config_of(
    prefill: int = 1,
    decode: int = 1,
    *,
    sim: dict[str, Any] | None = None,
    routing: dict[str, Any] | None = None,
) -> Config:
    """A model `m` with so many workers, on engines with these times."""
    times = {"engine": "sim", "sim": {**SLOW_PREFILL, **STEPS} if sim is None else sim}
    pools = {"prefill": {"replicas": prefill, **times}, "decode": {"replicas": decode, **times}}
    model = {"name": "m", "path": "x", **{role: pool for role, pool in pools.items() if pool["replicas"]}}
    return Config.model_validate({"models": [model], "routing": routing or {}})


def row(at_ms: float, prompt: int, answer: int = 1, blocks: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": answer, "hash_ids": list(blocks)}


def trace_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def site_of(folder: Path, rows: list[dict[str, Any]], config: Config, variant: str | None = None) -> Site:
    """A site that has served these requests, without noise."""
    trace = read_trace(trace_file(folder, rows), "m")
    experiment = Experiment(config, config.models[0], trace, conditions=Conditions(noise=0.0))
    routing = config.routing if variant is None else routing_of(variant, config.routing)
    return experiment.site(0, routing)


def jobs_of(folder: Path, rows: list[dict[str, Any]], config: Config) -> list[Job]:
    """What became of these requests."""
    return site_of(folder, rows, config).jobs


def conversations(count: int, rate: float, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of several turns, in Mooncake's format: the statistics are like those of its conversations."""
    random = Random(seed)
    rows: list[dict[str, Any]] = []
    at_ms, name = 0.0, 1
    while len(rows) < count:
        at_ms += random.expovariate(rate / 3) * 1e3
        blocks, turn_ms = [0], at_ms
        for _ in range(random.choice([1, 1, 3, 5])):
            new = max(1, int(random.lognormvariate(2.3, 1.0)))
            blocks = blocks + list(range(name, name + new))
            name += new
            rows.append(
                row(
                    int(turn_ms),
                    len(blocks) * 512 - random.randint(0, 400),
                    random.randint(50, 600),
                    tuple(blocks),
                )
            )
            turn_ms += random.uniform(20_000, 90_000)
    return sorted(rows, key=lambda each: float(each["timestamp"]))[:count]
