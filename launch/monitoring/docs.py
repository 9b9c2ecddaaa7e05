"""The page about metrics, docs/metrics.md, is made of the catalog and the alerts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.monitoring.alerts import ALERTS, Alert
from orchestrator.telemetry.catalog import METRICS, PROCESS_METRICS, UNKNOWN, Group, Metric

_HEAD = f"""\
# Metrics

<!-- Made by `baton metrics docs` of orchestrator/telemetry/catalog.py and launch/monitoring. -->

The admin listener answers `GET /metrics` in Prometheus' text format. All series are there before the first
request, but for percentiles of workers of which too little was seen; what clients send adds none. With an API
key file, Prometheus needs a key with the scope `metrics`:

```
scrape_configs:
  - job_name: baton
    authorization: {{credentials_file: /etc/prometheus/baton.key}}
    static_configs: [{{targets: ["127.0.0.1:8001"]}}]
rule_files: [/etc/prometheus/baton-alerts.yaml]
```

`baton metrics alerts` prints the rules, `baton metrics dashboard` a dashboard for Grafana ("Import", as
JSON), and `baton metrics docs` this page. docs/monitoring has the first two as well. Engines have metrics of
their own, at their own ports.

- `model` is a name of the config, and `{UNKNOWN}` for requests that name no model that there is.
- Counters are of all data-plane processes, also of those that have ended. They start again with the
  orchestrator.
- `p50` and `p99` that are gauges are of the last half minute; the histograms beside them let you choose.
- What a request may take is bounded by `limits.request_timeout_s`, 600 s by default; buckets reach above it,
  up to an hour.
- Tokens, the time to the first one and the time between two are counted in batches, up to a tenth of a second
  after the request has ended.

Earlier names: `baton_request_stage_seconds` had a stage `total`, which is `baton_request_duration_seconds`
now, and series of an unknown model had an empty label. `baton_worker_in_flight`, `baton_prefix_*` and
`baton_kv_events*` had `worker` as their only label, and have `model` and `role` too.
"""


def docs() -> str:
    """Return the page as Markdown."""
    chapters = [_HEAD, *map(_group, Group), _alerts()]
    return "\n".join(chapters)


def _group(group: Group) -> str:
    found = [metric for metric in (*METRICS, *PROCESS_METRICS) if metric.group is group]
    head = ["| metric | kind | labels | what it is |", "|---|---|---|---|"]
    return "\n".join([f"## {group.value}", "", *head, *map(_row, found), ""])


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    text = " ".join([metric.help, *_more(metric)])
    return f"| `{metric.name}` | {_kind(metric)} | {labels} | {text} |"


def _kind(metric: Metric) -> str:
    return f"{metric.kind.value}, {metric.unit}" if metric.unit else metric.kind.value


def _more(metric: Metric) -> Iterator[str]:
    if metric.bounds:
        yield f"Buckets from {metric.bounds[0]:g} to {metric.bounds[-1]:g} s."
    alerts = [alert for alert in ALERTS if metric in alert.metrics()]
    if alerts:
        yield f"Alerts: {', '.join(map(_link, alerts))}."


def _link(alert: Alert) -> str:
    return f"[{alert.name}](#{alert.name.lower()})"


def _alerts() -> str:
    text = "Limits are where most would want to look; change them to what your users expect."
    return "\n".join(["## Alerts", "", text, "", *_table(ALERTS), "", *map(_alert, ALERTS)])


def _table(alerts: Sequence[Alert]) -> Iterator[str]:
    yield from ("| alert | severity | after |", "|---|---|---|")
    for alert in alerts:
        yield f"| {_link(alert)} | {alert.severity} | {alert.wait} |"


def _alert(alert: Alert) -> str:
    return "\n".join(
        [
            f"### {alert.name}",
            "",
            alert.meaning,
            "",
            f"    {alert.expression}",
            "",
            f"What to do: {alert.action}",
            "",
        ]
    )
