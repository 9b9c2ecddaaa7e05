"""For each alert: series with which it fires, and with which it does not. A sample is taken every 15 s."""

from __future__ import annotations

from dataclasses import dataclass, field

HOST = {"instance": "h:8001", "job": "baton"}
WORKER = {**HOST, "model": "m", "role": "decode", "worker": "m/decode/0"}
POOL = {**HOST, "model": "m", "role": "decode"}
_HOUR = 240  # samples


@dataclass(frozen=True, slots=True)
class Case:
    """`firing` and `quiet` are samples by series; `at` is when the alert must fire, with these labels."""

    firing: dict[str, str]
    quiet: dict[str, str]
    at: str
    labels: dict[str, str] = field(default_factory=lambda: dict(HOST))
    before: str = ""  # when it must not fire yet, though the series are those of `firing`


def series(name: str, labels: dict[str, str], **more: str) -> str:
    words = ", ".join(f'{label}="{value}"' for label, value in sorted({**labels, **more}.items()))
    return f"{name}{{{words}}}"


def still(value: float) -> str:
    """A gauge that stays as it is, for an hour."""
    return f"{value:g}x{_HOUR}"


def grows(per_sample: float) -> str:
    return f"0+{per_sample:g}x{_HOUR}"


def _jumps(count: int) -> str:
    """A counter that grows at once, after five minutes."""
    return f"0x20 {count}x{_HOUR}"


def _counter(name: str, labels: dict[str, str] = HOST, at: str = "6m", **more: str) -> Case:
    """An alert of something that should not happen at all."""
    one = series(name, labels, **more)
    return Case({one: _jumps(3)}, {one: still(3)}, at, dict(labels), before="4m")


def _two(name: str, labels: dict[str, str], label: str, bad: str, good: str) -> tuple[str, str]:
    return series(name, labels, **{label: bad}), series(name, labels, **{label: good})


def _ratio(bad: str, good: str, at: str, labels: dict[str, str], before: str = "") -> Case:
    """A part that is too large, and one that is not."""
    return Case({bad: grows(3), good: grows(7)}, {bad: grows(0), good: grows(10)}, at, labels, before)


_STATE = [series("baton_worker_state", WORKER, state=state) for state in ("ejected", "ready", "draining")]
_WORKERS = [series("baton_workers", POOL, state=state) for state in ("ready", "gone")]
_SOURCE = {**POOL, "source": "kubernetes team/decode"}
_AGE = series("baton_discovery_age_seconds", _SOURCE)
_BUCKETS = [
    series("baton_time_to_first_token_seconds_bucket", HOST, model="m", le=le)
    for le in ("10.0", "30.0", "+Inf")
]
_LAG = [
    series("baton_event_loop_lag_seconds_bucket", HOST, le="0.25"),
    series("baton_event_loop_lag_seconds_count", HOST),
]
_NOT_AFTER = series("baton_tls_certificate_not_after_seconds", HOST)
_HELD = series("baton_held_bytes", HOST)
_IN_FLIGHT, _SEATS = series("baton_worker_in_flight", WORKER), series("baton_worker_seats", WORKER)
_SLOW = series("baton_worker_slow", WORKER)
_TRUSTED = series("baton_prefix_trusted", WORKER)
_FOLLOWED = series("baton_kv_events_followed", WORKER)
_REJECTED = series("baton_requests_rejected_total", HOST, reason="queue_full")
_GIVEN_UP = series("baton_handoffs_given_up_total", HOST, reason="late")
_DAY = 86400

CASES = {
    "BatonOrchestratorDown": Case({_HELD: "0x8 stale"}, {_HELD: still(0)}, "6m", before="2m"),
    "BatonPoolEmpty": Case(
        {_WORKERS[0]: "1x8 0x240", _WORKERS[1]: "1x240"},
        {_WORKERS[0]: still(1), _WORKERS[1]: still(1)},
        "4m",
        POOL,
        before="2m",
    ),
    "BatonWorkerDown": Case(
        {_STATE[0]: still(1), _STATE[1]: still(0)},
        {_STATE[0]: still(0), _STATE[2]: still(1)},
        "2m",
        {**WORKER, "state": "ejected"},
        before="30s",
    ),
    "BatonWorkerRestarts": Case(
        {series("baton_worker_restarts_total", WORKER): _jumps(5)},
        {series("baton_worker_restarts_total", WORKER): _jumps(1)},
        "10m",
        WORKER,
        before="4m",
    ),
    "BatonWorkerSlow": Case({_SLOW: still(1)}, {_SLOW: still(0)}, "3m", WORKER, before="1m"),
    "BatonWorkerFailing": _ratio(
        series("baton_worker_errors_total", WORKER),
        series("baton_worker_requests_total", WORKER),
        "8m",
        WORKER,
        before="4m",
    ),
    "BatonErrors": _ratio(
        *_two(
            "baton_requests_total",
            {**HOST, "model": "m", "endpoint": "/v1/completions"},
            "code",
            "503",
            "200",
        ),
        "8m",
        HOST,
        before="4m",
    ),
    "BatonTimeToFirstToken": Case(
        dict(zip(_BUCKETS, map(grows, (9, 10, 10)), strict=True)),
        dict(zip(_BUCKETS, map(grows, (10, 10, 10)), strict=True)),
        "15m",
        {**HOST, "model": "m"},
        before="8m",
    ),
    "BatonRequestsRejected": Case({_REJECTED: grows(1)}, {_REJECTED: still(7)}, "8m", before="3m"),
    "BatonSeatsSaturated": Case(
        {_IN_FLIGHT: still(8), _SEATS: still(8)},
        {_IN_FLIGHT: still(6), _SEATS: still(8)},
        "12m",
        POOL,
        before="8m",
    ),
    "BatonKvTransferFailing": _ratio(
        *_two("baton_kv_transfers_total", HOST, "outcome", "recomputed", "transferred"),
        "8m",
        HOST,
        before="4m",
    ),
    "BatonKvLeasesExpired": _ratio(
        *_two("baton_kv_leases_ended_total", HOST, "state", "expired", "consumed"), "8m", HOST, before="4m"
    ),
    "BatonKvLeasesLeaked": _counter("baton_kv_leases_leaked_total"),
    "BatonHandoffsGivenUp": Case({_GIVEN_UP: grows(1)}, {_GIVEN_UP: still(7)}, "8m", before="3m"),
    "BatonPrefixPredictionDrift": Case(
        {_TRUSTED: still(0)}, {_TRUSTED: still(1)}, "12m", WORKER, before="8m"
    ),
    "BatonKvEventsMissed": Case({_FOLLOWED: still(0)}, {_FOLLOWED: still(1)}, "7m", WORKER, before="4m"),
    "BatonPoisonRequests": _counter("baton_poison_requests_total"),
    "BatonEventLoopStalls": Case(
        {_LAG[0]: grows(149), _LAG[1]: grows(150)}, {_LAG[0]: grows(150), _LAG[1]: grows(150)}, "6m"
    ),
    "BatonProcessDied": _counter("baton_process_ends_total", {**HOST, "reason": "died"}),
    "BatonDiscoveryAway": Case({_AGE: "0+15x240"}, {_AGE: still(30)}, "4m", _SOURCE, before="2m"),
    "BatonLogLinesLost": _counter("baton_log_lines_lost_total"),
    "BatonConfigRefused": _counter("baton_config_reloads_total", {**HOST, "outcome": "refused"}),
    "BatonCertificateExpires": Case(
        {_NOT_AFTER: still(13 * _DAY)}, {_NOT_AFTER: still(15 * _DAY)}, "62m", before="50m"
    ),
    "BatonCertificateExpired": Case({_NOT_AFTER: still(3600)}, {_NOT_AFTER: still(2 * _DAY)}, "1m"),
}
