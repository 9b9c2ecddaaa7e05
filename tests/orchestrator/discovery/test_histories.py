"""Whatever a cluster does, and whatever becomes of watches meanwhile: in the end the workers are its pods.

`python -m tests.orchestrator.discovery.test_histories SEED` tells one of the histories.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from random import Random

import pytest

from orchestrator.config.options import KubernetesConfig
from orchestrator.discovery.kubernetes import JITTER, LATE_S, WATCH_S, KubernetesSource
from tests.orchestrator.discovery.fake_kubernetes import FakeKubernetes, Json, endpoint
from tests.orchestrator.discovery.followed import DECODE, Followed
from tests.simulation.loop import run_virtually

HISTORIES = int(os.environ.get("BATON_SIMULATION_SEEDS", "10000"))
AT_ONCE = 500
STEPS = 12
SETTLED_S = WATCH_S * (1 + JITTER) + LATE_S + 10  # one whole watch, and the longest pause of a feed
ADDRESSES = 6  # so few that new pods get old ones
SLICES = ("s-0", "s-1", "s-2")


class Cluster:
    """Pods that come and go, each in one slice or, while it is moved, in two."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.server = FakeKubernetes()
        self.pods: dict[str, tuple[str, Json]] = {}  # the slice and the endpoint, by uid
        self._made = 0

    def step(self) -> str:
        """Do something, and say what."""
        action = self.random.choice(
            (
                self.add,
                self.add,
                self.remove,
                self.remove,
                self.terminate,
                self.unready,
                self.move,
                self.empty,
            )
        )
        action()
        return action.__name__

    def add(self) -> None:
        taken = {each["addresses"][0] for _, each in self.pools_ready()}
        free = [f"10.0.0.{host}" for host in range(ADDRESSES) if f"10.0.0.{host}" not in taken]
        if free:
            self._made += 1
            uid = f"u{self._made}"
            # Those of a StatefulSet have the names of their predecessors.
            name = f"pod-{self.random.randrange(4)}" if self.random.random() < 0.3 else f"pod-{uid}"
            if name not in {each["targetRef"]["name"] for _, each in self.pods.values()}:
                self.pods[uid] = (self.random.choice(SLICES), endpoint(self.random.choice(free), uid, name))
        self.write()

    def pools_ready(self) -> list[tuple[str, Json]]:
        return [*self.pods.values()]

    def remove(self) -> None:
        if self.pods:
            del self.pods[self.random.choice([*self.pods])]
        self.write()

    def terminate(self) -> None:
        self._condition(ready=False, serving=True, terminating=True)

    def unready(self) -> None:
        self._condition(ready=self.random.random() < 0.5)

    def _condition(self, **conditions: bool) -> None:
        if self.pods:
            _, each = self.pods[self.random.choice([*self.pods])]
            if not each["conditions"].get("terminating"):
                each["conditions"] = conditions
        self.write()

    def move(self) -> None:
        """Move a pod to another slice; for a while it is in both."""
        if self.pods:
            uid = self.random.choice([*self.pods])
            _, each = self.pods[uid]
            name = self.random.choice(SLICES)
            self.write(also={name: each})
            self.pods[uid] = (name, each)
        self.write()

    def empty(self) -> None:
        if self.random.random() < 0.2:
            self.pods.clear()
        self.write()

    def write(self, also: dict[str, Json] | None = None) -> None:
        """Write the slices that differ, in any order."""
        for name in self.random.sample(SLICES, len(SLICES)):
            endpoints = [each for there, each in self.pods.values() if there == name]
            endpoints += [] if also is None or name not in also else [also[name]]
            self.random.shuffle(endpoints)
            is_told = self.random.random() > 0.1
            if endpoints:
                self.server.put(name, *map(dict, endpoints), is_told=is_told)
            elif name in self.server.slices:
                self.server.delete(name, is_told=is_told)

    def disturb(self) -> str:
        """Do something to watches and lists, and say what."""
        server, random = self.server, self.random
        what = random.choice(
            ("nothing", "cut", "mid-line", "still", "go on", "compact", "bookmark", "away", "back")
        )
        match what:
            case "cut":
                server.cut()
            case "mid-line":
                server.cut('{"type": "DELETED", "obj')
            case "still":
                server.hold()
            case "go on":
                server.hold(is_still=False)
            case "compact":
                server.compact()
            case "bookmark":
                server.bookmark()
            case "away":
                server.away = ConnectionRefusedError("refused") if random.random() < 0.5 else 503
            case "back":
                server.away = None
        server.repeats = random.random() < 0.2
        server.page = random.choice((1, 2, 500))
        return what


async def tell(seed: int) -> list[str]:
    """Tell a history; returns what is wrong in the end."""
    random = Random(seed)
    cluster = Cluster(random)
    loop = asyncio.get_running_loop()
    config = KubernetesConfig(service="workers", namespace="team", url="http://api:1")
    source = KubernetesSource(config, [DECODE], random, transport=cluster.server.transport())
    followed = Followed(source, clock=loop.time)
    following = asyncio.create_task(followed.feed.run())
    done: list[str] = []
    for _ in range(STEPS):
        done += [cluster.disturb(), cluster.step()]
        await asyncio.sleep(random.choice((0, 0.001, 0.3, 2, 40)))
        settle(followed, cluster)
    cluster.server.away = None
    for _ in range(2):
        await asyncio.sleep(SETTLED_S / 2)
        settle(followed, cluster)
    wrong = differences(followed, cluster)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return [f"seed {seed}: {problem} after {', '.join(done)}" for problem in wrong]


def settle(followed: Followed, cluster: Cluster) -> None:
    """Have those answer probes that are there, and none that are not."""
    there = {each["addresses"][0] for _, each in cluster.pods.values()}
    for worker in followed.registry.workers:
        if worker.address.host in there:
            followed.registry.judge.mark_ready(worker)
        else:
            followed.registry.judge.mark_gone(worker, "refused")
    followed.feed.look_again()
    followed.registry.settle()


def differences(followed: Followed, cluster: Cluster) -> list[str]:
    pods = {each["targetRef"]["name"]: each for _, each in cluster.pods.values()}
    serving = {name for name, each in pods.items() if each["conditions"].get("ready", True)}
    known = {name: uid for pool in followed.pools.values() for name, uid in pool.known().items()}
    uids = {worker.name.rpartition("/")[2]: known[worker.name] for worker in followed.registry.workers}
    wrong = []
    if gone := uids.keys() - pods.keys():
        wrong.append(f"{gone} are still there")
    if absent := serving - uids.keys():
        wrong.append(f"{absent} are not there")
    for name in uids.keys() & pods.keys():
        url = f"http://{pods[name]['addresses'][0]}:8000"
        worker = followed.worker(name)
        if (uids[name], worker.address.url) != (pods[name]["targetRef"]["uid"], url):
            wrong.append(f"{name} is {uids[name]} at {worker.address.url}, not {pods[name]}")
    # If none is said to serve, those that answer go on.
    terminating = {name for name, each in pods.items() if each["conditions"].get("terminating")}
    if serving and set(followed.serving()) != serving:
        wrong.append(f"{followed.serving()} serve, not {serving}")
    if set(followed.serving()) & terminating:
        wrong.append(f"{terminating} serve")
    return wrong


@pytest.mark.parametrize("first", range(0, HISTORIES, AT_ONCE))
def test_histories_end_with_what_the_server_has(first: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "baton.discovery")
    seeds = range(first, min(first + AT_ONCE, HISTORIES))
    assert [problem for seed in seeds for problem in run_virtually(tell(seed))] == []


if __name__ == "__main__":
    print("\n".join(run_virtually(tell(int(sys.argv[1])))) or "all is well")
