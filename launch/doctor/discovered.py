"""Workers that are discovered are found before the doctor visits them, and are then like those of `urls`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.discover import ask
from launch.doctor.findings import Finding, fail, ok, warn
from orchestrator.config.options import Config, ModelConfig, PoolConfig

HINT = "`baton discover` shows what it lists; docs/discovery.md has what it should be"


def with_discovered(config: Config, timeout_s: float, add: Callable[[Finding], None]) -> Config:
    """Return the config with the URLs of those that its sources list now; `add` gets what was found."""
    found = asyncio.run(ask(config, timeout_s))
    for source in found:
        for finding in _findings(source):
            add(finding)
    urls = _urls(found)
    models = [_with_urls(model, urls) for model in config.models]
    return config.model_copy(update={"models": models}) if urls else config


def _findings(source: Mapping[str, Any]) -> Iterator[Finding]:
    name, members = source["name"], source["members"]
    if source["away"] is not None:
        yield fail("discover", name, f"it cannot be asked: {source['away']}", HINT)
        return
    if not members:
        yield warn("discover", name, "it lists no workers", HINT)
    else:
        yield ok("discover", name, f"it lists {len(members)} workers")
    yield from (warn("discover", name, problem, HINT) for problem in source["problems"])


def _urls(found: Sequence[Mapping[str, Any]]) -> Mapping[tuple[str, str], list[str]]:
    """Return the URLs of those that serve, by model and role."""
    urls: dict[tuple[str, str], list[str]] = {}
    for member in (member for source in found for member in source["members"]):
        if member["state"] == "serves":
            model, role, _ = member["worker"].rsplit("/", 2)
            urls.setdefault((model, role), []).append(member["url"])
    return urls


def _with_urls(model: ModelConfig, urls: Mapping[tuple[str, str], list[str]]) -> ModelConfig:
    pools: dict[str, PoolConfig] = {}
    for role, pool in model.pools():
        if (model.name, role) in urls:
            pools[role] = pool.model_copy(
                update={"discover": None, "replicas": None, "urls": urls[model.name, role]}
            )
    return model.model_copy(update=pools)
