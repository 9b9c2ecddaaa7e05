"""What is rendered serves: simulated workers by their pods' commands, found by their Services by an
orchestrator with the rendered config.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.shared.processes import free_port
from launch.render.cluster import make_cluster
from orchestrator.wire.info import WORKER_KEY_ENV
from tests.baton import baton
from tests.launch.render.clusters import SIM, Object, all_of, config, only
from tests.launch.render.node import SECRET, Pod, endpoints, running
from tests.orchestrator.discovery.fake_kubernetes import FakeKubernetes
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

ROLES = ("prefill", "decode")


@contextlib.contextmanager
def api_server(service: Object, pods: list[Pod]) -> Iterator[str]:
    """An API server that has the slice of one Service."""
    name = service["metadata"]["name"]
    found = endpoints(service, pods)
    ready, begun = threading.Event(), {}

    async def serve() -> None:
        (port,) = service["spec"]["ports"]
        server = FakeKubernetes(service=name, namespace="default", port=port["port"])
        server.put(f"{name}-1", *found)
        async with server.listening() as url:
            ended = asyncio.Event()
            begun["url"] = url
            begun["end"] = partial(asyncio.get_running_loop().call_soon_threadsafe, ended.set)
            ready.set()
            await ended.wait()
        await settled()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield begun["url"]
    finally:
        begun["end"]()
        thread.join(30)


async def settled() -> None:
    """Wait until those who were served are gone, too."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def test_what_is_rendered_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list(all_of(make_cluster(config(SIM))))
    monkeypatch.setenv(WORKER_KEY_ENV, SECRET)
    with contextlib.ExitStack() as stack:
        places = [
            (only(made, "Deployment", role), f"127.77.0.{index}") for index, role in enumerate(ROLES, 1)
        ]
        pods = stack.enter_context(running(*places))
        for pod in pods:
            wait_for(lambda pod=pod: pod.passes("readinessProbe"), "a pod that is ready")
        services = {role: only(made, "Service", role) for role in ROLES}
        urls = {role: stack.enter_context(api_server(service, pods)) for role, service in services.items()}
        document: dict[str, Any] = yaml.safe_load(only(made, "ConfigMap")["data"]["baton.yaml"])
        port = free_port()
        document["orchestrator"] |= {"listen": f"127.0.0.1:{port}", "admin": None, "drain_notice_s": 0}
        for role, url in urls.items():
            document["models"][0][role]["discover"]["kubernetes"] |= {"url": url, "namespace": "default"}
        (tmp_path / "baton.yaml").write_text(yaml.safe_dump(document))
        url = f"http://127.0.0.1:{port}"
        stack.enter_context(
            baton("orchestrator", "baton.yaml", cwd=tmp_path, transport="orjson", ready_at=f"{url}/health")
        )
        probe = only(made, "Deployment", "orchestrator")["spec"]["template"]["spec"]["containers"][0]
        path = probe["readinessProbe"]["httpGet"]["path"]
        wait_for(lambda: httpx.get(f"{url}{path}").is_success, "an orchestrator that is ready")
        asked = {
            "model": "sim",
            "messages": [{"role": "user", "content": "What is prefill?"}],
            "max_tokens": 8,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
        stopped = pods[0].pre_stop()
        assert not pods[0].passes("readinessProbe")
    assert stopped.returncode == 0, stopped.stderr
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-baton-path"] == "disaggregated"
    assert answer.headers["x-baton-kv"] == "transferred"
