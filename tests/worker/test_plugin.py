from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest
from fastapi import APIRouter, Depends, FastAPI, Form, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel

from orchestrator.wire.info import DEFAULT_TRANSPORT, KvEventsInfo, WorkerInfo
from orchestrator.wire.streams import UPGRADE_PATH
from tests.worker.asgi import MSGPACK, get, post
from tests.worker.frames import serving
from worker.info import decodes, role_from_env, transport_from_env, zone_from_env
from worker.plugin import BatonPlugin, _kv_events
from worker.token_ids import pack

encode = msgspec.msgpack.encode


# --- an application made like vLLM's --------------------------------------------------------------------


class Completion(BaseModel):
    model: str
    prompt: str | list[int] = ""
    stream: bool = False


async def validate_json_request(raw_request: Request) -> None:
    if raw_request.headers.get("content-type") != "application/json":
        raise RequestValidationError(["Unsupported Media Type"])


class OwnRoute(APIRoute):
    """Some other plugin's."""


def core() -> FastAPI:
    app = FastAPI()
    app.include_router(core_router())
    app.include_router(own_router(), prefix="/own")

    @app.post("/direct/{place}")
    async def direct(place: str, request: Completion) -> dict[str, Any]:
        return {"place": place, "model": request.model}

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return Response(json.dumps({"error": {"message": error.detail}}), error.status_code)

    return app


def core_router() -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        dependencies=[Depends(validate_json_request)],
        responses={400: {"model": Completion}},
    )
    async def completions(request: Completion, raw_request: Request) -> Response:
        return Response(json.dumps([request.model, request.prompt, len(await raw_request.body())]))

    @router.post("/v1/chat/completions")
    async def chat(request: ChatRequest, raw_request: Request) -> Response:
        serving: ChatServing = raw_request.app.state.openai_serving_chat
        answer = await serving.create_chat_completion(request, raw_request)
        return JSONResponse(answer.model_dump(), headers={"x-load": "1"})

    @router.get("/v1/models")
    async def models() -> list[str]:
        return ["tiny"]

    @router.post("/abort")
    async def abort(raw_request: Request) -> Response:
        return Response(await raw_request.body())

    return router


def own_router() -> APIRouter:
    router = APIRouter(route_class=OwnRoute)

    @router.post("/thing")
    async def thing(request: Completion) -> str:
        return request.model

    return router


class ChatRequest(BaseModel):
    messages: list[dict[str, str]]
    return_token_ids: bool = False
    kv_transfer_params: dict[str, Any] | None = None


class ChatChoice(BaseModel):
    token_ids: list[int] | None


class ChatAnswer(BaseModel):
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None
    seen: dict[str, Any]


class ChatServing:
    """Its prompts have the tokens 5, 6 and 7."""

    async def create_chat_completion(self, request: ChatRequest, raw_request: Request) -> ChatAnswer:
        ids = [5, 6, 7] if request.return_token_ids else None
        seen = request.model_dump(include={"kv_transfer_params"})
        return ChatAnswer(choices=[ChatChoice(token_ids=ids and [8])], prompt_token_ids=ids, seen=seen)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATON_TRANSPORT", "BATON_ROLE", "BATON_STREAMS"):
        monkeypatch.delenv(name, raising=False)


def worker(monkeypatch: pytest.MonkeyPatch, **env: str) -> FastAPI:
    """The application with the plugin attached and its state made, as vLLM does both."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "vllm", vllm())
    app, plugin = core(), BatonPlugin()
    plugin.attach_router(app)
    args = Namespace(served_model_name=["tiny", "alias"], model="path/to/tiny")
    app.state.openai_serving_chat = ChatServing()
    asyncio.run(plugin.init_state(ENGINE, app.state, args))
    return app


def vllm() -> ModuleType:
    module = ModuleType("vllm")
    module.__version__ = "0.32.0"  # type: ignore[attr-defined]
    return module


VOCAB_SIZE = 1000
ENGINE = SimpleNamespace(
    vllm_config=SimpleNamespace(
        cache_config=SimpleNamespace(block_size=128, num_gpu_blocks=50),
        model_config=SimpleNamespace(
            dtype="torch.bfloat16", max_model_len=32768, get_vocab_size=lambda: VOCAB_SIZE
        ),
    )
)
COMPLETION = {"model": "tiny", "prompt": [1, 2]}


# --- bodies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["json", "orjson", "msgpack"])
def test_json_bodies_reach_every_endpoint(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT=transport)
    body = json.dumps(COMPLETION).encode()
    assert post(app, "/v1/completions", body).json() == ["tiny", [1, 2], len(body)]
    assert post(app, "/direct/here", body).json() == {"place": "here", "model": "tiny"}
    assert post(app, "/own/thing", body).json() == "tiny"
    assert post(app, "/abort", body).body == body
    assert get(app, "/v1/models").json() == ["tiny"]


def test_msgpack_bodies_reach_the_endpoints_that_declare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT="msgpack")
    body = encode(COMPLETION)
    assert post(app, "/v1/completions", body, MSGPACK).json() == ["tiny", [1, 2], len(body)]
    assert post(app, "/direct/here", body, MSGPACK).json() == {"place": "here", "model": "tiny"}
    assert post(app, "/own/thing", body, MSGPACK).status == 400  # has a class of its own


@pytest.mark.parametrize("transport", ["json", "orjson"])
def test_no_other_transport_takes_msgpack(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT=transport)
    assert post(app, "/v1/completions", encode(COMPLETION), MSGPACK).status == 400


OWN = 6  # routes of ours


def test_forms_stay_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("python_multipart")  # FastAPI's for forms; vLLM brings it
    monkeypatch.setenv("BATON_TRANSPORT", "msgpack")
    app = FastAPI()

    @app.post("/form")
    async def form(name: Annotated[str, Form()]) -> str:
        return name

    routes = list(app.routes)
    BatonPlugin().attach_router(app)
    assert app.routes[:-OWN] == routes


def test_a_refused_body_gets_the_error_object_of_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = post(worker(monkeypatch, BATON_TRANSPORT="msgpack"), "/v1/completions", b"\xc1", MSGPACK)
    assert reply.status == 400
    assert reply.json()["error"]["message"].startswith("msgpack body refused: ")


@pytest.mark.parametrize("transport", ["json", "orjson", "msgpack"])
def test_dependencies_still_run(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT=transport)
    reply = post(app, "/v1/completions", b"{}", {"content-type": "text/json"})
    assert reply.status == 422
    assert b"Unsupported Media Type" in reply.body


@pytest.mark.parametrize("transport", ["orjson", "msgpack"])
def test_the_documentation_stays(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT=transport)
    paths = app.openapi()["paths"]
    assert paths.pop("/baton/info").keys() == {"get"}
    assert paths == core().openapi()["paths"]


def test_json_leaves_the_routes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRANSPORT", "json")
    app = core()
    before = list(app.routes)
    BatonPlugin().attach_router(app)
    assert app.routes[:-OWN] == before


@pytest.mark.processes
def test_json_does_not_import_the_route_classes() -> None:
    script = (
        "import sys; from fastapi import FastAPI; from worker.plugin import BatonPlugin;"
        "BatonPlugin().attach_router(FastAPI());"
        "sys.exit(not sys.modules.keys().isdisjoint("
        "{'worker.msgpack_route', 'worker.msgpack_body', 'worker.token_ids', 'worker.streams', 'vllm'}))"
    )
    env = os.environ | {"BATON_TRANSPORT": "json"}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == 0


# --- streams --------------------------------------------------------------------------------------------


def test_a_connection_may_carry_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    app = worker(monkeypatch, BATON_STREAMS="mux")
    with serving(app) as server, server.connect() as mux:
        assert json.loads(mux.ask("GET", "/baton/info").body)["streams"] == ["http", "mux"]
        document = json.dumps(COMPLETION).encode()
        answer = mux.ask("POST", "/v1/completions", document, {"content-type": "application/json"})
        assert json.loads(answer.body) == ["tiny", [1, 2], len(document)]


def test_one_of_several_api_processes_announces_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(_api_process_count=2)
    monkeypatch.setattr(ENGINE.vllm_config, "parallel_config", parallel, raising=False)
    assert "streams" not in get(worker(monkeypatch, BATON_STREAMS="mux"), "/baton/info").json()


@pytest.mark.parametrize("streams", ["", "http"])
def test_by_default_a_connection_carries_one(monkeypatch: pytest.MonkeyPatch, streams: str) -> None:
    app = worker(monkeypatch, BATON_STREAMS=streams)
    assert "streams" not in get(app, "/baton/info").json()
    assert get(app, UPGRADE_PATH).status == 404


# --- token ids ------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
ASKS = json.dumps({"messages": [], "return_token_ids": True}).encode()
TAKEN = {"choices": [{"token_ids": None}], "seen": {"kv_transfer_params": None}}


def asking(form: str) -> dict[str, str]:
    return {"content-type": "application/json", "x-token-ids": form}


@pytest.mark.parametrize("transport", ["orjson", "msgpack"])
def test_a_chat_gives_its_ids_as_base64(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    reply = post(worker(monkeypatch, BATON_TRANSPORT=transport), CHAT, ASKS, asking("base64"))
    ids = base64.b64encode(pack([5, 6, 7])).decode()
    assert reply.json() == TAKEN | {"prompt_token_ids": ids}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-load"] == "1"


def test_a_chat_gives_its_ids_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = post(worker(monkeypatch, BATON_TRANSPORT="msgpack"), CHAT, ASKS, asking("bin"))
    assert msgspec.msgpack.decode(reply.body) == TAKEN | {"prompt_token_ids": pack([5, 6, 7])}
    assert reply.headers["content-type"] == "application/msgpack"
    assert reply.headers["content-length"] == str(len(reply.body))


@pytest.mark.parametrize(
    ("transport", "form"), [("json", "bin"), ("json", "base64"), ("orjson", "bin"), ("msgpack", "list")]
)
def test_all_else_is_vllms_own_answer(monkeypatch: pytest.MonkeyPatch, transport: str, form: str) -> None:
    reply = post(worker(monkeypatch, BATON_TRANSPORT=transport), CHAT, ASKS, asking(form))
    assert reply.json()["prompt_token_ids"] == [5, 6, 7]
    assert reply.json()["choices"] == [{"token_ids": [8]}]


def test_a_chat_takes_packed_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode({"messages": [], "kv_transfer_params": {"prompt_token_ids": pack([5, 6])}})
    reply = post(worker(monkeypatch, BATON_TRANSPORT="msgpack"), CHAT, body, MSGPACK)
    assert reply.json()["seen"] == {"kv_transfer_params": {"prompt_token_ids": [5, 6]}}


def test_ids_are_held_against_the_models_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode({"messages": [], "kv_transfer_params": {"prompt_token_ids": pack([VOCAB_SIZE])}})
    reply = post(worker(monkeypatch, BATON_TRANSPORT="msgpack"), CHAT, body, MSGPACK)
    assert reply.status == 400
    assert reply.json()["error"] == {
        "message": f"kv_transfer_params.prompt_token_ids: token id {VOCAB_SIZE} is out of vocabulary",
        "type": "Bad Request",
        "param": "kv_transfer_params.prompt_token_ids",
        "code": 400,
    }


def test_a_server_without_limits_takes_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT="msgpack")
    del app.state.baton_token_limits
    body = encode({"messages": [], "kv_transfer_params": {"prompt_token_ids": pack([5, 6])}})
    reply = post(app, CHAT, body, MSGPACK)
    assert reply.json()["error"]["message"].startswith("msgpack body refused: bytes")


def test_json_leaves_the_serving_objects_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT="json")
    assert vars(app.state.openai_serving_chat) == {}
    assert not hasattr(app.state, "baton_token_limits")


# --- the announcement -----------------------------------------------------------------------------------


def test_the_worker_announces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    app = worker(monkeypatch, BATON_TRANSPORT="msgpack", BATON_ROLE="decode")
    reply = get(app, "/baton/info")
    assert reply.headers["content-type"] == "application/json"
    assert msgspec.json.decode(reply.body, type=WorkerInfo) == WorkerInfo(
        role="decode",
        model="tiny",
        decodes=["json", "msgpack"],
        engine="vllm",
        engine_version="0.32.0",
        block_size=128,
        kv_tokens=6400,
        dtype="bfloat16",
        connector="none",
        max_model_len=32768,
        token_ids=["list", "base64", "bin"],
    )


def events_config(**fields: Any) -> Namespace:
    made = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "t"}
    return Namespace(**({**made, "replay_endpoint": None} | fields))


def test_it_announces_where_kv_events_are_published() -> None:
    announced = KvEventsInfo("tcp://*:5557", None, "t")
    config = Namespace(kv_events_config=events_config())
    assert _kv_events(Namespace(), config) == announced
    bound = events_config(endpoint="tcp://10.0.0.1:40001", replay_endpoint="tcp://*:5")
    engine = Namespace(get_kv_event_sources=lambda: {0: bound})
    assert _kv_events(engine, config) == KvEventsInfo("tcp://10.0.0.1:40001", "tcp://*:5", "t")
    assert _kv_events(Namespace(get_kv_event_sources=dict), config) == announced


def test_without_kv_events_or_with_those_of_several_ranks_none_are_announced() -> None:
    for config in (None, events_config(publisher="null"), events_config(enable_kv_cache_events=False)):
        assert _kv_events(Namespace(), Namespace(kv_events_config=config)) is None
    assert _kv_events(Namespace(), Namespace()) is None
    ranks = {rank: events_config() for rank in range(2)}
    assert _kv_events(Namespace(get_kv_event_sources=lambda: ranks), Namespace()) is None


@pytest.mark.parametrize(("is_local", "engines"), [(False, 5), (True, 2)])
def test_the_worker_announces_its_data_parallel_engines(
    monkeypatch: pytest.MonkeyPatch, is_local: bool, engines: int
) -> None:
    """vLLM adds up the KV blocks of the engines of a server."""
    parallel = SimpleNamespace(data_parallel_size=5, data_parallel_size_local=2, local_engines_only=is_local)
    monkeypatch.setattr(ENGINE.vllm_config, "parallel_config", parallel, raising=False)
    info = get(worker(monkeypatch), "/baton/info").json()
    assert (info["data_parallel_size"], info["kv_tokens"]) == (engines, 6400 // engines)


def test_the_worker_announces_what_must_fit_for_a_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_NIXL_PROGRESS_DELAY_US", "250")
    config = ENGINE.vllm_config
    monkeypatch.setattr(config.model_config, "model", "org/" + "m" * 300, raising=False)
    monkeypatch.setattr(config.model_config, "revision", "0123abcd", raising=False)
    monkeypatch.setattr(config.cache_config, "cache_dtype", "fp8", raising=False)
    monkeypatch.setattr(config, "parallel_config", SimpleNamespace(tensor_parallel_size=2), raising=False)
    transfer = SimpleNamespace(kv_connector="NixlPullConnector")
    monkeypatch.setattr(config, "kv_transfer_config", transfer, raising=False)
    info = msgspec.json.decode(get(worker(monkeypatch), "/baton/info").body, type=WorkerInfo)
    assert (info.path, info.revision) == (("org/" + "m" * 300)[:256], "0123abcd")
    assert (info.kv_dtype, info.tp, info.connector) == ("fp8", 2, "NixlConnector")
    assert info.nixl_delay_us == 250


def test_by_default_it_parses_with_orjson_for_both_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    info = get(worker(monkeypatch), "/baton/info").json()
    assert info["role"] == "both"
    assert (info["decodes"], info["token_ids"]) == (["json", "orjson"], ["list", "base64"])


def test_a_server_without_an_engine_announces_nothing() -> None:
    app, plugin = core(), BatonPlugin()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, app.state, Namespace()))
    assert get(app, "/baton/info").status == 404


def test_json_is_always_among_the_encodings() -> None:
    assert [decodes(transport) for transport in ("json", "orjson", "msgpack")] == [
        ["json"],
        ["json", "orjson"],
        ["json", "msgpack"],
    ]


# --- the environment ------------------------------------------------------------------------------------


def test_empty_is_unset() -> None:
    assert transport_from_env({}) == transport_from_env({"BATON_TRANSPORT": ""}) == DEFAULT_TRANSPORT
    assert role_from_env({}) == role_from_env({"BATON_ROLE": ""}) == "both"
    assert zone_from_env({}) is zone_from_env({"BATON_ZONE": ""}) is None
    assert zone_from_env({"BATON_ZONE": "a"}) == "a"


def test_wrong_values_are_errors_that_list_the_right_ones() -> None:
    with pytest.raises(ValueError, match="BATON_TRANSPORT='xml' is none of json, orjson, msgpack"):
        transport_from_env({"BATON_TRANSPORT": "xml"})
    with pytest.raises(ValueError, match="BATON_ROLE='Prefill' is none of prefill, decode, both"):
        role_from_env({"BATON_ROLE": "Prefill"})


def test_a_wrong_environment_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRANSPORT", "xml")
    with pytest.raises(ValueError, match="BATON_TRANSPORT"):
        BatonPlugin().attach_router(FastAPI())
    monkeypatch.setenv("BATON_TRANSPORT", "json")
    monkeypatch.setenv("BATON_STREAMS", "yes")
    with pytest.raises(ValueError, match="BATON_STREAMS must be one of http, mux, not 'yes'"):
        BatonPlugin().attach_router(FastAPI())
