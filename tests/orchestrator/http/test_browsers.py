"""What pages of other sites can do to an orchestrator as it runs, on both of its listeners."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.orchestrator.running import MODEL, Orchestrator, simulated, starting

pytestmark = pytest.mark.processes

KEY = "k"
PAGE = "https://app.example"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"], scope="module")
def orchestrator(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Iterator[Orchestrator]:
    directory: Path = tmp_path_factory.mktemp("browsers")
    keys = directory / "keys"
    keys.write_text(f"me {sha256(KEY.encode()).hexdigest()} infer,admin\n")
    options = {"api_keys_file": str(keys), "allowed_hosts": ["baton.example"]}
    with simulated("prefill", "decode") as workers, starting(directory, workers) as start:
        cors = {"allowed_origins": [PAGE]}
        yield start(key=KEY, processes=request.param, cors=cors, **options)


def ask(
    orchestrator: Orchestrator, method: str, path: str, *, admin: bool = False, **given: Any
) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}"} | given.pop("headers", {})
    url = (orchestrator.admin_url if admin else orchestrator.url) + path
    return httpx.request(method, url, headers=headers, timeout=60, trust_env=False, **given)


@pytest.mark.parametrize("admin", [False, True], ids=["public", "admin"])
@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions", "/metrics", "/admin/reload"])
def test_other_names_are_refused_on_both_listeners(
    orchestrator: Orchestrator, admin: bool, path: str
) -> None:
    answer = ask(orchestrator, "POST", path, admin=admin, headers={"host": "evil.example:1"}, json=CHAT)
    assert answer.status_code == 421
    assert answer.json()["error"]["code"] == "misdirected_request"


def test_names_of_the_config_are_taken_on_both_listeners(orchestrator: Orchestrator) -> None:
    host = {"host": "Baton.example."}
    assert ask(orchestrator, "POST", "/v1/chat/completions", headers=host, json=CHAT).status_code == 200
    assert ask(orchestrator, "GET", "/metrics", admin=True, headers=host).status_code == 200


def test_a_page_that_is_allowed_reads_answers_errors_and_streams(orchestrator: Orchestrator) -> None:
    page = {"origin": PAGE}
    asked = {"access-control-request-method": "POST", "authorization": ""}
    assert ask(orchestrator, "OPTIONS", "/v1/chat/completions", headers=page | asked).status_code == 200
    answers = [
        ask(orchestrator, "POST", "/v1/chat/completions", headers=page, json=CHAT),
        ask(orchestrator, "POST", "/v1/chat/completions", headers=page, json=CHAT | {"stream": True}),
        ask(orchestrator, "POST", "/v1/chat/completions", headers=page | {"authorization": ""}, json=CHAT),
        ask(orchestrator, "GET", "/v1/models", headers=page),
        ask(orchestrator, "GET", "/nowhere", headers=page),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 200, 404]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-baton-kv" in answer.headers["access-control-expose-headers"]


def test_the_admin_listener_is_for_no_page(orchestrator: Orchestrator) -> None:
    page = {"origin": PAGE, "access-control-request-method": "POST"}
    asked = ask(orchestrator, "OPTIONS", "/admin/reload", admin=True, headers=page)
    assert asked.status_code == 403
    assert "access-control-allow-origin" not in asked.headers
    form = {"content-type": "text/plain"}
    new = b'{"model": "m", "role": "decode", "url": "http://10.0.0.1:1"}'
    answer = ask(orchestrator, "POST", "/admin/workers", admin=True, headers=form, content=new)
    assert answer.status_code == 400


def test_forms_are_refused(orchestrator: Orchestrator) -> None:
    form = {"content-type": "text/plain"}
    answer = ask(
        orchestrator, "POST", "/v1/completions", headers=form, content=b'{"model": "m", "prompt": "a"}'
    )
    assert answer.status_code == 400
    assert "Only 'application/json' is allowed" in answer.json()["error"]["message"]
