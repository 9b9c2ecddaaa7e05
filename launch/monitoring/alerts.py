"""Alerts say when somebody has to look, and what to do then; they become a file of Prometheus' rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from orchestrator.telemetry import catalog
from orchestrator.telemetry.catalog import METRICS, Metric

HEAD: Final = "# Made by `baton metrics alerts`. What each means and what to do: docs/metrics.md.\n"
DOCS: Final = "docs/metrics.md"
_DAY_S: Final = 86400


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert fires once its expression has had a result for `wait`."""

    name: str
    expression: str
    wait: str  # as PromQL writes durations
    severity: str  # "critical": users are harmed now; "warning": somebody should look today
    summary: str  # one line, with the labels of the series
    meaning: str
    action: str

    @property
    def anchor(self) -> str:
        """Return where the documentation tells of it."""
        return f"{DOCS}#{self.name.lower()}"

    def metrics(self) -> Iterator[Metric]:
        """Yield the metrics that it looks at."""
        words = frozenset(re.findall(r"baton_\w+", self.expression))
        for metric in METRICS:
            names = {metric.name, *(f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))}
            if not words.isdisjoint(names):
                yield metric


def _share(part: str, whole: str, without: str) -> str:
    return f"sum without ({without}) ({part}) / sum without ({without}) ({whole})"


def _rate(metric: Metric, labels: str = "") -> str:
    return f"rate({metric.name}{labels}[5m])"


_FAILED: Final = _rate(catalog.REQUESTS, '{code=~"5.."}')
_RECOMPUTED: Final = _rate(catalog.KV_TRANSFERS, '{outcome="recomputed"}')
_HANDED_OVER: Final = _rate(catalog.KV_TRANSFERS, '{outcome=~"transferred|recomputed"}')
_EXPIRED: Final = _rate(catalog.KV_LEASES_ENDED, '{state="expired"}')
_LAG: Final = catalog.LOOP_LAG.name
_LAG_SEEN: Final = f'{_LAG}_bucket{{le="0.25"}}'
_WORKER: Final = "{{ $labels.worker }}"
_POOL: Final = "{{ $labels.model }}/{{ $labels.role }}"
_HERE: Final = "{{ $labels.instance }}"

ALERTS: Final = (
    Alert(
        "BatonOrchestratorDown",
        f"count_over_time({catalog.HELD_BYTES.name}[15m]) unless {catalog.HELD_BYTES.name}",
        "1m",
        "critical",
        f"the orchestrator at {_HERE} gives no metrics",
        "An orchestrator that gave metrics in the last quarter of an hour gives none.",
        "Look whether it runs, and in its log. `baton up` starts it again by itself; if it only refuses "
        "Prometheus (401, 403), the key lacks the scope `metrics`.",
    ),
    Alert(
        "BatonPoolEmpty",
        f'sum without (state) ({catalog.WORKERS.name}{{state=~"ready|suspect|probing"}}) == 0',
        "30s",
        "critical",
        f"no worker of {_POOL} serves",
        "A pool has no worker left. Without decode workers requests are answered 503; without prefill "
        "workers decode workers do everything, unless `routing.disaggregate` forbids it.",
        "See `/admin/workers` for the state of each worker and its last error. Start workers, or undrain "
        "them.",
    ),
    Alert(
        "BatonWorkerDown",
        f'{catalog.WORKER_STATE.name}{{state=~"gone|ejected|unfit"}} == 1',
        "1m",
        "warning",
        f"{_WORKER} is {{{{ $labels.state }}}}",
        "A worker takes no requests: nobody listens there (gone), it answers no probes or fails requests "
        "(ejected), or it is another model or wants another key (unfit).",
        "Its last error is in `/admin/workers` and in the orchestrator's log; look into the worker's own "
        "log. It is taken back without help once a probe is answered.",
    ),
    Alert(
        "BatonWorkerRestarts",
        f"increase({catalog.WORKER_RESTARTS.name}[15m]) > 2",
        "0m",
        "warning",
        f"{_WORKER} ends again and again",
        "A worker has come back more than twice in a quarter of an hour.",
        "Its log says what ended it: memory, a GPU, a request that it cannot take (see BatonPoisonRequests).",
    ),
    Alert(
        "BatonWorkerSlow",
        f"{catalog.WORKER_SLOW.name} == 1",
        "2m",
        "warning",
        f"{_WORKER} is far slower than its peers",
        "The median of a worker's times is four times that of its pool.",
        "Look at its machine: clocks of the GPU, other programs, the network. Drain it "
        "(`/admin/workers/NAME/drain`), or have `health.slow_outlier: eject` do so.",
    ),
    Alert(
        "BatonWorkerFailing",
        f"{_rate(catalog.WORKER_ERRORS)} / ({_rate(catalog.WORKER_ERRORS)} + "
        f"{_rate(catalog.WORKER_REQUESTS)}) > 0.05",
        "5m",
        "warning",
        f"{_WORKER} fails more than 5 % of its requests",
        "Other workers, or clients, bear the failures of one worker.",
        "The access log names what it did (`failed=`, docs/operating.md). Drain it while you look.",
    ),
    Alert(
        "BatonErrors",
        f"{_share(_FAILED, _rate(catalog.REQUESTS), 'model, endpoint, code')} > 0.05",
        "5m",
        "critical",
        f"more than 5 % of the requests to {_HERE} are answered with an error of ours",
        "More than one request in twenty is answered with a 5xx.",
        f"`{catalog.ERRORS.name}` says which errors these are, by code; the access log has the workers of "
        "each.",
    ),
    Alert(
        "BatonTimeToFirstToken",
        f"histogram_quantile(0.99, {_rate(catalog.FIRST_TOKEN, '_bucket')}) > 10",
        "10m",
        "warning",
        "the first token of {{ $labels.model }} takes more than 10 s",
        "One stream in a hundred begins later than after 10 s. Set the limit to what your users expect.",
        f"`{catalog.STAGE.name}` says where the time goes: queue (too few decode seats), prefill (too few "
        "or slow prefill workers), decode_first_byte (the hand-off, or full decode engines).",
    ),
    Alert(
        "BatonRequestsRejected",
        f"sum without (reason) ({_rate(catalog.REJECTED)}) > 0",
        "5m",
        "warning",
        f"requests to {_HERE} are turned away",
        "For five minutes requests have been answered 429 or 503 before any work on them.",
        "queue_full, too_late and waited: more load than seats, so add decode workers, or limit who floods "
        "(the access log has `client=`); memory: `limits.max_held_bytes` is reached.",
    ),
    Alert(
        "BatonSeatsSaturated",
        f"sum without (worker) ({catalog.WORKER_IN_FLIGHT.name}) / sum without (worker) "
        f"({catalog.WORKER_SEATS.name}) > 0.95",
        "10m",
        "warning",
        f"the seats of {_POOL} are all taken",
        "More than 95 % of a pool's seats have been in use for ten minutes: requests wait, or soon will.",
        "Add workers. If the engines have room, `seats` may be too low: it should be their `--max-num-seqs`.",
    ),
    Alert(
        "BatonKvTransferFailing",
        f"{_share(_RECOMPUTED, _HANDED_OVER, 'outcome')} > 0.1",
        "5m",
        "warning",
        f"decode workers of {_HERE} compute KV caches again",
        "More than a tenth of the KV caches that were handed over were computed again by the decode "
        "worker: answers are right, but prefill workers work for nothing.",
        "Run `baton doctor CONFIG`: it makes real hand-offs. Look for NIXL in the logs of both workers.",
    ),
    Alert(
        "BatonKvLeasesExpired",
        f"{_share(_EXPIRED, _rate(catalog.KV_LEASES_ENDED), 'state')} > 0.01",
        "5m",
        "warning",
        f"KV leases of {_HERE} expire",
        "More than one finished prefill in a hundred was neither pulled nor released, so its blocks were "
        "pinned until the lease ran out.",
        "Lost decode workers leave leases behind; without any, look whether workers have Baton's plugin "
        "(`/admin/workers`: `info`), and whether decode workers take their legs in time.",
    ),
    Alert(
        "BatonKvLeasesLeaked",
        f"increase({catalog.KV_LEASES_LEAKED.name}[1h]) > 0",
        "0m",
        "warning",
        f"the orchestrator at {_HERE} has lost track of a KV lease",
        "A finished prefill was looked after by nobody: a mistake in Baton.",
        "Nothing is in danger, as the lease ends by itself. Report it with the log of that hour.",
    ),
    Alert(
        "BatonHandoffsGivenUp",
        f"sum without (reason) ({_rate(catalog.HANDOFFS_GIVEN_UP)}) > 0",
        "5m",
        "warning",
        f"hand-offs of {_HERE} are given up",
        "Decode workers have had hand-offs for so long that prefill ran again.",
        "late: decode workers queue for longer than a lease, so lower `seats` or add workers; stalled: "
        "look at the decode worker's log, the transfer may hang.",
    ),
    Alert(
        "BatonPrefixPredictionDrift",
        f"{catalog.PREFIX_TRUSTED.name} == 0",
        "10m",
        "warning",
        f"what {_WORKER} has cached is not what routing expects",
        "The predicted contents of a prefix cache have been wrong for so long that routing does without "
        "them.",
        "Engines evict more than routing reckons with. With the policy `kv_events` they tell what they "
        "evict (docs/routing.md).",
    ),
    Alert(
        "BatonKvEventsMissed",
        f"{catalog.KV_EVENTS_FOLLOWED.name} == 0",
        "5m",
        "warning",
        f"KV events of {_WORKER} are missing",
        "Routing goes by what was sent to a worker, as not all of its KV events are known.",
        f"`{catalog.KV_EVENTS.name}` says what is wrong; the endpoint of the events must be reachable from "
        "every orchestrator (docs/routing.md).",
    ),
    Alert(
        "BatonPoisonRequests",
        f"increase({catalog.POISON.name}[15m]) > 0",
        "0m",
        "warning",
        f"a request to {_HERE} ends workers",
        "A request was given up because two workers were lost with it.",
        "The log names it (docs/reliability.md, Poison). Keep it from being sent again.",
    ),
    Alert(
        "BatonEventLoopStalls",
        f"increase({_LAG}_count[5m]) - ignoring (le) increase({_LAG_SEEN}[5m]) > 2",
        "0m",
        "warning",
        f"the event loop of {_HERE} stands still",
        "What was due came more than 0.25 s late, more than twice in five minutes: all requests of a "
        "process waited.",
        "The log says whether code held it up, and which, or whether the machine gave the process no CPU. "
        "More `orchestrator.processes` help with load.",
    ),
    Alert(
        "BatonProcessDied",
        f'increase({catalog.PROCESS_ENDS.name}{{reason="died"}}[15m]) > 0',
        "0m",
        "critical",
        f"a process of the orchestrator at {_HERE} has died",
        "A process that served requests ended without being asked to; its requests were cut, another one "
        "serves.",
        "The supervisor's log says how it ended: a signal, or out of memory (`dmesg`).",
    ),
    Alert(
        "BatonDiscoveryAway",
        f"{catalog.DISCOVERY_AGE.name} > 120",
        "1m",
        "warning",
        f"workers of {_POOL} are not found any more",
        "A source of workers has told nothing for two minutes. Those that it found stay for as long as they "
        "answer probes; new ones are not found.",
        "`/admin/discovery` and the log say why it cannot be asked; `baton discover CONFIG` asks it from "
        "where you are (docs/discovery.md).",
    ),
    Alert(
        "BatonLogLinesLost",
        f"increase({catalog.LOG_LOST.name}[10m]) > 0",
        "0m",
        "warning",
        f"the orchestrator at {_HERE} loses lines of its log",
        "The disk of the log is full, or nobody reads the log's pipe.",
        "Make room: `launch.log_files`, `keep_runs` and `keep_mb` bound what logs take (docs/operating.md).",
    ),
    Alert(
        "BatonConfigRefused",
        f'increase({catalog.RELOADS.name}{{outcome="refused"}}[15m]) > 0',
        "0m",
        "warning",
        f"the orchestrator at {_HERE} has refused its config",
        "A reload found mistakes, so what was before still holds; the next start would fail.",
        "`baton check CONFIG` names all mistakes, and so does the log.",
    ),
    Alert(
        "BatonCertificateExpires",
        f"{catalog.CERTIFICATE.name} - time() < {14 * _DAY_S}",
        "1h",
        "warning",
        f"the TLS certificate of {_HERE} expires within 14 days",
        "Clients will refuse the connection once it has expired.",
        "Put a new one in its place (`orchestrator.tls`), and reload: SIGHUP, or POST `/admin/reload`.",
    ),
    Alert(
        "BatonCertificateExpired",
        f"{catalog.CERTIFICATE.name} - time() < {_DAY_S}",
        "0m",
        "critical",
        f"the TLS certificate of {_HERE} expires within a day, or has expired",
        "Clients refuse the connection, or will within a day.",
        "The same, now.",
    ),
)


def rules() -> str:
    """Return the alerts as YAML, for `rule_files` of Prometheus."""
    groups = {"groups": [{"name": "baton", "rules": [_rule(alert) for alert in ALERTS]}]}
    return HEAD + yaml.safe_dump(groups, sort_keys=False, width=110, allow_unicode=True)


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": f"{alert.meaning} {alert.action}",
            "runbook": alert.anchor,
        },
    }
