"""Each router of a comparison is started between a prefill and a decode worker."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from bench.shared.baton import config, urls
from bench.shared.processes import ROOT, free_port, python
from bench.shared.record import versions as installed
from orchestrator.form import FORM_ENV, BadBuild, build_folder, built
from orchestrator.wire.info import STREAMS_ENV, TRANSPORT_ENV, Encoding, Streams

PEERS = ROOT / ".venv-bench-peers"


@dataclass(frozen=True)
class Site:
    """A router is to stand here: it listens on 127.0.0.1:`port` and may write into `folder`."""

    port: int
    prefill: int
    decode: int
    folder: Path

    @property
    def prefill_url(self) -> str:
        return f"http://127.0.0.1:{self.prefill}"

    @property
    def decode_url(self) -> str:
        return f"http://127.0.0.1:{self.decode}"


def _present() -> None:
    return None


@dataclass(frozen=True)
class Router:
    """`command` may write configuration files first. `lacks` says what is missing here, or None."""

    name: str
    command: Callable[[Site], list[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    lacks: Callable[[], str | None] = _present


def baton_config(port: int, prefill: int, decode: int, processes: int = 1) -> dict[str, Any]:
    """Return Baton's config between workers on these ports."""
    pools = {"prefill": urls(prefill), "decode": {**urls(decode), "seats": 4096}}
    return config(port, pools, processes=processes)


def _baton(
    name: str,
    transport: Encoding = "json",
    processes: int = 1,
    form: str = "pure",
    streams: Streams = "http",
) -> Router:
    def command(site: Site) -> list[str]:
        path = site.folder / "baton.yaml"
        path.write_text(json.dumps(baton_config(site.port, site.prefill, site.decode, processes)))
        return python("-P", "-m", "launch.cli", "orchestrator", str(path))

    env = {TRANSPORT_ENV: transport, STREAMS_ENV: streams, "PYTHONPATH": str(ROOT), FORM_ENV: form}
    return Router(name, command, env, _lacks_build if form == "compiled" else _present)


def _lacks_build() -> str | None:
    try:
        built(build_folder(os.environ))
    except BadBuild as error:
        return f"{error} (make bench builds it)"
    return None


def _vllm_router(site: Site) -> list[str]:
    return [
        *(str(PEERS / "bin/vllm-router"), "--vllm-pd-disaggregation"),
        *_peer_options(site),
    ]


def _sglang_router(site: Site) -> list[str]:
    return [
        *(str(PEERS / "bin/python"), "-m", "sglang_router.launch_router", "--pd-disaggregation"),
        *_peer_options(site),
        *("--max-payload-size", str(512 * 1024**2)),
    ]


def _peer_options(site: Site) -> list[str]:
    return [
        *("--host", "127.0.0.1", "--port", str(site.port), "--prometheus-port", str(free_port())),
        *("--prefill", site.prefill_url, "--decode", site.decode_url, "--policy", "round_robin"),
        *("--max-concurrent-requests", "4096"),
    ]


def _peer(name: str, command: Callable[[Site], list[str]]) -> Router:
    def lacks() -> str | None:
        return None if peer_version(name) else f"{name} is not in {PEERS.name} (make bench installs it)"

    return Router(name, command, lacks=lacks)


def peer_version(name: str) -> str | None:
    folders = [str(folder) for folder in PEERS.glob("lib/python*/site-packages")]
    return next((found.version for found in distributions(name=name, path=folders)), None)


def _proxy(client: str) -> Router:
    def command(site: Site) -> list[str]:
        workers = ("--prefill", site.prefill_url, "--decode", site.decode_url)
        return python("-m", "bench.compare.proxy", client, "--port", str(site.port), *workers)

    return Router(f"{client}-proxy", command)


# One hop to the decode worker, buffering the request body in memory and the answer not at all.
NGINX_CONFIG = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
{user}
events {{ worker_connections 16384; }}
http {{
    access_log off;
    client_max_body_size 64m;
    client_body_buffer_size 4m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    upstream decode {{
        server 127.0.0.1:{decode};
        keepalive 256;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://decode;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""


def _nginx(site: Site) -> list[str]:
    # Started by root it would change to another user, who may not write into our folder.
    user = f"user {getpass.getuser()};" if os.getuid() == 0 else ""
    path = site.folder / "nginx.conf"
    path.write_text(NGINX_CONFIG.format(folder=site.folder, user=user, port=site.port, decode=site.decode))
    return [_nginx_program() or "nginx", "-c", str(path), "-p", str(site.folder), "-e", "stderr"]


def _nginx_program() -> str | None:
    """Debian keeps it where only root's PATH looks."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def _lacks_nginx() -> str | None:
    return None if _nginx_program() else "nginx is not installed (Debian: apt-get install nginx-light)"


ROUTERS = [
    _baton("baton"),
    _baton("baton-mux", streams="mux"),
    _baton("baton-compiled", form="compiled"),
    _baton("baton-mux-compiled", form="compiled", streams="mux"),
    _baton("baton-orjson", transport="orjson"),
    _baton("baton-msgpack", transport="msgpack"),
    _baton("baton-2-processes", processes=2),
    _peer("vllm-router", _vllm_router),
    _peer("sglang-router", _sglang_router),
    _proxy("aiohttp"),
    _proxy("httpx"),
    Router("nginx", _nginx, lacks=_lacks_nginx),
]


def versions() -> dict[str, str]:
    """Return the versions of all that takes part, as far as it is here."""
    ours = ["baton-serve", "uvicorn", "uvloop", "httptools", "fastapi", "aiohttp", "httpx"]
    return {**installed(ours), **dict(_others())}


def _others() -> Iterator[tuple[str, str]]:
    for peer in ("vllm-router", "sglang-router"):
        if found := peer_version(peer):
            yield peer, found
    for name, program in (("nginx", _nginx_program()), ("wrk", shutil.which("wrk"))):
        if program:
            said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
            yield name, (said.stdout + said.stderr).strip().splitlines()[0]
