from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from orchestrator.control.admin import admin_app
from orchestrator.wire.info import Streams, WorkerInfo
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.states import WorkerState
from tests.orchestrator.cluster import names, seat
from tests.orchestrator.control.fakes import KEY, RING, FakeState, ask, error_code

INFO = WorkerInfo(role="decode", model="m", decodes=["json"], engine="sim", engine_version="1")
NEW = {"model": "m", "role": "decode", "url": "http://10.0.0.7:8100"}


class Admin:
    """The admin API over one prefill and two decode workers, all ready."""

    def __init__(self, **options: Any) -> None:
        self.state = FakeState(**options)
        self.registry = self.state.registry
        self._app = admin_app(self.state)

    def ask(self, method: str, path: str = "", body: object = None, **headers: str) -> httpx.Response:
        return ask(self._app, f"/admin/workers{path}", method, headers, body)


@pytest.fixture
def admin() -> Admin:
    return Admin()


def test_workers_are_listed_with_all_that_is_known(admin: Admin) -> None:
    decode = admin.registry.workers[1]
    admin.registry.announce(decode, Introduction(INFO, 4096))
    with seat(decode):
        first, second, _ = admin.ask("GET").json()
    assert (first["address"]["name"], first["state"], first["in_flight"]) == ("m/prefill/0", "ready", 0)
    assert (second["info"]["engine"], second["max_model_len"], second["in_flight"]) == ("sim", 4096, 1)


@pytest.mark.parametrize("ours", ["http", "mux"])
def test_which_workers_get_their_legs_on_one_connection(admin: Admin, ours: Streams) -> None:
    admin.state.streams = ours
    for worker, theirs in zip(admin.registry.workers, ([], ["http"], ["http", "mux"]), strict=True):
        admin.registry.announce(worker, Introduction(msgspec.structs.replace(INFO, streams=theirs), 4096))
    assert [worker["streams"] for worker in admin.ask("GET").json()] == ["http", "http", ours]


def test_a_worker_is_added_under_the_next_name(admin: Admin) -> None:
    answer = admin.ask("POST", body=NEW | {"served_model": "theirs", "zone": "a"})
    assert answer.status_code == 201
    assert (answer.json()["address"]["name"], answer.json()["state"]) == ("m/decode/2", "starting")
    address = admin.registry.workers[-1].address
    assert (address.host, address.port, address.served_model) == ("10.0.0.7", 8100, "theirs")
    assert (address.zone, address.is_managed) == ("a", False)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "model: Field required; role: Field required; url: Field required"),
        ([], "Input should be an object"),
        (NEW | {"role": "other"}, "role: Input should be 'prefill', 'decode' or 'both'"),
        (NEW | {"url": "10.0.0.7:8100"}, "url: expected http://HOST:PORT or https://HOST:PORT, got"),
        (NEW | {"url": "http://user@h:1"}, "url: expected only http(s)://HOST:PORT, got"),
        (NEW | {"colour": 1}, "colour: Extra inputs are not permitted"),
    ],
)
def test_mistakes_are_named(admin: Admin, body: object, says: str) -> None:
    answer = admin.ask("POST", body=body)
    assert (answer.status_code, error_code(answer)) == (400, "invalid_request")
    assert answer.json()["error"]["message"].startswith(says)
    assert answer.json()["error"]["param"] == (says.partition(":")[0] if ": " in says else None)
    assert len(admin.registry.workers) == 3


def test_what_is_there_already_is_a_conflict(admin: Admin) -> None:
    assert admin.ask("POST", body=NEW).status_code == 201
    answer = admin.ask("POST", body=NEW)
    assert (answer.status_code, error_code(answer)) == (409, "conflict")
    assert answer.json()["error"]["message"] == "there is m/decode/2 at http://10.0.0.7:8100 already"


def test_a_model_of_no_config_is_unknown(admin: Admin) -> None:
    answer = admin.ask("POST", body=NEW | {"model": "x"})
    assert (answer.status_code, error_code(answer)) == (404, "model_not_found")
    assert answer.json()["error"]["message"] == "no model 'x'; there is m"


def test_a_worker_is_drained_and_serves_again(admin: Admin) -> None:
    worker = admin.registry.workers[1]
    with seat(worker):
        answer = admin.ask("POST", "/m/decode/0/drain")
    assert (answer.status_code, answer.json()["state"], answer.json()["in_flight"]) == (200, "draining", 1)
    assert names(admin.registry.pools["m"].decode) == ["decode/1"]
    answer = admin.ask("POST", "/m/decode/0/undrain")
    assert (answer.status_code, answer.json()["is_drained"]) == (200, False)
    assert worker.state is WorkerState.SUSPECT  # until a probe


def test_a_worker_is_removed_when_it_is_free(admin: Admin) -> None:
    with seat(admin.registry.workers[1]):
        answer = admin.ask("DELETE", "/m/decode/0")
        assert (answer.status_code, answer.json()["state"]) == (202, "draining")
        admin.registry.settle()
        assert len(admin.ask("GET").json()) == 3
        assert admin.ask("POST", "/m/decode/0/undrain").status_code == 409
    admin.registry.settle()
    assert [status["address"]["name"] for status in admin.ask("GET").json()] == ["m/prefill/0", "m/decode/1"]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/x/drain"), ("POST", "/m/decode/7/undrain"), ("DELETE", "/m/decode/7")]
)
def test_a_worker_that_is_not_there(admin: Admin, method: str, path: str) -> None:
    answer = admin.ask(method, path)
    assert (answer.status_code, error_code(answer)) == (404, "not_found")
    assert "there is m/prefill/0, m/decode/0, m/decode/1" in answer.json()["error"]["message"]


CHANGES = [
    ("POST", ""),
    ("POST", "/m/decode/0/drain"),
    ("POST", "/m/decode/0/undrain"),
    ("DELETE", "/m/decode/0"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_pages_of_other_sites_change_nothing(admin: Admin, method: str, path: str) -> None:
    before = admin.registry.statuses()
    answer = admin.ask(method, path, NEW, origin="http://elsewhere.example")
    assert (answer.status_code, error_code(answer)) == (403, "forbidden")
    assert admin.registry.statuses() == before
    assert admin.ask(method, path, NEW, origin="http://baton").is_success


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_changes_need_a_key_where_there_are_keys(method: str, path: str) -> None:
    admin = Admin(keys=RING)
    assert admin.ask(method, path, NEW).status_code == 401
    assert admin.ask(method, path, NEW, **KEY).is_success


def test_an_added_worker_of_a_new_role_is_measured_too(admin: Admin) -> None:
    admin.state.statuses = list(admin.registry.statuses())
    text = ask(admin_app(admin.state), "/metrics").text
    assert 'baton_workers{model="m",role="decode",state="ready"} 2.0' in text
