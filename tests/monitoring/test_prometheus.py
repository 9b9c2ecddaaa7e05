"""A real Prometheus watches a real `baton up`: every query of the dashboard has data, every rule works."""

from __future__ import annotations

import contextlib
import json
import math
import ssl
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.shared.processes import free_port
from launch.monitoring.alerts import ALERTS, rules
from launch.monitoring.dashboard import document
from launch.monitoring.queries import INTERVAL, VARIABLES
from tests.baton import baton
from tests.launch.monitoring.expressions import declared_series
from tests.monitoring.programs import program
from tests.orchestrator.certificate import CERT, KEY
from tests.waiting import wait_for

pytestmark = [pytest.mark.prometheus, pytest.mark.processes]

MODEL = "m"
LIMIT_S = 180.0
SCRAPE_S = 1
RATE_INTERVAL = "20s"
QUERIES = sorted({target["expr"] for panel in document()["panels"] for target in panel.get("targets", ())})


CLIENT, SCRAPER = "sk-client", "sk-prometheus"  # keys


def config(listen: str, admin: str, keys: Path) -> dict[str, Any]:
    """All that has metrics of its own: processes, TLS, API keys, KV events, discovery, scaling."""
    scopes = {CLIENT: "infer", SCRAPER: "metrics"}
    lines = [f"{scope} {sha256(key.encode()).hexdigest()} {scope}\n" for key, scope in scopes.items()]
    keys.write_text("".join(lines))
    pool = {"engine": "sim", "replicas": 2}
    base_port = free_port()
    members = keys.with_name("members.json")  # the decode workers: `baton up` gives the next ports to them
    members.write_text(json.dumps([member(str(index), base_port + 2 + index) for index in range(2)]))
    found = {"seats": 8, "discover": {"file": str(members)}}
    return {
        "orchestrator": {
            "listen": listen,
            "admin": admin,
            "processes": 2,
            "api_keys_file": str(keys),
            "tls": {"cert": str(CERT), "key": str(KEY)},
        },
        "models": [{"name": MODEL, "prefill": pool, "decode": {**pool, **found}}],
        "routing": {"prefill": "kv_events"},
        "scaling": {},
        "base_port": base_port,
    }


def member(name: str, port: int) -> dict[str, str]:
    url = f"http://127.0.0.1:{port}"
    return {"uid": f"start-{name}", "name": name, "model": MODEL, "role": "decode", "url": url}


class Prometheus:
    """It scrapes one address, and has our rules."""

    def __init__(self, folder: Path, target: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        scraped = {
            "job_name": "baton",
            "scheme": "https",
            "tls_config": {"ca_file": str(CERT), "server_name": "localhost"},
            "authorization": {"credentials": SCRAPER},
            "static_configs": [{"targets": [target]}],
        }
        every = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        asked = {"global": every, "rule_files": ["alerts.yaml"], "scrape_configs": [scraped]}
        (folder / "alerts.yaml").write_text(rules())
        (folder / "prometheus.yml").write_text(yaml.safe_dump(asked))
        self._folder = folder

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        listen = self.url.removeprefix("http://")
        argv = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={listen}"]
        log = self._folder / "prometheus.log"
        with (
            log.open("wb") as stderr,
            subprocess.Popen([program("prometheus"), *argv], cwd=self._folder, stderr=stderr) as process,
        ):
            try:
                wait_for(lambda: self._is_ready(process, log), "Prometheus", LIMIT_S)
                yield
            finally:
                process.terminate()

    def _is_ready(self, process: subprocess.Popen[bytes], log: Path) -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{self.url}/-/ready").is_success
        except httpx.TransportError:
            return False

    def ask(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """What it comes to now; what is no number is left out."""
        found = [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]


def shown(expression: str) -> str:
    """As Grafana asks, with all values of its variables."""
    for variable in VARIABLES.values():
        expression = expression.replace(variable, ".*")
    return expression.replace(INTERVAL, RATE_INTERVAL)


class Load:
    """A few clients that ask for the same beginning."""

    def __init__(self, url: str) -> None:
        trust, headers = ssl.create_default_context(cafile=str(CERT)), {"authorization": f"Bearer {CLIENT}"}
        self._client = httpx.Client(base_url=url, verify=trust, headers=headers)
        self.asked = 0

    def ask(self) -> None:
        for is_stream in (True, False):
            body = {
                "model": MODEL,
                "prompt": f"{'The same words. ' * 200} {self.asked}",
                "max_tokens": 8,
                "stream": is_stream,
            }
            answer = self._client.post("/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            self.asked += 1

    def close(self) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Load]]:
    """A cluster under a light load, watched for as long as it takes until there are rates of everything."""
    folder = tmp_path_factory.mktemp("monitoring")
    listen, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
    path = folder / "config.yaml"
    path.write_text(json.dumps(config(listen, admin, folder / "keys")))
    prometheus = Prometheus(folder, admin)
    with baton("up", str(path), cwd=folder, transport="orjson"), prometheus.running():
        load = Load(f"https://{listen}")
        try:
            yield prometheus, load
        finally:
            load.close()


def test_every_query_of_the_dashboard_has_data(watched: tuple[Prometheus, Load]) -> None:
    prometheus, load = watched
    missing = [shown(expression) for expression in QUERIES]
    assert len(missing) > 60

    def has_all() -> bool:
        load.ask()
        missing[:] = [expression for expression in missing if not prometheus.values(expression)]
        return not missing

    try:
        wait_for(has_all, "data", LIMIT_S)
    except AssertionError:
        pytest.fail("no data:\n" + "\n".join(missing))


def test_the_numbers_are_those_of_the_load(watched: tuple[Prometheus, Load]) -> None:
    prometheus, load = watched
    load.ask()
    for name, count in (
        ("baton_requests_total", load.asked),
        ("baton_generation_tokens_total", 8 * load.asked),
        ("baton_time_to_first_token_seconds_count", load.asked / 2),
        ("baton_inter_token_latency_seconds_count", load.asked / 2),
        ('baton_worker_requests_total{role="decode"}', load.asked),
        ('baton_kv_transfers_total{outcome="transferred"}', load.asked),
    ):
        wait_for(lambda: prometheus.values(f"sum({name})") == [count], name)  # noqa: B023
    assert prometheus.values(f'min(baton_prompt_tokens_total{{model="{MODEL}"}})')[0] > 600 * load.asked


def test_every_name_is_declared(watched: tuple[Prometheus, Load]) -> None:
    prometheus, _ = watched
    names = {name for name in prometheus.ask("label/__name__/values") if name.startswith("baton_")}
    assert names <= declared_series()
    assert len(names) > 50


def test_every_rule_works_and_nothing_is_wrong(watched: tuple[Prometheus, Load]) -> None:
    prometheus, _ = watched

    def rules_of() -> list[dict[str, Any]]:
        [group] = prometheus.ask("rules")["groups"]
        found: list[dict[str, Any]] = group["rules"]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    found = wait_for(rules_of, "an evaluation of all rules")
    assert [rule["name"] for rule in found] == [alert.name for alert in ALERTS]
    assert {rule["name"]: rule.get("lastError") for rule in found if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in found if rule["state"] == "firing"] == []


def test_the_variables_have_values(watched: tuple[Prometheus, Load]) -> None:
    prometheus, _ = watched
    for variable in document()["templating"]["list"][1:]:
        name, label = variable["definition"].removeprefix("label_values(").removesuffix(")").split(", ")
        assert prometheus.ask(f"label/{label}/values", **{"match[]": name}), variable["name"]
