"""On the admin listener a key may do what it is for, and everything that is done says by whom."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import pytest

from orchestrator.config.addresses import is_allowed_worker
from orchestrator.config.keys import Key, KeyRing
from orchestrator.config.options import OrchestratorConfig
from orchestrator.control.admin import admin_app
from orchestrator.control.public import control_app
from orchestrator.errors import Conflict
from tests.orchestrator.control.fakes import CONFIG, FakeState, ask, error_code

NEW = {"model": "m", "role": "decode", "url": "http://10.0.0.7:8100"}
READS = ("/", "/admin/workers", "/admin/processes", "/admin/events", "/admin/requests")
CHANGES = (
    ("POST", "/admin/workers", NEW),
    ("POST", "/admin/workers/m/decode/0/drain", None),
    ("POST", "/admin/workers/m/decode/0/undrain", None),
    ("DELETE", "/admin/workers/m/decode/0", None),
    ("POST", "/admin/reload", None),
)


def key(name: str, *scopes: Any) -> Key:
    return Key(name, sha256(name.encode()).digest(), frozenset(scopes))


RING = KeyRing([key("client", "infer"), key("prometheus", "metrics"), key("root", "admin", "metrics")])


def as_(name: str) -> Mapping[str, str]:
    return {"authorization": f"Bearer {name}"}


async def reload() -> tuple[str, ...]:
    return ("limits",)


async def refused_reload() -> tuple[str, ...]:
    raise Conflict("c.yaml:1:1: no\nc.yaml:2:1: neither")


@pytest.mark.parametrize("name", ["client", "prometheus"])
@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_changes_are_for_admins(name: str, method: str, path: str, body: object) -> None:
    state = FakeState(keys=RING)
    before = state.registry.statuses()
    answer = ask(admin_app(state, reload), path, method, as_(name), body)
    assert (answer.status_code, error_code(answer)) == (403, "missing_scope")
    has = {"client": "infer", "prometheus": "metrics"}[name]
    assert answer.json()["error"]["message"] == f"this API key lacks the scope admin; it has {has}"
    assert state.registry.statuses() == before
    assert state.events.after() == []
    assert ask(admin_app(state, reload), path, method, as_("root"), body).is_success


@pytest.mark.parametrize("path", READS)
def test_pages_are_for_admins(path: str) -> None:
    app = admin_app(FakeState(keys=RING))
    statuses = [ask(app, path, headers=as_(name)).status_code for name in ("client", "prometheus", "root")]
    assert statuses == [403, 403, 200]


def test_metrics_are_for_a_key_of_their_own() -> None:
    app = admin_app(FakeState(keys=RING))
    names = ("client", "prometheus", "root")
    assert [ask(app, "/metrics", headers=as_(name)).status_code for name in names] == [403, 200, 200]
    assert ask(app, "/metrics").status_code == 401


def test_models_are_for_clients() -> None:
    app = control_app(FakeState(keys=RING))
    names = ("client", "prometheus", "root")
    assert [ask(app, "/v1/models", headers=as_(name)).status_code for name in names] == [200, 403, 403]


# --- who did it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "what"),
    [
        (*CHANGES[0], "admin.add", "m/decode/2 at http://10.0.0.7:8100 was added, without the credential"),
        (*CHANGES[1], "admin.drain", "m/decode/0 was drained"),
        (*CHANGES[2], "admin.undrain", "m/decode/0 was undrained"),
        (*CHANGES[3], "admin.remove", "m/decode/0 was removed"),
        (*CHANGES[4], "admin.reload", "the config was reloaded: limits"),
    ],
)
def test_a_change_is_a_line_and_an_event_that_say_who(
    method: str, path: str, body: object, kind: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "baton.admin")
    state = FakeState(keys=RING)
    app = admin_app(state, reload)
    assert ask(app, path, method, as_("root"), body).is_success
    [line] = [record.getMessage() for record in caplog.records if record.name == "baton.admin"]
    assert line.startswith(what)
    assert line.endswith(", by key root at 127.0.0.1")
    [event] = ask(app, "/admin/events", headers=as_("root")).json()
    assert (event["kind"], event["who"]) == (kind, "key root at 127.0.0.1")
    assert event["message"].startswith(what)
    assert ask(app, f"/admin/events?after={event['number']}", headers=as_("root")).json() == []


def test_a_reload_that_is_refused_is_noted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "baton.admin")
    state = FakeState()
    assert ask(admin_app(state, refused_reload), "/admin/reload", "POST").status_code == 409
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        "the config was refused: c.yaml:1:1: no c.yaml:2:1: neither, by somebody without a key at 127.0.0.1"
    )
    assert [event.kind for event in state.events.after()] == ["admin.reload_refused"]


# --- who gets the workers' credential -----------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("10.0.0.7", [], False),
        ("10.0.0.7", ["10.0.0.0/8"], True),
        ("11.0.0.7", ["10.0.0.0/8"], False),
        ("10.0.0.7", ["10.0.0.7"], True),
        ("fd00::7", ["fd00::/8"], True),
        ("fd00::7", ["10.0.0.0/8"], False),
        ("gpu1.cluster.example", ["*.cluster.example"], True),
        ("GPU1.cluster.example.", ["*.Cluster.example"], True),
        ("cluster.example", ["*.cluster.example"], False),
        ("evilcluster.example", ["*.cluster.example"], False),
        ("gpu1", ["gpu1"], True),
        ("gpu1", ["10.0.0.0/8", "0.0.0.0/0"], False),  # whatever it may lead to
    ],
)
def test_which_hosts_are_allowed(host: str, allowed: list[str], expected: bool) -> None:
    options = OrchestratorConfig.model_validate({"allow_workers": allowed})
    assert is_allowed_worker(host, options.allow_workers) is expected


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("10.0.0.7/8", "has host bits set"),
        ("10.0.0.0/40", "expected a network as ADDRESS/BITS"),
        ("*", "would protect nothing"),
        ("http://h", "expected a host name without scheme"),
        ("h:80", "expected a network as ADDRESS/BITS"),
    ],
)
def test_patterns_that_are_none(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OrchestratorConfig.model_validate({"allow_workers": [pattern]})


@pytest.mark.parametrize(("allowed", "expected"), [([], False), (["10.0.0.0/8"], True)])
def test_a_worker_that_is_added_gets_the_credential_only_if_it_is_allowed(
    allowed: list[str], expected: bool
) -> None:
    orchestrator = CONFIG.orchestrator.model_copy(update={"allow_workers": allowed})
    state = FakeState(config=CONFIG.model_copy(update={"orchestrator": orchestrator}))
    answer = ask(admin_app(state), "/admin/workers", "POST", body=NEW).json()
    assert answer["address"]["gets_credential"] is expected
    assert state.registry.workers[-1].gets_credential is expected
    assert state.registry.workers[0].gets_credential  # of the config
