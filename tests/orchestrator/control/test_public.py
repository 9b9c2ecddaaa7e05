from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

from orchestrator import __version__
from orchestrator.compiled import is_compiled
from orchestrator.config.addresses import unmanaged
from orchestrator.config.options import Config, ModelConfig, PoolConfig
from orchestrator.control.public import MAX_TROUBLED, control_app
from orchestrator.workers.snapshot import WorkerStatus
from orchestrator.workers.states import WorkerState
from tests.orchestrator.control.fakes import KEY, RING, FakeState, ask, error_code, worker
from tests.orchestrator.records import request_record

# --- health -------------------------------------------------------------------------------------


def test_health_says_that_the_process_is_up_even_without_workers() -> None:
    app = control_app(FakeState(problems={"tiny": "no worker"}, statuses=[]))
    response = ask(app, "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_verbose_health_has_figures() -> None:
    state = FakeState()
    state.lag.note(0.25)
    state.lag.note(0.125)
    state.telemetry.begin(request_record())
    figures = ask(control_app(state), "/health?verbose").json()
    assert figures.pop("uptime_s") >= 100
    assert figures.pop("rss_bytes") > 1 << 20
    assert figures.pop("pid") == os.getpid()
    assert figures == {
        "status": "ok",
        "version": __version__,
        "form": "compiled" if is_compiled() else "pure",
        "transport": "orjson",
        "event_loop": "asyncio",
        "http_parser": "httptools",
        "process": 3,
        "loop_lag_ms": {"last": 125.0, "max": 250.0},
        "in_flight": 1,
        "tasks": 1,
    }


def test_ready_when_every_model_has_a_whole_path() -> None:
    response = ask(control_app(FakeState()), "/ready")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "models": {"tiny": None, "org/large": None}}


def test_not_ready_tells_why_for_each_model() -> None:
    problems = {"tiny": None, "org/large": "no decode worker is ready"}
    response = ask(control_app(FakeState(problems=problems)), "/ready")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json() == {"status": "not ready", "models": problems}


def test_version() -> None:
    assert ask(control_app(FakeState()), "/version").json() == {"version": __version__}


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_sagemaker_asks_by_a_name_of_its_own(method: str) -> None:
    assert ask(control_app(FakeState()), "/ping", method).status_code == 200


def test_the_load_is_what_is_in_progress() -> None:
    state = FakeState()
    record = request_record()
    state.telemetry.begin(record)
    assert ask(control_app(state), "/load").json() == {"server_load": 1}
    state.telemetry.finish(record)
    assert ask(control_app(state), "/load").json() == {"server_load": 0}


def test_a_balancer_may_ask_with_head() -> None:
    response = ask(control_app(FakeState()), "/health", "HEAD")
    assert response.status_code == 200


# --- models -------------------------------------------------------------------------------------


def test_models_are_listed_with_the_shortest_length_of_their_workers() -> None:
    state = FakeState()
    body = ask(control_app(state), "/v1/models").json()
    created = int(state.started)
    common = {"object": "model", "created": created, "owned_by": "baton", "root": "p", "parent": None}
    for card in body["data"]:
        (permission,) = card.pop("permission")
        assert permission["object"] == "model_permission"
        assert permission["created"] == created
    assert body == {
        "object": "list",
        "data": [
            {"id": "tiny", "max_model_len": 2048, **common},
            {"id": "org/large", "max_model_len": None, **common},
        ],
    }


def test_models_have_all_fields_that_vllms_list_has() -> None:
    (card, _) = ask(control_app(FakeState()), "/v1/models").json()["data"]
    fields = {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}
    assert card.keys() == fields
    assert card["permission"][0].keys() == {
        "id",
        "object",
        "created",
        "allow_create_engine",
        "allow_sampling",
        "allow_logprobs",
        "allow_search_indices",
        "allow_view",
        "allow_fine_tuning",
        "organization",
        "group",
        "is_blocking",
    }


def test_the_root_of_a_model_is_its_workers_name_where_its_path_is_not_known() -> None:
    model = ModelConfig(name="tiny", both=PoolConfig(urls=["http://h:1"], served_model="org/Tiny"))
    status = WorkerStatus(
        unmanaged("tiny", "both", 0, "http://h:1", "org/Tiny"), WorkerState.READY, 0, None, 8, None
    )
    state = FakeState(config=Config(models=[model]), statuses=[status])
    assert ask(control_app(state), "/v1/models/tiny").json()["root"] == "org/Tiny"
    state = FakeState(config=Config(models=[model]), statuses=[])
    assert ask(control_app(state), "/v1/models/tiny").json()["root"] == "tiny"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/v1/models/org/large", "/version", "/health"]
)
def test_a_slash_behind_a_path_changes_nothing(path: str) -> None:
    app = control_app(FakeState())
    plain, slashed = ask(app, path), ask(app, f"{path}/")
    assert (slashed.status_code, slashed.content) == (200, plain.content)


def test_a_slash_behind_a_path_opens_nothing() -> None:
    app = control_app(FakeState(keys=RING))
    assert ask(app, "/v1/models/").status_code == 401
    assert ask(app, "/version/").status_code == 200
    assert ask(app, "//").status_code == 401


def test_one_model_may_have_a_slash_in_its_name() -> None:
    assert ask(control_app(FakeState()), "/v1/models/org/large").json()["id"] == "org/large"


def test_adapters_and_aliases_are_models_too() -> None:
    model = ModelConfig(name="tiny", adapters=["listed"], both=PoolConfig(urls=["http://h:1"]))
    aliases = {"gpt-4": "tiny", "gpt-sql": "sql", "nobody": "gone"}
    statuses = [
        replace(worker("tiny/both/0", 2048), adapters=("sql", "tiny", "listed")),
        replace(worker("tiny/both/1", 4096), adapters=("sql", "poems")),
    ]
    config = Config(models=[model]).model_copy(update={"aliases": aliases})
    app = control_app(FakeState(config=config, statuses=statuses))
    found = {card["id"]: card for card in ask(app, "/v1/models").json()["data"]}
    assert [*found] == ["tiny", "listed", "poems", "sql", "gpt-4", "gpt-sql"]
    shown = {name: (card["root"], card["parent"]) for name, card in found.items()}
    assert shown["sql"] == shown["gpt-sql"] == ("sql", "tiny")
    assert shown["tiny"] == shown["gpt-4"] == ("tiny", None)
    assert {card["max_model_len"] for card in found.values()} == {2048}
    assert len({card["permission"][0]["id"] for card in found.values()}) == len(found)
    assert ask(app, "/v1/models/gpt-sql").json() == found["gpt-sql"]


def test_an_unknown_model_is_404_with_the_known_names() -> None:
    response = ask(control_app(FakeState()), "/v1/models/other")
    assert (response.status_code, error_code(response)) == (404, "model_not_found")
    assert "tiny, org/large" in response.json()["error"]["message"]


# --- workers that cannot be used ---------------------------------------------------------------


def unfit(number: int, state: WorkerState = WorkerState.UNFIT) -> WorkerStatus:
    why = "it answers 401 to /v1/models at http://10.0.0.1:8000"
    status = worker(f"tiny/decode/{number}", None)
    return replace(status, state=state, last_error=why, reason="refuses the orchestrator's key (401)")


def test_ready_says_in_fixed_words_why_workers_cannot_be_used() -> None:
    statuses = [
        worker("tiny/prefill/0", 4096),
        unfit(0),
        unfit(1, WorkerState.GONE),
        unfit(2, WorkerState.READY),
    ]
    for problems, status in (({"tiny": None}, 200), ({"tiny": "no decode worker is ready"}, 503)):
        response = ask(control_app(FakeState(statuses=statuses, problems=problems)), "/ready")
        assert response.status_code == status
        assert response.json()["workers"] == {
            "tiny/decode/0": "unfit: it refuses the orchestrator's key (401)",
            "tiny/decode/1": "gone: it refuses the orchestrator's key (401)",
        }
        assert "10.0.0.1" not in response.text


def test_what_ready_says_of_workers_is_bounded() -> None:
    statuses = [unfit(number) for number in range(MAX_TROUBLED + 7)]
    said = ask(control_app(FakeState(statuses=statuses)), "/ready").json()["workers"]
    assert len(said) == MAX_TROUBLED + 1
    assert said["..."] == "and 7 more"


# --- docs ---------------------------------------------------------------------------------------


def test_the_schema_describes_the_data_plane_too() -> None:
    app = control_app(FakeState())
    document = ask(app, "/openapi.json").json()
    assert set(document["paths"]) == {
        "/health",
        "/load",
        "/ping",
        "/ready",
        "/version",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["required"] == ["messages"]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert ask(app, "/openapi.json").json() == document


def test_the_docs_page_needs_nothing_from_elsewhere() -> None:
    answer = ask(control_app(FakeState()), "/docs")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert re.findall(r"(?:src|href)=.?([^\s>\"]+)", answer.text) == ["/openapi.json"]
    assert "<script" not in answer.text
    assert "http" not in answer.text.replace("<!doctype html>", "").replace("HTTPValidationError", "")
    assert "<code>/v1/chat/completions</code>" in answer.text


def test_the_docs_page_is_there() -> None:
    assert "/openapi.json" in ask(control_app(FakeState()), "/docs").text


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/version"])
def test_probes_need_no_key(path: str) -> None:
    assert ask(control_app(FakeState(keys=RING)), path).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/docs", "/openapi.json", "/nothing"])
def test_everything_else_needs_one(path: str) -> None:
    app = control_app(FakeState(keys=RING))
    for headers in ({}, {"authorization": "Bearer wrong"}):
        response = ask(app, path, headers=headers)
        assert (response.status_code, error_code(response)) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert ask(app, path, headers=KEY).status_code == (404 if path == "/nothing" else 200)


def test_models_are_listed_for_an_sdk_of_anthropics() -> None:
    app = control_app(FakeState(keys=RING))
    key = KEY["authorization"].removeprefix("Bearer ")
    for path in ("/v1/models", "/v1/models/tiny"):
        assert ask(app, path, headers={"x-api-key": key}).status_code == 200
        assert ask(app, path, headers={"x-api-key": "wrong"}).status_code == 401
        assert ask(app, path, headers={"x-api-key": key, "authorization": "Bearer wrong"}).status_code == 401
    assert ask(app, "/docs", headers={"x-api-key": key}).status_code == 401
    said = ask(app, "/v1/models").json()["error"]["message"]
    assert said == "an API key is needed: send x-api-key: KEY, or Authorization: Bearer KEY"


def test_figures_of_the_process_need_a_key_where_there_are_keys() -> None:
    app = control_app(FakeState(keys=RING))
    assert ask(app, "/health?verbose").status_code == 401
    assert "rss_bytes" not in ask(app, "/health").json()
    assert "rss_bytes" in ask(app, "/health?verbose", headers=KEY).json()


def test_ready_if_any_model_can_be_served() -> None:
    problems = {"tiny": None, "org/large": "no decode worker is ready"}
    response = ask(control_app(FakeState(problems=problems)), "/ready?any")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "models": problems}
    problems = {"tiny": "no worker", "org/large": "no worker"}
    assert ask(control_app(FakeState(problems=problems)), "/ready?any").status_code == 503
