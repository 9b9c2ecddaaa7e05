"""Whether one worker serves a request or two is decided here by what either way costs all users together.

    local  = (queue + own) * stretch + weight * own * active
    remote = wait + own * (1 + weight * queued) + transfer

One worker serves the request if `local < remote`. Both are in user-seconds: the seconds until the request
has its first token, and those that it costs the users of other requests, which count `WEIGHT` times as much.

| of | term | is | in | from |
|---|---|---|---|---|
| local | `queue` | prefills that a decode worker has before it | s | what was sent there, less elapsed |
| local | `own` | the prompt's prefill there, with what its cache has | s | expected tokens, learned rate |
| local | `stretch` | how much longer a prefill takes between decode steps | factor | `stretch` |
| local | `active` | requests that decode there, which it delays | requests | legs that have begun |
| remote | `wait` | legs that a prefill worker has before it | s | what was sent there, less elapsed |
| remote | `own` | the prompt's prefill there, with what its cache has | s | expected tokens, learned rate |
| remote | `queued` | requests that it delays | requests | mean legs per prefill worker, at most 4 |
| remote | `transfer` | the hand-off | s | learned of hand-offs (`links.py`) |

Nothing in it is a threshold of lengths, so it holds for any number of prefill workers per decode worker.
"""

from __future__ import annotations

from typing import Final

WEIGHT: Final = 0.5  # of other users' seconds

# A decode step of a 70B-class model on eight H100: fixed, per sequence, per token of KV cache.
STEP_S: Final = 0.028
STEP_SEQUENCE_S: Final = 0.0002
STEP_TOKEN_S: Final = 40e-9
CHUNK_S: Final = 0.184  # of prefill between two decode steps, at most: 2048 tokens


def stretch(own_s: float, active: float, kv_tokens: float) -> float:
    """Return how much longer a prefill takes on a worker that decodes for `active` requests: between two
    chunks of it there is a decode step of all.

    `own_s` are the seconds of the prefill at a rate of 1, `kv_tokens` those that the requests have in the KV
    cache. Prefill and decode of slower machines are slower alike, so the factor needs no rate.
    """
    if active <= 0.0 or own_s <= 0.0:
        return 1.0
    step_s = STEP_S + STEP_SEQUENCE_S * active + STEP_TOKEN_S * kv_tokens
    return 1.0 + step_s / min(own_s, CHUNK_S)


def local_cost(queue_s: float, own_s: float, stretched: float, active: float, weight: float) -> float:
    """Return the user-seconds of one worker; `stretched` is of `stretch`."""
    return (queue_s + own_s) * stretched + weight * own_s * active


def remote_cost(wait_s: float, own_s: float, queued: float, transfer_s: float, weight: float) -> float:
    """Return the user-seconds of two workers."""
    return wait_s + own_s * (1.0 + weight * queued) + transfer_s


class Local:
    """This is what one worker would cost."""

    __slots__ = ("active", "cached", "index", "own_s", "queue_s", "stretched")

    def __init__(
        self,
        index: int = 0,
        queue_s: float = 0.0,
        own_s: float = 0.0,
        stretched: float = 1.0,
        active: float = 0.0,
        cached: float = 0.0,
    ) -> None:
        """`index` is that of the worker among those that were looked at, `cached` are tokens."""
        self.index = index
        self.queue_s = queue_s
        self.own_s = own_s
        self.stretched = stretched
        self.active = active
        self.cached = cached

    @property
    def cost(self) -> float:
        return local_cost(self.queue_s, self.own_s, self.stretched, self.active, WEIGHT)

    def terms(self) -> dict[str, float]:
        return {
            "cost_user_s": self.cost,
            "queue_s": self.queue_s,
            "own_s": self.own_s,
            "stretch": self.stretched,
            "active": self.active,
            "cached_tokens": self.cached,
        }


class Remote:
    """This is what two workers would cost."""

    __slots__ = ("own_s", "queued", "transfer_s", "wait_s")

    def __init__(self, wait_s: float, own_s: float, queued: float, transfer_s: float) -> None:
        self.wait_s = wait_s
        self.own_s = own_s
        self.queued = queued
        self.transfer_s = transfer_s

    @property
    def cost(self) -> float:
        return remote_cost(self.wait_s, self.own_s, self.queued, self.transfer_s, WEIGHT)

    def terms(self) -> dict[str, float]:
        return {
            "cost_user_s": self.cost,
            "wait_s": self.wait_s,
            "own_s": self.own_s,
            "queued": self.queued,
            "transfer_s": self.transfer_s,
        }


class Verdict:
    """One worker serves a request, or two. `str` of it says why, with the numbers."""

    __slots__ = ("local", "remote")

    def __init__(self, local: Local, remote: Remote) -> None:
        self.local = local
        self.remote = remote

    @property
    def is_local(self) -> bool:
        return self.local.cost < self.remote.cost

    def __str__(self) -> str:
        one, two = self.local, self.remote
        which = "one worker costs less" if self.is_local else "two workers cost no more"
        return (
            f"{which}: {one.cost:.3f} user-seconds with one ({one.queue_s:.3f} s queue, {one.own_s:.3f} s "
            f"prefill, {one.stretched:.2f} times as long beside {one.active:.1f} that decode), "
            f"{two.cost:.3f} with two ({two.wait_s:.3f} s wait, {two.own_s:.3f} s prefill, "
            f"{two.queued:.1f} behind it, {two.transfer_s:.3f} s transfer)"
        )
