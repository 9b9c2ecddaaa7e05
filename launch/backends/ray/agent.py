"""An agent is the process that talks to Ray for `baton up`, which outlives it if Ray's client breaks down.

It reads commands and writes what it sees, each a line of JSON:

    {"do": "open", "id": 1, "wanted": {...as in `Wanted`}}  -> {"id": 1, "done": {"address": "10.0.0.1:6379"}}
    {"do": "start", "worker": NAME}                         -> {"worker": NAME, "report": {...}}, and often;
                                                               {"worker": NAME, "trouble": TEXT or null}
    {"do": "stop", "id": 2, "worker": NAME, "limit_s": 15}  -> {"id": 2, "done": true}
    {"do": "kill", "worker": NAME}
    {"do": "release", "worker": NAME}
    {"do": "sweep", "id": 3}                                -> {"id": 3, "done": true}

A command that fails is answered with `{"id": 1, "worker": NAME, "error": TEXT}`. The agent ends with its
input.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from launch.backends.ray.cluster import Refused, connect, end_all
from launch.backends.ray.places import Places, Pool
from launch.backends.ray.watch import Watched

TICK_S: Final = 0.05


class Wanted(msgspec.Struct):
    """A run wants this of a cluster of Ray."""

    address: str  # auto, local or HOST:PORT
    namespace: str  # of the run's actors and placement groups
    pools: list[Pool]
    config: str  # as JSON
    environ: dict[str, str]
    version: str


class Agent:
    """One thread does everything here; another one only reads commands."""

    def __init__(self, ray: Any, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._ray = ray
        self._write = write
        self._watched: dict[str, Watched] = {}
        self._stopping: dict[Any, tuple[Watched, int]] = {}  # by what the actor will answer
        self._ended: set[str] = set()  # actors that were ended for good: Ray may list them a little longer
        self._wanted: Wanted | None = None
        self._places = Places(ray, "", ())
        self._commands: dict[str, Callable[[Mapping[str, Any]], object]] = {
            "open": self._open,
            "start": self._start,
            "stop": self._stop,
            "kill": self._kill,
            "release": self._release,
            "sweep": self._sweep,
        }

    def obey(self, command: Mapping[str, Any]) -> None:
        """Carry out a command. What goes wrong is answered."""
        try:
            done = self._commands[command["do"]](command)
        except Refused as error:
            self._answer(command, error=str(error))
        except Exception as error:  # Ray raises many things
            text = " ".join(str(error).split())[:2000]
            self._answer(command, error=f"Ray refuses: {type(error).__name__}: {text}")
        else:
            if done is not None:
                self._answer(command, done=done)

    def _answer(self, command: Mapping[str, Any], **answer: object) -> None:
        self._write({"id": command.get("id"), "worker": command.get("worker"), **answer})

    def tend(self) -> None:
        """See what is new of the workers, and tell of it."""
        now = time.monotonic()
        self._finish_stops()
        for watched in [*self._watched.values()]:
            for news in watched.tend(now):
                self._write({"worker": watched.name, **news})
            if watched.is_lost_for_good(now):
                watched.replace(*self._made(watched.name))
        for name, trouble in self._places.look(now, [*self._watched.values()]):
            self._write({"worker": name, "trouble": trouble})

    # --- commands ---------------------------------------------------------------------------------

    def _open(self, command: Mapping[str, Any]) -> object:
        self._wanted = wanted = msgspec.convert(command["wanted"], Wanted)
        connect(self._ray, wanted.address, wanted.namespace)
        self._places = Places(self._ray, wanted.namespace, wanted.pools)
        return {"address": self._ray.get_runtime_context().gcs_address}

    def _start(self, command: Mapping[str, Any]) -> None:
        name = command["worker"]
        self._watched[name] = Watched(self._ray, name, *(self._found(name) or self._made(name)))

    def _found(self, name: str) -> tuple[str, Any] | None:
        """Return the actor that an agent before us has started for a worker, after its name; else None."""
        actors = {*self._ray.util.list_named_actors()} - self._ended
        found = sorted(actor for actor in actors if actor.rpartition("#")[0] == name)
        if not found:
            return None
        self._places.options(name)
        return found[-1], self._ray.get_actor(found[-1], self._known.namespace)

    @property
    def _known(self) -> Wanted:
        if self._wanted is None:
            raise Refused("nothing is open")
        return self._wanted

    def _made(self, name: str) -> tuple[str, Any]:
        from launch.backends.ray.actor import WorkerActor

        wanted = self._known
        called = f"{name}#{time.time_ns()}"  # the name of one that was ended is not free at once
        made = self._ray.remote(WorkerActor).options(
            name=called,
            namespace=wanted.namespace,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=8,
            **self._places.options(name),
        )
        return called, made.remote(wanted.config, name, wanted.environ, wanted.version)

    def _stop(self, command: Mapping[str, Any]) -> object:
        watched = self._watched.pop(command["worker"], None)
        if watched is None:
            return True
        if not watched.is_reached:
            self._end(watched)
            return True
        self._stopping[watched.actor.stop.remote(float(command["limit_s"]))] = (watched, command["id"])
        return None

    def _finish_stops(self) -> None:
        if self._stopping:
            done, _ = self._ray.wait([*self._stopping], num_returns=len(self._stopping), timeout=0)
            for answer in done:
                watched, number = self._stopping.pop(answer)
                self._end(watched)
                self._write({"id": number, "done": self._has_obeyed(answer)})

    def _has_obeyed(self, answer: Any) -> bool:
        try:
            return bool(self._ray.get(answer))
        except self._ray.exceptions.RayError:  # it has ended, or was killed, meanwhile
            return False

    def _kill(self, command: Mapping[str, Any]) -> None:
        """Cut short a stop that takes too long: its answer comes at once then."""
        for watched, _ in self._stopping.values():
            if watched.name == command["worker"]:
                self._ray.kill(watched.actor, no_restart=True)

    def _end(self, watched: Watched) -> None:
        """End an actor for good; the guard on its node ends what is left there. It may be started again."""
        self._ray.kill(watched.actor, no_restart=True)
        self._ended.add(watched.actor_name)

    def _release(self, command: Mapping[str, Any]) -> None:
        self._places.release(command["worker"])

    def _sweep(self, command: Mapping[str, Any]) -> object:
        self._watched.clear()
        end_all(self._ray, self._known.namespace)
        return True


def main() -> int:
    """Obey until the input ends. Whatever Ray prints goes to stderr."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(document: Mapping[str, Any]) -> None:
        output.write(json.dumps(document) + "\n")

    commands: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    try:
        import ray
    except ImportError as error:
        write({"error": f"Ray is not installed here ({error}): pip install 'baton-serve[ray]'"})
        return 1
    _serve(Agent(ray, write), commands)
    ray.shutdown()
    return 0


def _read(commands: queue.SimpleQueue[Mapping[str, Any] | None]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)


def _serve(agent: Agent, commands: queue.SimpleQueue[Mapping[str, Any] | None]) -> None:
    while True:
        try:
            command = commands.get(timeout=TICK_S)
        except queue.Empty:
            agent.tend()
            continue
        if command is None:
            return
        agent.obey(command)


if __name__ == "__main__":
    sys.exit(main())
