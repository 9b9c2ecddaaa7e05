"""`baton up` makes a running cluster of a plan, and shows the user how that goes."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch.backends import BACKENDS
from launch.backends.listed import ListedLocal, ListedWorkers
from launch.backends.placed import DiscoveringRegistrar, PlacedWorkers, with_members
from launch.engines.flags import count_gpus, missing_gpus
from launch.exits import Exit
from launch.local.building import build_spec
from launch.local.further import FurtherWorkers
from launch.local.logs import make_run_directory
from launch.local.member import Limits
from launch.local.output import Output
from launch.local.progress import Progress, make_progress
from launch.local.run_state import StateWriter
from launch.local.supervise import Site, supervise
from launch.local.upkeep import LEAST_FREE, free_bytes, no_space, prune
from launch.plan import Plan
from launch.remote import is_alive, runs_left
from launch.surroundings import look_around, port_problem, taken_ports
from orchestrator.config.descriptors import raise_limit
from orchestrator.config.options import Config
from orchestrator.config.printing import one_line
from orchestrator.wire.info import RUN_KEY_ENV

MIB = 1024 * 1024
DRAIN_MARGIN_S = 5.0  # from the orchestrator's own limit to SIGKILL


def up(config: Config, plan: Plan, config_path: str, *, compiles: bool = False) -> int:
    """Run the plan, which was made of the file `config_path`, until a signal.

    Progress goes to stderr; stdout gets one line, once all is ready. `compiles`: what is missing of the
    orchestrator's compiled form is built meanwhile.
    """
    errors = Output(sys.stderr)
    wanted = {spec.name: spec.gpus for spec in plan.workers}
    lacking = [*map(one_line, missing_gpus(wanted, count_gpus())), *taken_ports(plan.processes)]
    if lacking:
        if is_alive(config_path):
            errors.write("a run of this config is alive: see `baton ps`; `baton down` stops it\n")
        errors.write("".join(f"{line}\n" for line in lacking))
        return Exit.START_FAILED
    try:
        directory = make_run_directory(os.environ, Path.cwd())
    except OSError as error:
        errors.write(f"cannot make a directory for the logs: {error}\n")
        return Exit.START_FAILED
    prune(directory, config.launch.keep_runs, int(config.launch.keep_mb * MIB))
    if free_bytes(directory) < LEAST_FREE:
        errors.write(f"{no_space(directory)}\n")
        return Exit.START_FAILED
    raise_limit()
    if compiles:
        plan = replace(plan, build=build_spec(plan, os.environ))
    started = plan.processes if plan.build is None else (*plan.processes, plan.build)
    logs = {spec.name: str(directory / spec.log_name) for spec in started}
    progress = make_progress(errors, logs)
    for left in runs_left(config_path):
        progress.say(f"{left} was killed, and may have left workers: `baton down --state {left.directory}`")
    for name in plan.elsewhere:
        progress.say(f"{name} is on another machine: start it there with `baton worker`")
    key = secrets.token_urlsafe(32)
    writer = StateWriter(directory, config_path, plan.url, plan.admins, progress.say, config.launch.backend)
    site = _site(config, plan, directory, progress, writer, key)
    return asyncio.run(supervise(_keyed(plan, key), site, lambda: _announce(config, plan, errors)))


def _site(
    config: Config, plan: Plan, directory: Path, progress: Progress, writer: StateWriter, key: str
) -> Site:
    """Return where the run is kept: its workers may be of this machine alone, known to one or to several."""
    make = partial(Site, directory, _limits(config), progress, writer, key=key, scaled=_scaled(config))
    kind = BACKENDS[config.launch.backend]
    if not kind.is_here:
        further: FurtherWorkers | PlacedWorkers = PlacedWorkers(config)
    elif len(plan.orchestrators) > 1 and not plan.elsewhere:
        kind = ListedLocal
        further = ListedWorkers(config, look_around(), _is_free, count_gpus)
    else:
        return make(further=FurtherWorkers(config, look_around(), _is_free, count_gpus))
    return make(
        further=further,
        backend=partial(kind.make, config, directory, progress.say),
        registrar=DiscoveringRegistrar,
        discover=partial(with_members, config),
    )


def _scaled(config: Config) -> list[tuple[str, str]]:
    """Return the pools that follow the load."""
    return [(model.name, role) for model in config.models for role, pool in model.pools() if pool.range]


def _keyed(plan: Plan, key: str) -> Plan:
    """Return the plan with orchestrators that take this key from us."""
    first, *others = (replace(spec, env={**spec.env, RUN_KEY_ENV: key}) for spec in plan.orchestrators)
    return replace(plan, orchestrator=first, replicas=tuple(others))


def _is_free(host: str, port: int) -> bool:
    return port_problem(host, port) is None


def _limits(config: Config) -> Limits:
    return Limits(
        start_s=config.launch.start_timeout_s,
        log_bytes=int(config.launch.log_max_mb * MIB),
        log_files=config.launch.log_files,
        stop_worker_s=config.launch.stop_timeout_s,
        notice_s=config.orchestrator.drain_notice_s,
        stop_orchestrator_s=config.orchestrator.timeout_graceful_shutdown + DRAIN_MARGIN_S,
    )


def _announce(config: Config, plan: Plan, errors: Output) -> None:
    """Print the ready line, which is alone on stdout for scripts, and an example for people."""
    Output(sys.stdout).write(f"ready: {' '.join(spec.url for spec in plan.orchestrators)}\n")
    errors.write(f"try:\n  {curl_example(config, plan.url)}\n")


def curl_example(config: Config, url: str) -> str:
    question = {"role": "user", "content": "What is prefill?"}
    body = json.dumps({"model": config.models[0].name, "messages": [question]})
    key = "" if config.orchestrator.api_keys_file is None else ' -H "authorization: Bearer $KEY"'
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}"
