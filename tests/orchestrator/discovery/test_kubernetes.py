"""What the API server says reaches the pools, whatever becomes of lists and watches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from orchestrator.config.options import KubernetesConfig
from orchestrator.discovery import kubernetes
from orchestrator.discovery.base import SourceAway
from orchestrator.discovery.kubernetes import KubernetesSource, find_api
from orchestrator.wire.member import MemberSet
from tests.orchestrator.discovery.fake_kubernetes import FakeKubernetes, endpoint
from tests.orchestrator.discovery.followed import DECODE, PREFILL, Followed
from tests.simulation.loop import run_virtually

URL = "http://api:1"


class Cluster(Followed):
    """A fake API server, and pools that follow it."""

    def __init__(self, server: FakeKubernetes, url: str = URL, **config: Any) -> None:
        options = {"service": server.service, "namespace": server.namespace, "url": url, **config}
        transport = server.transport() if url == URL else None
        source = KubernetesSource(KubernetesConfig(**options), [DECODE], Random(0), transport=transport)
        super().__init__(source, clock=asyncio.get_running_loop().time)
        self.server = server

    @asynccontextmanager
    async def following(self) -> AsyncIterator[Cluster]:
        task = asyncio.create_task(self.feed.run())
        await asyncio.sleep(0.01)
        self.answer()
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


Story = Callable[[FakeKubernetes, Cluster], Coroutine[Any, Any, None]]


def follow(story: Story, **config: Any) -> None:
    """Tell a story in virtual time, of a Service with the pods a and b."""

    async def main() -> None:
        server = FakeKubernetes()
        server.put("s-1", endpoint("10.0.0.1", "a"), endpoint("10.0.0.2", "b", zone="z"))
        async with Cluster(server, **config).following() as cluster:
            assert cluster.serving() == ["pod-a", "pod-b"]
            await story(server, cluster)

    run_virtually(main())


def test_pods_are_found_with_their_names_addresses_and_zones() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        found = [(worker.name, worker.address.url, worker.zone) for worker in cluster.registry.workers]
        assert found == [
            ("m/decode/pod-a", "http://10.0.0.1:8000", None),
            ("m/decode/pod-b", "http://10.0.0.2:8000", "z"),
        ]
        assert (server.lists, server.begun) == (1, 1)

    follow(story)


def test_a_change_reaches_the_pools_in_the_turn_in_which_it_is_told() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.put("s-1", endpoint("10.0.0.2", "b"), endpoint("10.0.0.3", "c"))
        await asyncio.sleep(0)  # virtual time stands still
        for _ in range(20):
            await asyncio.sleep(0)
        assert cluster.serving() == ["pod-b"]
        cluster.answer()
        assert cluster.serving() == ["pod-b", "pod-c"]
        server.put("s-2", endpoint("10.0.0.4", "d"))
        server.delete("s-1")
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-d"]

    follow(story)


@pytest.mark.parametrize("how", ["", '{"type":"DELE', '{"type":"DELETED"}\n', "\x00\n", "[" * 100_000 + "\n"])
def test_what_happens_while_a_watch_is_cut_is_seen_within_a_second(how: str) -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.hold()
        server.put("s-1", endpoint("10.0.0.2", "b"))
        await asyncio.sleep(0.001)
        assert cluster.serving() == ["pod-a", "pod-b"]
        server.cut(how)
        await asyncio.sleep(1.0)
        assert cluster.serving() == ["pod-b"]

    follow(story)


def test_watches_that_are_cut_at_once_time_after_time_are_not_asked_for_in_a_hurry() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        for _ in range(600):
            await asyncio.sleep(0.1)
            server.cut()
        assert server.lists < 60 / kubernetes.LONGEST_PAUSE_S * 2 + 20
        server.put("s-1", endpoint("10.0.0.2", "b"))
        await asyncio.sleep(1.0)
        assert cluster.serving() == ["pod-b"]

    follow(story)


def test_a_deletion_that_no_watch_ever_tells_shows_when_the_watch_ends() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.put("s-1", endpoint("10.0.0.2", "b"), is_told=False)
        await asyncio.sleep(kubernetes.WATCH_S * (1 + kubernetes.JITTER) + 1)
        assert cluster.serving() == ["pod-b"]

    follow(story)


def test_a_watch_that_stands_still_is_given_up() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        for watch in server.watches:
            watch.is_still = True
        server.put("s-1", endpoint("10.0.0.2", "b"))
        await asyncio.sleep(kubernetes.WATCH_S * (1 + kubernetes.JITTER) + kubernetes.LATE_S + 1)
        assert cluster.serving() == ["pod-b"]

    follow(story)


def test_a_history_that_was_compacted_is_listed_anew() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.hold()
        server.put("s-1", endpoint("10.0.0.2", "b"))
        server.compact()
        server.hold(is_still=False)
        await asyncio.sleep(1.0)
        assert cluster.serving() == ["pod-b"]
        server.hold()
        server.put("s-1", endpoint("10.0.0.1", "a"))
        server.cut()
        server.compact()
        await asyncio.sleep(1.0)
        cluster.answer()
        assert cluster.serving() == ["pod-a"]
        assert cluster.told("discovery.away") == []

    follow(story)


def test_bookmarks_and_what_is_told_twice_change_nothing() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.repeats = True
        server.bookmark()
        server.put("s-2", endpoint("10.0.0.3", "c"))
        server.bookmark()
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-a", "pod-b", "pod-c"]

    follow(story)


def test_an_older_state_of_a_slice_is_no_news() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        old = json.dumps({"type": "MODIFIED", "object": server.slices["s-1"]})
        server.put("s-1", endpoint("10.0.0.2", "b"))
        await asyncio.sleep(0.01)
        server.tell(f"{old}\n".encode())
        await asyncio.sleep(0.01)
        assert cluster.serving() == ["pod-b"]

    follow(story)


def test_many_slices_come_in_pages() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.page = 3
        for index in range(20):
            server.put(f"n-{index}", endpoint(f"10.1.0.{index}", f"n{index}"))
        server.cut()
        await asyncio.sleep(1.0)
        assert len(cluster.registry.workers) == 22
        server.away = None

    follow(story)


# --- conditions ---------------------------------------------------------------------------------


def test_one_that_terminates_gets_no_new_leg_and_one_that_is_not_ready_is_not_taken() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.put(
            "s-1",
            endpoint("10.0.0.1", "a", ready=False, serving=True, terminating=True),
            endpoint("10.0.0.2", "b"),
            endpoint("10.0.0.3", "new", ready=False),
        )
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-b"]
        assert cluster.worker("pod-a").state == "draining"
        assert cluster.registry.find("m/decode/pod-new") is None
        server.put("s-1", endpoint("10.0.0.2", "b", ready=None), endpoint("10.0.0.3", "new", ready=None))
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-b", "pod-new"]

    follow(story)


def test_a_pod_in_several_slices_is_one_worker() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.put("s-2", endpoint("10.0.0.1", "a", ready=False))  # moved, while the cluster is at it
        server.put("s-6", endpoint("fd00::1", "a"), endpoint("fd00::9", "only6"), family="IPv6")
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-a", "pod-b", "pod-only6"]
        assert cluster.worker("pod-a").address.url == "http://10.0.0.1:8000"
        assert cluster.worker("pod-only6").address.url == "http://[fd00::9]:8000"
        assert cluster.told("discovery.problem") == []

    follow(story)


def test_a_new_pod_with_an_old_address_is_another_worker() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        old = cluster.worker("pod-a")
        server.put("s-1", endpoint("10.0.0.1", "c"), endpoint("10.0.0.2", "b"))
        await asyncio.sleep(0.01)
        cluster.answer()
        assert (cluster.serving(), old.state) == (["pod-b", "pod-c"], "gone")

    follow(story)


# --- ports --------------------------------------------------------------------------------------

TWO = [{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}]


@pytest.mark.parametrize(
    ("ports", "wanted", "url"),
    [
        ([{"name": "", "port": 7}], None, "http://10.0.0.1:7"),
        (TWO, None, "http://10.0.0.1:8000"),
        (TWO, "metrics", "http://10.0.0.1:9"),
        (TWO, 9, "http://10.0.0.1:9"),
        ([], 8123, "http://10.0.0.1:8123"),
        (None, 8123, "http://10.0.0.1:8123"),
        ([{"name": "http", "port": 8, "appProtocol": "https"}], None, "https://10.0.0.1:8"),
    ],
)
def test_the_port_is_that_of_the_service_that_is_asked_for(ports: Any, wanted: Any, url: str) -> None:
    async def main() -> None:
        server = FakeKubernetes()
        server.put("s", endpoint("10.0.0.1", "a"), ports=ports)
        async with Cluster(server, port=wanted).following() as cluster:
            assert [worker.address.url for worker in cluster.registry.workers] == [url]

    run_virtually(main())


@pytest.mark.parametrize(
    ("ports", "wanted", "why"),
    [
        ([], None, "give discover.kubernetes.port; the Service's ports are: none"),
        (TWO, "api", "there is no port 'api'; the Service's ports are: metrics, http"),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], None, "the Service's ports are: a, b"),
    ],
)
def test_a_port_that_nobody_can_know_is_named(ports: Any, wanted: Any, why: str) -> None:
    async def main() -> None:
        server = FakeKubernetes()
        server.put("s", endpoint("10.0.0.1", "a"), ports=ports)
        async with Cluster(server, port=wanted).following() as cluster:
            assert cluster.registry.workers == ()
            assert why in cluster.told("discovery.problem")[0]

    run_virtually(main())


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        {"endpoints": [{"addresses": []}]},
        {"endpoints": [{"addresses": "10.0.0.9"}]},
        {"endpoints": ["x"]},
        {"endpoints": [{"addresses": ["10.0.0.9"], "targetRef": {"name": "../x\n", "uid": "u"}}]},
        {"endpoints": 7},
        {"ports": "x"},
        {"addressType": []},
    ],
)
def test_garbage_is_named_and_nobody_who_answers_is_dropped_for_it(broken: Any) -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.put("s-0", **({"ports": server.ports} | broken))
        server.put("s-1", endpoint("10.0.0.3", "c"))
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-a", "pod-b", "pod-c"]
        problems = cluster.told("discovery.problem")
        assert any("s-0" in problem or "pod" in problem or "decode/" in problem for problem in problems)
        server.delete("s-0")
        server.cut()
        await asyncio.sleep(1.0)
        assert cluster.serving() == ["pod-c"]

    follow(story)


def test_a_pod_whose_address_becomes_garbage_stays_while_it_answers() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.put("s-1", endpoint("a b", "a"), endpoint("10.0.0.3", "c"))
        await asyncio.sleep(0.01)
        cluster.answer()
        assert cluster.serving() == ["pod-a", "pod-c"]
        assert "m/decode/pod-a (uid a): its url is wrong" in cluster.told("discovery.problem")[0]

    follow(story)


def test_a_slice_that_cannot_be_read_any_more_counts_as_it_was() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        good = dict(server.slices["s-1"])
        for _ in range(2):
            server.put("s-1", endpoints=[], addressType=7)
            server.cut()
            await asyncio.sleep(1.0)
            assert cluster.serving() == ["pod-a", "pod-b"]
        server.put("s-1", *good["endpoints"][:1])
        await asyncio.sleep(1.0)
        assert cluster.serving() == ["pod-a"]

    follow(story)


def test_a_service_without_endpoints_is_named() -> None:
    async def main() -> None:
        server = FakeKubernetes()
        async with Cluster(server).following() as cluster:
            assert (
                "the Service workers has no endpoints in the namespace team"
                in cluster.told("discovery.problem")[0]
            )

    run_virtually(main())


@pytest.mark.parametrize(
    ("away", "why"),
    [
        (ConnectionRefusedError("refused"), "http://api:1 refuses connections"),
        (403, "http://api:1 answers 403 (not now); let its service account get, list and watch"),
        (401, "is the token of the service account right?"),
        (404, "is this the API of Kubernetes 1.21 or later?"),
        (500, "http://api:1 answers 500"),
        (410, "let a list expire"),
    ],
)
def test_nobody_is_lost_while_the_api_server_is_away(away: Exception | int, why: str) -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.away = away
        server.cut()
        await asyncio.sleep(600)
        assert cluster.serving() == ["pod-a", "pod-b"]
        assert why in cluster.told("discovery.away")[0]
        assert len(cluster.told("discovery.away")) == 1
        assert cluster.feed.status.away is not None
        age_s = asyncio.get_running_loop().time() - cluster.feed.status.since
        assert 500 < age_s < 700
        server.away = None
        server.put("s-1", endpoint("10.0.0.2", "b"))
        await asyncio.sleep(10)
        assert cluster.serving() == ["pod-b"]
        assert len(cluster.told("discovery.back")) == 1
        assert cluster.feed.status.away is None

    follow(story)


def test_a_server_that_asks_for_it_is_left_alone() -> None:
    async def story(server: FakeKubernetes, cluster: Cluster) -> None:
        server.away, server.headers = 429, {"retry-after": "20"}
        server.cut()
        await asyncio.sleep(1)
        server.away = None
        server.put("s-1", endpoint("10.0.0.2", "b"))
        await asyncio.sleep(15)
        assert cluster.serving() == ["pod-a", "pod-b"]
        await asyncio.sleep(10)
        assert cluster.serving() == ["pod-b"]

    follow(story)


# --- inside a cluster ---------------------------------------------------------------------------


def test_outside_of_a_cluster_it_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SourceAway, match=r"KUBERNETES_SERVICE_HOST is not set.*discover.kubernetes.url"):
        find_api(KubernetesConfig(service="s"), tmp_path, {})
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    with pytest.raises(SourceAway, match=r"namespace cannot be read.*automountServiceAccountToken"):
        find_api(KubernetesConfig(service="s"), tmp_path, environ)
    (tmp_path / "namespace").write_text("team\n")
    with pytest.raises(SourceAway, match=r"ca\.crt holds no certificates"):
        find_api(KubernetesConfig(service="s"), tmp_path, environ)
    (tmp_path / "ca.crt").write_bytes(Path("tests/orchestrator/certificate.pem").read_bytes())
    api = find_api(KubernetesConfig(service="s"), tmp_path, environ)
    assert (api.url, api.namespace) == ("https://[fd00::1]:6443", "team")


def test_the_token_is_read_anew_for_every_question(tmp_path: Path) -> None:
    """Kubernetes replaces it once an hour."""
    (tmp_path / "namespace").write_text("team")
    (tmp_path / "ca.crt").write_bytes(Path("tests/orchestrator/certificate.pem").read_bytes())
    (tmp_path / "token").write_text("first\n")
    environ = {"KUBERNETES_SERVICE_HOST": "10.9.9.9"}

    async def main() -> None:
        server = FakeKubernetes()
        server.token = "first"
        server.put("s-1", endpoint("10.0.0.1", "a"))
        found: list[MemberSet] = []
        source = KubernetesSource(
            KubernetesConfig(service="workers"),
            [DECODE, PREFILL],
            Random(0),
            account=tmp_path,
            environ=environ,
            transport=server.transport(),
        )
        watching = asyncio.create_task(source.watch(found.append))
        await asyncio.sleep(1)
        assert [(one.model, one.role, one.uid) for one in found[0].members] == [
            ("m", "decode", "a"),
            ("m", "prefill", "a"),
        ]
        (tmp_path / "token").write_text("second\n")
        server.token = "second"
        server.cut()
        await asyncio.sleep(1)
        assert not watching.done()
        assert {"first", "second"} == set(server.tokens)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run_virtually(main())


# --- over sockets -------------------------------------------------------------------------------


def test_it_works_over_sockets_with_one_connection() -> None:
    async def main() -> None:
        server = FakeKubernetes()
        server.put("s-1", endpoint("10.0.0.1", "a"), endpoint("10.0.0.2", "b"))
        async with server.listening() as url, Cluster(server, url).following() as cluster:
            await until(lambda: len(cluster.registry.workers) == 2)
            cluster.answer()
            await until(lambda: bool(server.watches))
            server.put("s-1", endpoint("10.0.0.2", "b"))
            await until(lambda: cluster.serving() == ["pod-b"])
            server.hold()
            server.put("s-1", endpoint("10.0.0.1", "a"), endpoint("10.0.0.2", "b"))
            server.cut('{"type":')
            await until(lambda: "decode/pod-a" in cluster.names())

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # sockets and pools tell no event
            await asyncio.sleep(0.005)
