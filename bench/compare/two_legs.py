"""What the plain two-leg proxies have in common: the bodies of the legs, and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

PATHS = ["/v1/chat/completions", "/v1/completions"]

KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefill_leg(body: dict[str, Any]) -> dict[str, Any]:
    leg = body | {"stream": False, "max_tokens": 1, "kv_transfer_params": KEEP_KV}
    leg.pop("stream_options", None)
    return leg


def decode_leg(body: dict[str, Any], prefill_answer: dict[str, Any]) -> dict[str, Any]:
    return body | {"kv_transfer_params": prefill_answer["kv_transfer_params"]}


def serve(proxy: Callable[[str, str], FastAPI], description: str | None) -> None:
    """Run the proxy between the two workers that the command line names."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True)
    parser.add_argument("--decode", required=True)
    arguments = parser.parse_args()
    app = proxy(arguments.prefill, arguments.decode)
    uvicorn.run(app, port=arguments.port, log_level="warning", access_log=False, backlog=4096)
