"""Baton's part of a vLLM worker is an endpoint plugin, loaded when `VLLM_PLUGINS` names `baton`.

It adds `GET /baton/info`, `GET /baton/ready` and `POST /v1/baton/end`, and gives vLLM's own JSON endpoints
the route class for `BATON_TRANSPORT` and, with it, packed token ids. With `json` vLLM's routes stay vLLM's,
and the route classes are not even imported. With `BATON_STREAMS=mux` a connection may carry many requests.
"""

from __future__ import annotations

import inspect
import os
from argparse import Namespace
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response, params, routing
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.routing import BaseRoute

from orchestrator.wire.compatibility import NO_CONNECTOR
from orchestrator.wire.info import (
    DEFAULT_STREAMS,
    MAX_LABEL,
    Encoding,
    KvEventsInfo,
    Role,
    Streams,
    WorkerInfo,
    streams_from_env,
)
from worker import ending, ready
from worker.info import (
    announced_streams,
    decodes,
    deployment_from_env,
    role_from_env,
    token_ids,
    transport_from_env,
    zone_from_env,
)
from worker.load import LoadMeter
from worker.nixl_thread import delay_from_env
from worker.revision import revision_of


class BatonPlugin:
    """vLLM calls `attach_router` when its own routes are in place, and `init_state` when its engine is up."""

    name = "baton"
    required_tasks: tuple[str, ...] | None = None  # every kind of server, embeddings too

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. Raises `ValueError`, which ends the server, for a wrong `BATON_TRANSPORT`,
        `BATON_ROLE` or `BATON_STREAMS`.
        """
        self._role = role_from_env()
        self._transport = transport_from_env()
        self._streams = streams_from_env(os.environ)
        if self._transport != "json":
            from worker.msgpack_route import route_class

            reroute(app, route_class(self._transport))
        app.add_api_route("/baton/info", _info, methods=["GET"])
        ready.add_routes(app)
        ending.add_route(app)
        if self._streams == "mux":
            from worker.streams import add_streams

            add_streams(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Announce the engine; `engine_client` is None on vLLM's render server, which is no worker and
        announces nothing.
        """
        if engine_client is None:
            return
        config = engine_client.vllm_config
        events = _kv_events(engine_client, config)
        announcement = _announcement(config, args, self._role, self._transport, events, self._streams)
        state.baton_info = msgspec.json.encode(announcement)
        ready.begin(state, engine_client, args, os.environ, _meter(engine_client, config, announcement))
        if ending.can_end(engine_client):
            ending.follow(engine_client)
            setattr(state, ending.ENGINE_KEY, engine_client)
        if self._transport != "json":
            _pack_token_ids(state, config.model_config)


async def _info(request: Request) -> Response:
    info = getattr(request.app.state, "baton_info", None)
    if info is None:
        raise HTTPException(404, "this server has no engine")
    return Response(info, media_type="application/json")


def _announcement(
    config: Any,
    args: Namespace,
    role: Role,
    transport: Encoding,
    events: KvEventsInfo | None = None,
    streams: Streams = DEFAULT_STREAMS,
) -> WorkerInfo:
    """Make the announcement of a `VllmConfig`. The model is the (first) name that requests give it."""
    model, transfer = config.model_config, getattr(config, "kv_transfer_config", None)
    return WorkerInfo(
        role=role,
        model=args.served_model_name[0] if args.served_model_name else args.model,
        decodes=decodes(transport),
        engine="vllm",
        engine_version=import_module("vllm").__version__,
        block_size=config.cache_config.block_size,
        kv_tokens=_kv_tokens(config.cache_config, _engines(config)),
        data_parallel_size=_engines(config),
        dtype=str(model.dtype).removeprefix("torch."),
        path=_label(getattr(model, "model", None)),
        revision=_label(_revision(model)),
        kv_dtype=_label(getattr(config.cache_config, "cache_dtype", None)),
        tp=getattr(getattr(config, "parallel_config", None), "tensor_parallel_size", None),
        connector=_connector(transfer),
        nixl_delay_us=None if transfer is None else delay_from_env(os.environ),
        max_model_len=model.max_model_len,
        token_ids=token_ids(transport),
        kv_events=events,
        kv_lease_s=_lease_s(transfer),
        zone=zone_from_env(),
        deployment=deployment_from_env(),
        # With several API processes all of a connection's requests would be those of one of them.
        streams=announced_streams(streams) if _api_processes(config) == 1 else [],
    )


def _meter(engine: Any, config: Any, announcement: WorkerInfo) -> LoadMeter:
    figures = ready.EngineFigures(engine, config, announcement.data_parallel_size)
    return LoadMeter(figures, announcement.revision, is_whole=_api_processes(config) == 1)


def _api_processes(config: Any) -> int:
    count: int = getattr(getattr(config, "parallel_config", None), "_api_process_count", 1)
    return count


def _label(value: object) -> str | None:
    return None if value is None else str(value)[:MAX_LABEL]


def _revision(model: Any) -> str | None:
    """Return the revision of a `ModelConfig`, in which vLLM has resolved the name of a branch."""
    path, given = getattr(model, "model", None), getattr(model, "revision", None)
    return given if path is None else revision_of(str(path), given)


# The names of one connector: the first is what vLLM (0.32) calls it besides.
_SAME_CONNECTOR = {"NixlPullConnector": "NixlConnector"}


def _connector(transfer: Any) -> str:
    name = str(getattr(transfer, "kv_connector", None) or NO_CONNECTOR)
    return _SAME_CONNECTOR.get(name, name)


def _kv_tokens(cache: Any, engines: int | None) -> int | None:
    """Return how many tokens fit into the KV cache of one engine; they know it once they have started.

    vLLM (0.32) adds up the blocks of the engines that a server has.
    """
    blocks = getattr(cache, "num_gpu_blocks", None)
    return blocks * cache.block_size // (engines or 1) if blocks and cache.block_size else None


def _engines(config: Any) -> int | None:
    """Return how many data-parallel engines a request to this server can name, as vLLM (0.32) has it."""
    parallel = getattr(config, "parallel_config", None)
    if parallel is None:
        return None
    is_local = getattr(parallel, "local_engines_only", False)
    engines = getattr(parallel, "data_parallel_size_local" if is_local else "data_parallel_size", None)
    return None if engines is None else max(1, int(engines))


def _kv_events(engine: Any, config: Any) -> KvEventsInfo | None:
    """Return where the engine publishes its KV events; None if it does not, or if several ranks do, each of
    them for a cache of its own.
    """
    sources: dict[int, Any] = getattr(engine, "get_kv_event_sources", dict)()
    sources = sources or {0: getattr(config, "kv_events_config", None)}
    found = next(iter(sources.values()))
    if len(sources) > 1 or found is None or not found.enable_kv_cache_events or found.publisher != "zmq":
        return None
    return KvEventsInfo(found.endpoint, found.replay_endpoint, found.topic)


def _lease_s(transfer: Any) -> float | None:
    """Return for how long NIXL keeps blocks that nobody pulls, by vLLM's config (0.32); None without NIXL."""
    if transfer is None or transfer.kv_connector != "NixlConnector":
        return None
    return float(transfer.get_from_extra_config("kv_lease_duration", _NIXL_LEASE_S))


_NIXL_LEASE_S = 30  # vLLM's own default

# Where vLLM's state has its serving objects, and the methods that make an answer before it is JSON.
_CREATES = (
    ("openai_serving_chat", "create_chat_completion"),
    ("openai_serving_completion", "create_completion"),
)


def _pack_token_ids(state: State, model: Any) -> None:
    from worker.token_ids import LIMITS_KEY, Limits, packing

    setattr(state, LIMITS_KEY, Limits(model.get_vocab_size(), model.max_model_len))
    for name, method in _CREATES:
        serving = getattr(state, name, None)
        if serving is not None:  # a worker for embeddings has none
            setattr(serving, method, packing(getattr(serving, method)))


# --- another class for routes that exist ----------------------------------------------------------------


def reroute(app: FastAPI, route_class: type[APIRoute]) -> None:
    """Let `route_class` serve the POST endpoints of `app` that declare a JSON body.

    Endpoints, dependencies and documentation stay as they are. Routes that already have a class of their own
    are left alone. Call it before the app serves.
    """
    app.router.routes[:] = [new for old in app.routes for new in _rerouted(old, route_class)]


def _rerouted(old: BaseRoute, route_class: type[APIRoute]) -> list[BaseRoute]:
    """Return what takes the place of one entry, which is a route or, since FastAPI 0.137, may be a whole
    router.

    A router stays, behind the routes that now answer first, and goes on documenting them.
    """
    if isinstance(old, APIRoute):
        return [_in_class(route_class, old) if _takes_json(old) else old]
    contexts = [context for context in _contexts(old) if _takes_json(context)]
    return [*(_in_class(route_class, context, include_in_schema=False) for context in contexts), old]


def _contexts(entry: BaseRoute) -> Iterable[Any]:
    """Return the endpoints in a router, as FastAPI's views of them, with the attributes of an `APIRoute`."""
    iter_route_contexts = getattr(routing, "iter_route_contexts", None)
    return [] if iter_route_contexts is None else iter_route_contexts([entry])


def _takes_json(route: Any) -> bool:
    original = getattr(route, "original_route", route)
    if type(original) is not APIRoute or "POST" not in route.methods or route.body_field is None:
        return False
    return not isinstance(route.body_field.field_info, params.Form)


def _in_class(route_class: type[APIRoute], route: Any, **changes: Any) -> APIRoute:
    """Make a new route from what the constructor of the old one was given: its attributes by those names."""
    names = list(inspect.signature(APIRoute.__init__).parameters)[1:]
    return route_class(**{name: getattr(route, name) for name in names if hasattr(route, name)} | changes)
