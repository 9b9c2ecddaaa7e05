"""Asks questions whose answers are known."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import httpx

from worker.sim.questions import Outcome, Question, judge, judge_part

# Nothing here speaks TLS, and loading the system's certificates takes longer than a request.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def ask(
    url: str, question: Question, patience_s: float, on_event: Callable[[], None] = lambda: None
) -> Outcome:
    """Ask on a connection of its own. Raises `WrongAnswer`.

    `patience_s` is how long to wait for each byte. `on_event` is called whenever some have come.
    """
    seen = b""
    try:
        with (
            httpx.Client(timeout=patience_s, trust_env=False, verify=NO_TLS) as client,
            client.stream("POST", url + question.path, json=question.body) as answer,
        ):
            for chunk in answer.iter_raw():
                seen += chunk
                on_event()
    except httpx.TimeoutException:
        return _unfinished(Outcome.GIVEN_UP, question, seen)
    except httpx.TransportError:
        return _unfinished(Outcome.CUT, question, seen)
    return judge(question, answer.status_code, seen.decode())


def _unfinished(outcome: Outcome, question: Question, seen: bytes) -> Outcome:
    judge_part(question, seen.decode(errors="replace"))
    return outcome
