"""A reload applies a changed config file to what runs: all of its changes, or none.

An option that is not marked `Reloadable` (`config/options.py`) needs a restart: a file that changes one is
refused as a whole. Requests under way keep their deadlines; connections of clients keep the limits that they
were opened with.

Workers are changed only where they are `urls`: those that Baton starts belong to whoever starts them. A
worker that stays keeps its name; what was added or removed at `/admin/workers` stays as it is, unless the
file changes it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.config.addresses import WorkerAddress, ranks_of, unmanaged
from orchestrator.config.base import is_reloadable, options_of
from orchestrator.config.file import ConfigErrors, load_config
from orchestrator.config.keys import KeyRing, read_keys, warn_of_missing_scopes
from orchestrator.config.options import Config, PoolConfig
from orchestrator.errors import Conflict
from orchestrator.http.tls import Certificate, is_renewed
from orchestrator.loop.bounded_calls import BoundedCalls
from orchestrator.telemetry.events import Events
from orchestrator.wire.info import Role
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker

READ_S = 30.0  # until the file is given up, which may be on a file system that is away
KEYS_FILE = "orchestrator.api_keys_file"  # which file, and what is in it
CERTIFICATE = "orchestrator.tls"  # what is in its files
_RELOADABLE = frozenset(name for name, option in options_of(Config) if is_reloadable(option))
DISCOVER = ".discover"  # may become another source as a whole

_log = logging.getLogger("baton.reload")


class ConfigRefused(Conflict):
    """The config was refused and nothing was changed; the message has a line per mistake."""

    code = "config_refused"


class Reconfigurable(Protocol):
    """A reload changes this: `app.Orchestrator`, or `supervisor.Supervisor` for several processes."""

    @property
    def config(self) -> Config: ...

    @property
    def keys(self) -> KeyRing | None: ...

    @property
    def certificate(self) -> Certificate | None: ...

    @property
    def registry(self) -> Registry:
        """Return the registry that decides which workers are there."""
        ...

    @property
    def events(self) -> Events: ...

    def reconfigure(self, config: Config) -> None:
        """Go by `config` from now on, but for its workers. This cannot fail."""


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """The config came from this file and these overrides."""

    path: str
    overrides: Sequence[str] = ()


class Reloader:
    """A reloader reads the config again and applies it, on the event loop of its target."""

    def __init__(
        self, source: ConfigSource, target: Reconfigurable, then: Callable[[Config], None] | None = None
    ) -> None:
        """`then` is called with each config that was applied, last of all; it cannot fail either."""
        self._source = source
        self._target = target
        self._then = then
        self._is_reloading = asyncio.Lock()
        self._calls = BoundedCalls("read the config", READ_S)
        self._asked: set[asyncio.Task[None]] = set()

    def reload_soon(self) -> None:
        """Reload as a signal asks for it; the log tells what came of it."""
        task = asyncio.create_task(self._reload_and_log())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _reload_and_log(self) -> None:
        try:
            changed = await self.reload()
        except Conflict as error:
            for line in error.message.splitlines():
                _log.error("not reloaded: %s", line)
            self._target.events.note("admin.reload_refused", f"not reloaded: {error.message}", who="SIGHUP")
        else:
            what = f"reloaded: {', '.join(changed) or 'nothing has changed'}"
            _log.info("%s", what)
            self._target.events.note("admin.reload", what, who="SIGHUP")

    async def reload(self) -> tuple[str, ...]:
        """Read the file again and apply it; returns the keys that have changed. Raises `Conflict`."""
        async with self._is_reloading:
            return self._apply(*await self._read_in_time())

    async def _read_in_time(self) -> tuple[Config, KeyRing | None]:
        """Read the file beside the event loop: a long one takes its time to parse. Raises `ConfigRefused`."""
        try:
            return await self._calls.make(self._read)
        except TimeoutError:
            why = f"it was not read within {READ_S:g} s: does its file system answer?"
            raise ConfigRefused(f"{self._source.path}: {why}") from None

    def _read(self) -> tuple[Config, KeyRing | None]:
        try:
            path = self._source.path
            if os.path.exists(path) and not os.path.isfile(path):
                raise ConfigRefused(f"{path} is not a file that can be read again")  # a pipe: it would block
            config = load_config(path, self._source.overrides)
            file = config.orchestrator.api_keys_file
            return config, read_keys(file) if file is not None else None
        except (ConfigErrors, OSError, ValueError) as error:
            raise ConfigRefused(str(error)) from error

    def _apply(self, config: Config, keys: KeyRing | None) -> tuple[str, ...]:
        target = self._target
        changes = tuple(_differences(target.config.model_dump(), config.model_dump()))
        self._check(changes)
        workers = WorkerChanges.between(target.config, config, target.registry)
        # From here on nothing fails, and nobody else gets a turn.
        changed = [change.key for change in changes]
        if keys is not None and target.keys is not None and set(keys) != set(target.keys):
            target.keys.exchange(keys)
            warn_of_missing_scopes(keys, config.orchestrator)
            changed.append(KEYS_FILE)
        if is_renewed(target.certificate):
            changed.append(CERTIFICATE)
        target.reconfigure(config)
        workers.apply(target.registry)
        if self._then is not None:
            self._then(config)
        return tuple(dict.fromkeys(changed))

    def _check(self, changes: Sequence[Change]) -> None:
        fixed = [change.key for change in changes if not change.is_possible]
        if fixed:
            raise ConfigRefused(f"{self._source.path}: only a restart can change {', '.join(fixed)}")


# --- what differs -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """A change gives one key another value."""

    key: str  # as `--set` takes it
    old: Any
    new: Any

    @property
    def is_possible(self) -> bool:
        """Say whether the change needs no restart.

        An option that was given cannot be left out, or the other way round: that is another kind of thing.
        """
        is_other_kind = (self.old is None) != (self.new is None)
        is_marked = not _RELOADABLE.isdisjoint(_sections_of(self.key)) or self.key.endswith(DISCOVER)
        return not is_other_kind and is_marked


def _sections_of(key: str) -> Iterator[str]:
    """Yield the names of the option and of all that it is in, as `options_of` has them.

    Arguments of a policy are no options.
    """
    name = ""
    for part in key.split("."):
        name += f".{'*' if part.isdigit() else part}" if name else part
        yield name


def _differences(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    if old == new:
        return
    parts = _parts(old, new, key)
    if parts is None:
        yield Change(key, old, new)
        return
    for name, before, after in parts:
        yield from _differences(before, after, f"{key}.{name}" if key else str(name))


def _parts(old: Any, new: Any, key: str) -> list[tuple[object, Any, Any]] | None:
    """Return the parts of both values by name; None if they cannot be compared part by part."""
    if key.endswith(DISCOVER):
        return None
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [(name, value, new[name]) for name, value in old.items()]
    if key == "models" and len(old) == len(new):
        return [(index, *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    return None


# --- who comes and goes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerChanges:
    """A new config changes this about workers, beside what is there already."""

    leaving: tuple[Worker, ...]
    joining: tuple[WorkerAddress, ...]

    @classmethod
    def between(cls, old: Config, new: Config, registry: Registry) -> WorkerChanges:
        """Return the changes from `old` to `new`. Raises `Conflict` if they cannot all be made."""
        before, after = _locations(old), _locations(new)
        leaving = [registry.all_at(*location) for location in before if location not in after]
        found: list[WorkerAddress] = []
        joining: list[WorkerAddress] = []
        for location, pool in after.items():
            if location not in before and not _is_there(location, registry):
                found.append(_address(location, pool, registry, found))
                joining += ranks_of(found[-1], pool.data_parallel_size)
        if not registry.has_room(len(joining)):
            raise ConfigRefused(f"there is no room for {len(joining)} workers more: restart")
        return cls(tuple(worker for workers in leaving for worker in workers), tuple(joining))

    def apply(self, registry: Registry) -> None:
        for worker in self.leaving:
            registry.remove(worker)
        for address in self.joining:
            registry.add(address)


Location = tuple[str, Role, str]  # model, role, URL


def _locations(config: Config) -> dict[Location, PoolConfig]:
    return {
        (model.name, role, url): pool
        for model in config.models
        for role, pool in model.pools()
        for url in pool.urls or ()
    }


def _is_there(location: Location, registry: Registry) -> bool:
    """Return whether the operator has added it already. Raises `Conflict` if it is there, but leaving."""
    worker = registry.at(*location)
    if worker is not None and worker.is_leaving:
        raise ConfigRefused(f"{worker.name} at {worker.address.url} is still being removed: reload again")
    return worker is not None


def _address(
    location: Location, pool: PoolConfig, registry: Registry, others: Sequence[WorkerAddress]
) -> WorkerAddress:
    """Return the address of a worker that joins; `others` join as well."""
    model, role, url = location
    before = sum((other.model, other.role) == (model, role) for other in others)
    return unmanaged(
        model, role, registry.next_index(model, role) + before, url, pool.served_model, pool.zone_of(url)
    )
