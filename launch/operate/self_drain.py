"""`baton drain --self` has the worker beside it ask for no new requests, for instance before its pod ends."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any, Final

from launch.exits import Exit
from launch.remote import Failed, Mistaken, say

if TYPE_CHECKING:
    import httpx

    from orchestrator.wire.load import LoadReport

POLL_S: Final = 0.2
ASK_S: Final = 10.0  # until the worker has answered once
# Blocks that were handed over are pulled within moments, or their lease ends: vLLM's own, and the sim's.
HANDED_OVER_S: Final = 30.0
KEY_VARIABLES: Final = ("BATON_WORKER_API_KEY", "VLLM_API_KEY")


def drain(arguments: argparse.Namespace) -> int:
    """Drain the worker, and wait until it is free if that is wanted. Raises `Failed`."""
    if arguments.names:
        raise Mistaken("--self means the worker at --url: leave its name out")
    from orchestrator.wire.load import DRAIN_PATH

    with _client(arguments.url) as client:
        report: LoadReport | None = _changed(client, DRAIN_PATH)
        if arguments.wait:
            report = _wait_free(client, arguments.timeout_s)
    _show(arguments, report)
    return Exit.OK


def undrain(arguments: argparse.Namespace) -> int:
    """Have the worker ask for requests again. Raises `Failed`."""
    if arguments.names:
        raise Mistaken("--self means the worker at --url: leave its name out")
    from orchestrator.wire.load import UNDRAIN_PATH

    with _client(arguments.url) as client:
        _show(arguments, _changed(client, UNDRAIN_PATH))
    return Exit.OK


def _client(url: str) -> httpx.Client:
    import httpx

    if not url.startswith(("http://", "https://")):
        raise Mistaken(f"--url: expected http://HOST:PORT, got {url!r}")
    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(base_url=url, headers=headers, timeout=ASK_S, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise Mistaken(f"--url: expected http://HOST:PORT, got {url!r}") from error


def _changed(client: httpx.Client, path: str) -> LoadReport:
    """Ask the worker for a change; return what it reports then. Raises `Failed`."""
    import httpx

    try:
        answer = client.post(path)
    except (httpx.HTTPError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise Failed(f"no worker answers at {client.base_url}: {error or type(error).__name__}") from error
    report = _read(answer) if answer.status_code == 202 else None
    if report is None:
        raise Failed(f"the worker at {client.base_url} cannot do that: {_why(answer)}")
    return report


def _why(answer: httpx.Response) -> str:
    match answer.status_code:
        case 404 | 405:
            return "it is not one with Baton's plugin (VLLM_PLUGINS=baton), or not a worker"
        case 401 | 403:
            return f"it wants its key: put it into {KEY_VARIABLES[0]}"
    return f"it answers {answer.status_code}: {answer.text[:300]}"


def _read(answer: httpx.Response) -> LoadReport | None:
    from msgspec import MsgspecError, json

    from orchestrator.wire.load import LoadReport

    try:
        return json.decode(answer.content, type=LoadReport)
    except (MsgspecError, ValueError):
        return None


def _wait_free(client: httpx.Client, timeout_s: float) -> LoadReport | None:
    """Return the last report, once it serves nobody and no orchestrator may send it more; None: it has ended.

    Blocks that it has handed over keep it, too, until they are pulled, or their lease is over. Raises
    `Failed`.
    """
    import httpx

    end, idle_since = time.monotonic() + timeout_s, float("inf")
    report = _asked(client)
    while time.monotonic() <= end:
        try:
            report = _asked(client)
        except httpx.HTTPError:
            return None
        idle_since = min(idle_since, time.monotonic()) if _is_idle(report) else float("inf")
        if _is_idle(report) and (_holds_nothing(report) or time.monotonic() >= idle_since + HANDED_OVER_S):
            return report
        time.sleep(POLL_S)
    raise Failed(f"{_left(report)} within {timeout_s:g} s; the worker stays drained")


def _is_idle(report: LoadReport | None) -> bool:
    return report is not None and not report.busy and not report.unaware


def _holds_nothing(report: LoadReport | None) -> bool:
    return report is not None and report.kv == 0.0


def _left(report: LoadReport | None) -> str:
    """Say what keeps it from ending."""
    from orchestrator.config.printing import counted

    if report is None:
        return "the worker did not report itself free"
    if report.busy:
        return f"{counted(report.busy, 'request')} did not end"
    if report.unaware:
        return f"{counted(report.unaware, 'orchestrator')} did not hear of it"
    return "blocks that it has handed over were not pulled"


def _asked(client: httpx.Client) -> LoadReport | None:
    """Return what the worker reports; None if it reports nothing, as when its engine is not well."""
    from orchestrator.wire.load import READY_PATH, read_report

    answer = client.get(READY_PATH)
    return read_report(answer.status_code, answer.content)


def _show(arguments: argparse.Namespace, report: LoadReport | None) -> None:
    if arguments.output == "json":
        import json

        print(json.dumps(_described(report), indent=2))
        return
    from orchestrator.config.printing import counted, one_line

    if report is None:
        say("the worker has ended meanwhile")
        return
    print(one_line(f"{arguments.url}: {report.state}, {counted(report.busy, 'request')}"))


def _described(report: LoadReport | None) -> dict[str, Any] | None:
    from msgspec import to_builtins

    described: dict[str, Any] | None = to_builtins(report)
    return described
