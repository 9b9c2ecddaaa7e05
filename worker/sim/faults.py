"""A simulated worker commits faults on request, at start or while it runs.

Where a fault strikes is `at_token`: null, the default, is before the answer's head; k is after k tokens of a
stream, in the middle of the body of any other answer; -1 is after the last token, before the usage event and
`[DONE]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import msgspec

Leg = Literal["prefill", "decode", "aggregated", "health"]


class _Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    leg: Leg | Literal["any"] = "any"  # any: every leg, but not the health probe
    count: int | None = None  # strikes this often, then never again
    probability: float = 1.0

    def matches(self, leg: Leg) -> bool:
        return self.leg == leg or (self.leg == "any" and leg != "health")


class _Placed(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True):
    at_token: int | None = None


class Refuse(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refuse"):
    """It strikes at once: for `seconds` nobody listens on the port, and all other connections are reset."""

    seconds: float = 1.0


class Rekey(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="rekey"):
    """It strikes at once: from now on everything under `/v1` needs one of these keys; with none, no key."""

    keys: tuple[str, ...] = ()


class Freeze(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="freeze"):
    """It strikes at once: for `seconds`, null for ever, the whole engine stands still, while its server takes
    requests and answers probes. Taking all faults back wakes it.
    """

    seconds: float | None = None


class Die(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="die"):
    """The process kills itself (SIGKILL) when it gets a request that contains this text."""

    contains: str = ""


class Error(_Placed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="error"):
    """The answer is an HTTP status; in a stream that has begun, an error event and `[DONE]`."""

    status: int = 500
    message: str = "injected fault"
    retry_after: int | None = None


class Stall(_Placed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stall"):
    """The answer is silent for `seconds`, null for ever; then it goes on."""

    seconds: float | None = None


class Reset(_Placed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="reset"):
    """The connection is reset (RST); of one that carries many requests, the stream, or with `connection` all
    of it.
    """

    connection: bool = False


class Truncate(_Placed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="truncate"):
    """The answer ends early. With `clean` it ends in whole framing; otherwise that is cut too."""

    clean: bool = True


class Garbage(_Placed, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="garbage"):
    """Instead of a head, bytes come that are neither HTTP nor frames, and the connection ends, with all that
    it carries; or, in a body, bytes that are not JSON.
    """


class KvLost(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kv_lost"):
    """The hand-off fails: a prefill leg's pins cannot be pulled, a decode leg's pull fails."""


class KvGarbled(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kv_garbled"):
    """A KV cache that is pulled arrives, but it is not what was sent: the answer is other text."""


class Slow(_Fault, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="slow"):
    """The request takes `factor` times what the latency model says, and `seconds` more before the first
    token.
    """

    factor: float = 1.0
    seconds: float = 0.0


Fault = Refuse | Rekey | Freeze | Die | Error | Stall | Reset | Truncate | Garbage | KvLost | KvGarbled | Slow
Placed = Error | Stall | Reset | Truncate | Garbage
AT_ONCE = (Refuse, Rekey, Freeze)  # these do not wait for a request


class Armed:
    """A fault waits for requests to strike."""

    __slots__ = ("fault", "left", "struck")

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.left = fault.count
        self.struck = 0

    def strikes(self, leg: Leg, random: Random) -> bool:
        """Tell whether it strikes a request that comes now; if so, that is counted."""
        if self.left == 0 or not self.fault.matches(leg):
            return False
        if self.fault.probability < 1.0 and random.random() >= self.fault.probability:
            return False
        self.struck += 1
        if self.left is not None:
            self.left -= 1
        return True


class Plan:
    """These faults strike one request."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._placed = [fault for fault in faults if isinstance(fault, Placed)]
        self.deadly = [fault.contains for fault in faults if isinstance(fault, Die)]
        self.kv_lost = any(isinstance(fault, KvLost) for fault in faults)
        self.kv_garbled = any(isinstance(fault, KvGarbled) for fault in faults)
        slow = [fault for fault in faults if isinstance(fault, Slow)]
        self.slow_factor = max((fault.factor for fault in slow), default=1.0)
        self.slow_s = sum(fault.seconds for fault in slow)

    def at_head(self) -> list[Placed]:
        return [fault for fault in self._placed if fault.at_token is None]

    def in_body(self) -> list[Placed]:
        return [fault for fault in self._placed if fault.at_token is not None]

    def after_tokens(self, tokens: int) -> list[Placed]:
        """Return what strikes a stream when this many tokens have been sent; -1 stands for all."""
        return [fault for fault in self._placed if fault.at_token == tokens]


class FaultBox:
    """It has all faults of a worker. `random` decides on those with a probability."""

    def __init__(self, faults: Sequence[Fault], random: Random) -> None:
        self._armed = [Armed(fault) for fault in faults]
        self._random = random

    def add(self, faults: Sequence[Fault]) -> None:
        self._armed += map(Armed, faults)

    def clear(self) -> None:
        self._armed.clear()

    def draw(self, leg: Leg) -> Plan:
        return Plan([armed.fault for armed in self._armed if armed.strikes(leg, self._random)])

    def describe(self) -> list[dict[str, object]]:
        return [
            {**msgspec.to_builtins(armed.fault), "left": armed.left, "struck": armed.struck}
            for armed in self._armed
        ]


def parse(content: bytes | str) -> list[Fault]:
    """Read one fault or a list, as JSON: `{"kind": "stall", "at_token": 3}`. Raises `MsgspecError`."""
    found: Fault | list[Fault] = msgspec.json.decode(content, type=Fault | list[Fault])
    return found if isinstance(found, list) else [found]
