"""The page of the admin listener in Chromium: what it shows is what /metrics and the admin API say."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from orchestrator.compiled import ROOT
from orchestrator.control.web_page import FOLDER
from tests.orchestrator.running import MODEL, Orchestrator, SimWorker, simulated, starting
from tests.waiting import wait_for

pytestmark = [pytest.mark.browser, pytest.mark.processes]

AXE = ROOT / ".axe/node_modules/axe-core/axe.min.js"  # `make page` puts it there
# Screenshots for the docs are written there if it is set.
SCREENSHOTS = os.environ.get("BATON_SCREENSHOTS")
HOSTILE = '<img src=x onerror="document.title=1">&amp;\u202e\u001b[31m"'
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    made.set_window_size(1200, 1400)
    yield made
    made.quit()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[SimWorker]]:
    with simulated("prefill", "decode", "decode") as found:
        yield found


@pytest.fixture
def cluster(tmp_path: Path, workers: list[SimWorker]) -> Iterator[Orchestrator]:
    made = Orchestrator(tmp_path, workers)
    try:
        made.wait_ready()
        yield made
    finally:
        made.clean_up()


def ask(orchestrator: Orchestrator, count: int, **headers: str) -> None:
    client = orchestrator.client()
    for number in range(count):
        body = {"model": MODEL, "prompt": f"What is {number}?", "max_tokens": 8, "stream": number % 2 == 0}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200


def open_page(browser: webdriver.Chrome, orchestrator: Orchestrator) -> None:
    browser.get(orchestrator.admin_url)


def refreshes(browser: webdriver.Chrome) -> int:
    return int(browser.execute_script("return document.body.dataset.refreshed ?? 0"))


def wait_refreshed(browser: webdriver.Chrome, times: int = 2) -> None:
    """Wait until all that is shown was read after this."""
    before = refreshes(browser)
    wait_for(lambda: refreshes(browser) >= before + times, "the page to be refreshed")


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).get_property("textContent")


def figure(browser: webdriver.Chrome, worker: str, name: str) -> str:
    return text_of(browser, f'tr[data-worker="{worker}"] [data-figure="{name}"]')


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the browser says of the page, and of its policy."""
    return [entry["message"] for entry in browser.get_log("browser")]


def test_what_it_shows_is_what_the_metrics_say(browser: webdriver.Chrome, cluster: Orchestrator) -> None:
    ask(cluster, 12)
    wait_for(lambda: cluster.answered() == 12, "the counts")
    open_page(browser, cluster)
    wait_refreshed(browser, 3)
    counters = cluster.counters()

    def total(name: str, **labels: str) -> int:
        wanted = set(labels.items())
        return round(
            sum(value for (n, pairs), value in counters.items() if n == name and wanted <= set(pairs))
        )

    assert text_of(browser, "#now-requests") == str(total("baton_requests_total")) == "12"
    assert text_of(browser, "#now-errors") == str(total("baton_errors_total"))
    for worker in cluster.worker_states():
        role = worker.split("/")[1]
        assert figure(browser, worker, "served") == str(total("baton_worker_requests_total", worker=worker))
        assert figure(browser, worker, "errors") == "0"
        assert f"{role}" in text_of(browser, "#pools")
    served = [int(figure(browser, f"{MODEL}/decode/{index}", "served")) for index in range(2)]
    assert sum(served) == 12
    leases = text_of(browser, "#leases")
    assert f"ended consumed{total('baton_kv_leases_ended_total', state='consumed')}" in leases
    assert complaints(browser) == []


def test_one_requests_timeline(browser: webdriver.Chrome, cluster: Orchestrator) -> None:
    ask(cluster, 2)
    ask(cluster, 1, **{"x-request-id": "mine"})
    open_page(browser, cluster)
    wait_for(lambda: 'data-request="mine"' in browser.page_source, "the request")
    browser.execute_script(
        "[...document.querySelectorAll('button.link')].find(one => one.textContent === 'mine').click()"
    )
    wait_for(lambda: "arrived" in text_of(browser, "#one"), "its timeline")
    text = text_of(browser, "#one")
    assert f"{MODEL}/prefill/0" in text
    assert "last byte to the client" in text
    if SCREENSHOTS:
        browser.execute_script("document.querySelector('#one').scrollIntoView()")
        browser.save_screenshot(f"{SCREENSHOTS}/request.png")


def test_failed_requests_are_found(browser: webdriver.Chrome, cluster: Orchestrator) -> None:
    ask(cluster, 1)
    answer = cluster.client().post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert answer.status_code == 404
    open_page(browser, cluster)
    wait_refreshed(browser)
    browser.execute_script("document.querySelector('[data-query*=failed]').click()")
    rows = "return document.querySelectorAll('tr[data-request]').length"
    wait_for(lambda: browser.execute_script(rows) == 1, "one row")
    assert "model_not_found" in text_of(browser, "#recent")


def test_events_and_a_worker_that_is_drained(browser: webdriver.Chrome, cluster: Orchestrator) -> None:
    open_page(browser, cluster)
    wait_refreshed(browser)
    cluster.change("POST", f"/admin/workers/{MODEL}/decode/1/drain")
    wait_for(lambda: "admin.drain" in text_of(browser, "#log"), "the event")
    wait_for(lambda: "drained" in text_of(browser, f'tr[data-worker="{MODEL}/decode/1"]'), "its state")


def test_events_go_on_after_a_restart(
    browser: webdriver.Chrome, workers: list[SimWorker], tmp_path: Path
) -> None:
    """Another orchestrator at the same address numbers its events anew."""
    with starting(tmp_path, workers) as start:
        first = start(processes=1)
        for index in (0, 1):
            first.change("POST", f"/admin/workers/{MODEL}/decode/{index}/drain")
        open_page(browser, first)
        wait_for(lambda: text_of(browser, "#log").count("admin.drain") == 2, "the first events")
        first.signal(signal.SIGTERM)
        first.wait_exit()
        second = Orchestrator(tmp_path, workers, **first.config["orchestrator"])
        try:
            second.url, second.admin_url = first.url, first.admin_url
            second.wait_ready()
            second.change("POST", f"/admin/workers/{MODEL}/decode/1/drain")
            wait_for(
                lambda: text_of(browser, "#log").count("admin.drain") == 3, "the event of the second one"
            )
        finally:
            second.clean_up()


def test_with_keys_it_asks_for_one(
    browser: webdriver.Chrome, workers: list[SimWorker], tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    lines = [f"{name} {sha256(name.encode()).hexdigest()} {name}" for name in ("infer", "admin")]
    file.write_text("\n".join(lines) + "\n")
    orchestrator = Orchestrator(tmp_path, workers, api_keys_file=str(file), key="admin")
    try:
        orchestrator.wait_ready()
        open_page(browser, orchestrator)
        wait_for(lambda: browser.find_element(By.ID, "key").is_displayed(), "the question")
        assert not browser.find_element(By.ID, "content").is_displayed()
        for key, then in (("wrong", "refused"), ("infer", "refused"), ("admin", "content")):
            browser.find_element(By.ID, "key").clear()
            browser.find_element(By.ID, "key").send_keys(key)
            browser.find_element(By.CSS_SELECTOR, "#door button").click()
            wait_for(lambda then=then: text_of(browser, f"#{then}").strip(), "an answer")
        wait_for(lambda: browser.find_element(By.ID, "content").is_displayed(), "the content")
        assert f"{MODEL}/decode/0" in text_of(browser, "#pools")
    finally:
        orchestrator.clean_up()


def test_hostile_names_stay_text(browser: webdriver.Chrome, cluster: Orchestrator) -> None:
    """Whatever the API says is text: here it says it in every field that is one."""
    ask(cluster, 1)
    open_page(browser, cluster)
    wait_refreshed(browser)
    browser.execute_script(SPOIL, HOSTILE)
    wait_refreshed(browser, 3)
    assert browser.title == "Baton"
    assert (
        browser.execute_script("return document.querySelectorAll('#content img, #content script').length")
        == 0
    )
    for part in ("#pools", "#log", "#recent"):
        assert HOSTILE in text_of(browser, part), part


# Has every text that the page reads from now on be a hostile one.
SPOIL = """
const hostile = arguments[0], real = window.fetch;
const keep = new Set(["role", "state", "id"]);
const spoil = (value, name) =>
  Array.isArray(value) ? value.map((one) => spoil(one, name))
  : value && typeof value === "object"
  ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, spoil(one, key)]))
  : typeof value === "string" && !keep.has(name) ? hostile : value;
window.fetch = async (path, options) => {
  const wanted = path.startsWith("/admin/events") ? "/admin/events" : path;
  const answer = await real(wanted, options);
  if (path === "/metrics") return answer;
  return { ok: true, status: 200, json: async () => spoil(await answer.json(), "") };
};
"""


@pytest.mark.parametrize("size", [(1200, 1400), (360, 800)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(
    browser: webdriver.Chrome, cluster: Orchestrator, size: Sequence[int], scheme: str
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        open_page(browser, cluster)
        for count in (8, 16, 12, 4):
            ask(cluster, count)
            wait_refreshed(browser, 1)
        wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, "the page is wider than the screen"
        found = run_axe(browser)
        serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        assert serious == [], [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]
        if SCREENSHOTS:
            browser.save_screenshot(f"{SCREENSHOTS}/page-{scheme}-{size[0]}.png")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def run_axe(browser: webdriver.Chrome) -> dict[str, Any]:
    """Have axe-core look at the page. It comes in by the debugger, as the page's policy lets no script in."""
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text("utf-8")})
    done = browser.execute_cdp_cmd(
        "Runtime.evaluate", {"expression": "axe.run()", "awaitPromise": True, "returnByValue": True}
    )
    result: dict[str, Any] = done["result"]["value"]
    return result


def test_it_is_small_and_loads_nothing_from_elsewhere(cluster: Orchestrator) -> None:
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 150_000
    for file in files:
        for url in re.findall(r"https?://[^\s\"')]+", file.read_text("utf-8")):
            assert url == "http://www.w3.org/2000/svg"  # a name, which nobody loads
    answer = httpx.get(cluster.admin_url, headers={"accept": "text/html"}, trust_env=False)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
