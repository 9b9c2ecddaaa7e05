"""Rendered pods as processes of this machine: each has a loopback address of its own, and all its ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from tests.launch.render.clusters import Object, container_of
from tests.waiting import wait_for

SECRET = "the-workers-key"
ENDS_S = 60.0
_variable = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


class Pod:
    """A pod of a Deployment, until it is ended."""

    def __init__(self, deployment: Object, address: str) -> None:
        self.container = container_of(deployment)
        self.labels: Mapping[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
        self.address = address
        env = self._env()
        command = [expanded(word, env) for word in self.container["command"]]
        # On one machine all addresses are everybody's: it listens at its own.
        argv = [address if word == "0.0.0.0" else word for word in command]
        assert argv[0] == "python3"
        self.process = subprocess.Popen([sys.executable, *argv[1:]], env={**os.environ, **env})

    def _env(self) -> dict[str, str]:
        """The environment as Kubernetes makes it: in order, each may refer to those before it."""
        env: dict[str, str] = {}
        for one in self.container["env"]:
            source = one.get("valueFrom", {})
            if "fieldRef" in source:
                value = self._field(source["fieldRef"]["fieldPath"])
            else:
                value = SECRET if "secretKeyRef" in source else expanded(one["value"], env)
            env[one["name"]] = value
        return env

    def _field(self, path: str) -> str:
        """What the pod has there, of what containers may be told."""
        if path == "status.podIP":
            return self.address
        return self.labels[path.removeprefix("metadata.labels['").removesuffix("']")]

    def port(self, name: str) -> int:
        (found,) = (port["containerPort"] for port in self.container["ports"] if port["name"] == name)
        return int(found)

    def passes(self, kind: str) -> bool:
        """Whether one of its probes finds what it wants."""
        asks = self.container[kind]["httpGet"]
        try:
            url = f"http://{self.address}:{self.port(asks['port'])}{asks['path']}"
            return httpx.get(url, timeout=5).is_success
        except httpx.HTTPError:
            return False

    def pre_stop(self) -> subprocess.CompletedProcess[str]:
        """Run what Kubernetes runs in the pod before it ends it."""
        program, *words = self.container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "baton"
        argv = [word.replace("127.0.0.1", self.address) for word in words]
        env = {**os.environ, **self._env()}
        command = [sys.executable, "-m", "launch.cli", *argv]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=ENDS_S)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=ENDS_S)


def expanded(text: str, env: Mapping[str, str]) -> str:
    """What Kubernetes makes of a text: variables that there are get their values, two dollars are one."""
    return _variable.sub(lambda found: "$" if found[1] is None else env.get(found[1], found[0]), text)


@contextlib.contextmanager
def running(*pods: tuple[Object, str]) -> Iterator[list[Pod]]:
    """Run pods of these Deployments at these addresses until the block ends."""
    with contextlib.ExitStack() as stack:
        started = []
        for deployment, address in pods:
            pod = Pod(deployment, address)
            stack.callback(pod.end)
            started.append(pod)
        for pod in started:
            wait_for(lambda pod=pod: pod.passes("startupProbe"), "a pod that has started")
        yield started


def endpoints(service: Object, pods: list[Pod]) -> list[dict[str, Any]]:
    """What the EndpointSlice of a Service says of those pods that it selects."""
    chosen = [pod for pod in pods if service["spec"]["selector"].items() <= pod.labels.items()]
    return [
        {
            "addresses": [pod.address],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {"kind": "Pod", "name": f"pod-{pod.address}", "uid": pod.address},
        }
        for pod in chosen
    ]
