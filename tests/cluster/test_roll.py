"""A new revision everywhere: each worker gives way to one of the next revision while clients ask.

About 600 requests are asked while it goes on; with BATON_TEST_ROLL=5000 in the environment so many.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.wire.info import Role
from orchestrator.wire.load import READY_PATH
from orchestrator.wire.member import Member, remove_member, write_member
from tests.cluster import envoy
from tests.cluster.load import Load, loaded
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, Stream
from tests.waiting import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

REQUESTS = int(os.environ.get("BATON_TEST_ROLL", "600"))
OLD, NEW = "old", "new"
ROLES: tuple[Role, Role] = ("prefill", "decode")
EACH = 2  # workers of each role
LONG = 1500  # tokens: a stream takes longer than the start of a worker
PHASES = EACH + 2  # one before, one for each worker of a role, one when all are new
_TIMING = ["--decode-ms-per-token", "5", "--prefill-us-per-token", "500", "--transfer-ms", "2"]
Roll = Callable[["Site", Sequence[Load]], None]


class Pod:
    """A worker as Kubernetes runs it: it has a name and a uid of its own, and serves nobody when it ends."""

    def __init__(self, folder: Path, role: Role, number: int, revision: str) -> None:
        self.name = f"{role}-{revision}-{number}"
        self.revision = revision
        self._folder, self._role = folder, role
        # A model of other weights answers with other words, so that a client sees whose answer it has.
        options = [*_TIMING, "--revision", revision, "--weights", revision, "--record", "100000"]
        self._worker = SimWorker(role, options)
        self.is_listed = False
        self.engine_id = ""
        self.legs: list[dict[str, Any]] = []  # that it has seen, when it has ended
        self.ledger: dict[str, Any] = {}  # when it has ended

    def list(self) -> None:
        """Have it found, once it says that it is ready."""
        self._worker.wait_ready()
        wait_for(lambda: httpx.get(self.url + READY_PATH, trust_env=False).is_success, f"{self.name} ready")
        write_member(
            self._folder,
            Member(uid=f"uid-{self.name}", name=self.name, model=MODEL, role=self._role, url=self.url),
        )
        self.is_listed = True

    @property
    def url(self) -> str:
        return self._worker.url

    def retire(self) -> None:
        """Drain it as a preStop hook does, end it, and list it no more."""
        command = [sys.executable, "-m", "launch.cli", "drain", "--self", "--wait", "--url", self.url]
        drained = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert drained.returncode == 0, drained.stderr
        self.end()
        remove_member(self._folder, f"uid-{self.name}")
        self.is_listed = False

    def end(self) -> None:
        """Note what it has seen and holds, and end it."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=60) as client:
            self.legs = [entry for entry in client.get("/sim/requests").json() if entry["leg"] is not None]
            self.ledger = client.get("/sim/ledger").json()
        self.engine_id = self.ledger["engine_id"]
        self.kill()

    def kill(self) -> None:
        self._worker.kill()


class Site:
    """Two orchestrators which find their workers in a folder."""

    def __init__(self, directory: Path, options: Mapping[str, Any]) -> None:
        self._options = options
        self.folder = directory / "members"
        self.folder.mkdir()
        self.pods: list[Pod] = []
        self.orchestrators: list[Orchestrator] = []
        self.streamed = 0  # long streams, beside what the load asks
        self._directory = directory

    def open(self) -> None:
        for role in ROLES:
            for number in range(EACH):
                self.started(role, number, OLD).list()
        for index in range(2):
            own = self._directory / str(index)
            own.mkdir()
            pool = {"discover": {"file": str(self.folder)}}
            self.orchestrators.append(Orchestrator(own, [], processes=1, pool=pool, **self._options))
        for orchestrator in self.orchestrators:
            orchestrator.wait_ready()
            self.wait_known(orchestrator)

    def started(self, role: Role, number: int, revision: str) -> Pod:
        self.pods.append(Pod(self.folder, role, number, revision))
        return self.pods[-1]

    def replace(self, role: Role, number: int) -> None:
        """Have a new worker in an old one's place, with one more than wanted meanwhile."""
        self.started(role, number, NEW).list()
        next(pod for pod in self.pods if pod.name == f"{role}-{OLD}-{number}").retire()

    def streams(self) -> list[Stream]:
        """Streams that are under way, two at each orchestrator."""
        clients = [orchestrator.client() for orchestrator in self.orchestrators * 2]
        self.streamed += len(clients)
        return [Stream(client, LONG) for client in clients]

    def wait_known(self, orchestrator: Orchestrator) -> None:
        """Wait until it knows the workers that are listed, and only those."""
        wanted = dict.fromkeys(self.listed(), "ready")
        wait_for(lambda: orchestrator.worker_states() == wanted, f"{wanted} to be known")

    def listed(self) -> set[str]:
        return {f"{MODEL}/{pod.name.partition('-')[0]}/{pod.name}" for pod in self.pods if pod.is_listed}

    def close(self) -> None:
        for orchestrator in self.orchestrators:
            orchestrator.clean_up()
        for pod in self.pods:
            with contextlib.suppress(ValueError):  # it has ended
                pod.kill()


@contextlib.contextmanager
def site(directory: Path, **options: Any) -> Iterator[Site]:
    """Have it until the block ends; `options` are the orchestrators'."""
    made = Site(directory, options)
    try:
        made.open()
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def asked(urls: Sequence[str]) -> Iterator[list[Load]]:
    """Have clients ask at each until the block ends; no request has failed then."""
    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(loaded(url)) for url in urls]
        yield loads
    assert [failure for load in loads for failure in load.failures] == []


def wait_for_more(loads: Sequence[Load], requests: int) -> None:
    """Wait for so many more answers, half of them by each."""
    for load in loads:
        load.wait_for(requests // len(loads), limit_s=600)


def roll_together(place: Site, loads: Sequence[Load]) -> None:
    """Have both roles go on at once, as two Deployments do."""
    for number in range(EACH):
        roll_one(place, number)
        wait_for_more(loads, REQUESTS // PHASES)


def roll_one(place: Site, number: int, *meanwhile: Callable[[], object]) -> None:
    """Replace a worker of each role at once, and do something else meanwhile. Long streams go on: whoever
    serves one is waited for.
    """
    streams = place.streams()
    steps: list[Callable[[], object]] = [partial(place.replace, role, number) for role in ROLES]
    steps += meanwhile
    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(step) for step in steps]:
            done.result()
    assert all(stream.is_whole() for stream in streams)


def roll_in_turn(place: Site, loads: Sequence[Load]) -> None:
    """Have all prefill workers be new before the first decode worker is: no two can go together then."""
    for role in ROLES:
        streams = place.streams()
        for number in range(EACH):
            place.replace(role, number)
        assert all(stream.is_whole() for stream in streams)
        wait_for_more(loads, REQUESTS // PHASES)


@pytest.mark.parametrize("roll", [roll_together, roll_in_turn])
def test_no_request_fails_and_no_pair_is_mixed(tmp_path: Path, roll: Roll) -> None:
    with site(tmp_path) as place:
        with asked([orchestrator.url for orchestrator in place.orchestrators]) as loads:
            wait_for_more(loads, REQUESTS // PHASES)
            roll(place, loads)
            ask_new_ones(place, loads)
        assert_all_went_well(place, loads)


@pytest.mark.envoy
@pytest.mark.skipif(envoy.binary() is None, reason="needs Envoy: `make cluster` installs it")
def test_the_same_while_orchestrators_are_restarted(tmp_path: Path) -> None:
    with site(tmp_path, drain_notice_s=10 * envoy.HEALTH_INTERVAL_S) as place:
        members = [orchestrator.url.removeprefix("http://") for orchestrator in place.orchestrators]
        with (
            envoy.balancing(tmp_path, members, envoy.HEALTH_INTERVAL_S) as front,
            asked([front.url]) as loads,
        ):
            wait_for_more(loads, REQUESTS // PHASES)
            for number in range(EACH):
                roll_one(place, number, place.orchestrators[number].restart)
                front.wait_healthy(members)
                wait_for_more(loads, REQUESTS // PHASES)
            ask_new_ones(place, loads)
        assert_all_went_well(place, loads)


def ask_new_ones(place: Site, loads: Sequence[Load]) -> None:
    """Have old workers be known to nobody, and count only what is asked from then on."""
    for orchestrator in place.orchestrators:
        place.wait_known(orchestrator)
    for load in loads:
        load.wait_for_round()
        load.texts.clear()
    wait_for_more(loads, REQUESTS // PHASES)


def assert_all_went_well(place: Site, loads: Sequence[Load]) -> None:
    """Nothing is under way any more; the workers end here."""
    assert len({text for load in loads for text in load.texts}) == 1, "not only new ones answer at the end"
    answered = place.streamed + sum(load.answered for load in loads)
    assert answered >= REQUESTS
    assert_nothing_is_held(place)
    for pod in place.pods:
        if pod.is_listed:
            pod.end()
    pairs = pairs_of(place.pods)
    slowest_s = max(load.slowest_s for load in loads)
    print(f"{answered} answered, by {dict(pairs)}, the slowest in {slowest_s:.2f} s")
    assert pairs[OLD, OLD]
    assert pairs[NEW, NEW]
    assert pairs[OLD, NEW] == pairs[NEW, OLD] == 0
    assert sum(pairs.values()) == answered
    assert_no_lease_was_lost(place.pods)


def assert_nothing_is_held(place: Site) -> None:
    for orchestrator in place.orchestrators:
        for name in ("baton_requests_in_flight", "baton_worker_in_flight", "baton_kv_leases"):
            wait_for_zero(orchestrator, name)
        assert orchestrator.worker_loads() == dict.fromkeys(place.listed(), 0)
        counters = orchestrator.counters()
        assert counters["baton_kv_leases_leaked_total", ()] == 0
        assert counters["baton_kv_leases_ended_total", (("state", "expired"),)] == 0


def wait_for_zero(orchestrator: Orchestrator, name: str) -> None:
    wait_for(lambda: orchestrator.gauge(name) == 0, f"{name} to be 0")


def pairs_of(pods: Sequence[Pod]) -> Counter[tuple[str, str]]:
    """Count who has prefilled and who has decoded, by revision, by what the decode workers were handed; a
    worker that has done both is a pair with itself.
    """
    revisions = {pod.engine_id: pod.revision for pod in pods}
    found: Counter[tuple[str, str]] = Counter()
    for pod in pods:
        for leg in pod.legs:
            assert leg["outcome"] == "done", leg
            if leg["leg"] == "decode":
                found[revisions[leg["body"]["kv_transfer_params"]["remote_engine_id"]], pod.revision] += 1
            elif leg["leg"] == "aggregated":
                found["alone", pod.revision] += 1
    return found


def assert_no_lease_was_lost(pods: Sequence[Pod]) -> None:
    for pod in pods:
        held = {name: pod.ledger[name] for name in ("pins", "expired", "unknown", "in_flight", "aborted")}
        assert held == {"pins": [], "expired": 0, "unknown": 0, "in_flight": 0, "aborted": 0}, pod.name
        assert pod.ledger["pinned"] == pod.ledger["pulled"] + pod.ledger["pushed"], pod.name
