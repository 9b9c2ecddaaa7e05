// The page reads what every other program reads: /metrics, and the lists of the admin API. It changes nothing.
// All text comes into it as text, so that no name of a model or a request can become markup.

import { Charts } from "/page/charts.js";
import { count, histogram, parse, quantile, series, sum } from "/page/metrics.js";
import { at, cell, el, ms, number, put, seconds, table } from "/page/elements.js";

const PERIOD_MS = 2000;
const MOST_EVENTS = 200;
const GOOD = new Set(["ready", "active"]);
const BAD = new Set(["gone", "ejected", "unfit"]);

const page = (id) => document.getElementById(id);
let key = sessionStorage.getItem("baton-key") ?? "";
let last = null; // what was read before, to tell rates by
let lastEvent = 0;
let started = 0; // when the process began that answers: its counters and the numbers of its events begin with it
let query = "";
let shown = ""; // the id of the request whose timeline is open
const charts = new Charts(page("charts"));

class Refused extends Error {}

async function read(path) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store" });
  if (answer.status === 401 || answer.status === 403) throw new Refused((await answer.json()).error?.message);
  if (!answer.ok) throw new Error(`${path} was answered ${answer.status}`);
  return answer;
}

const document_of = async (path) => (await read(path)).json();

// --- what stands on it ---------------------------------------------------------------------------------------

function showFigures(now) {
  const took = last === null ? null : (now.time - last.time) / 1000;
  const rate = (name) => (took ? Math.max(0, sum(now.found, name) - sum(last.found, name)) / took : null);
  const spread = (name) => {
    const seen = histogram(now.found, name);
    const before = last === null ? null : histogram(last.found, name);
    return [0.5, 0.99].map((share) => quantile(seen, before, share));
  };
  const [first50, first99] = spread("baton_time_to_first_token_seconds");
  const [inter50, inter99] = spread("baton_inter_token_latency_seconds");
  const queued = sum(now.found, "baton_queue_requests");
  const open = sum(now.found, "baton_requests_in_flight");
  const figures = [
    ["requests", "requests", number(sum(now.found, "baton_requests_total"))],
    ["requests per second", "rate", number(rate("baton_requests_total"))],
    ["in flight", "open", number(open)],
    ["waiting", "queued", number(queued)],
    ["errors", "errors", number(sum(now.found, "baton_errors_total"))],
    ["rejected", "rejected", number(sum(now.found, "baton_requests_rejected_total"))],
    ["prompt tokens", "prompt-tokens", number(sum(now.found, "baton_prompt_tokens_total"))],
    ["generated tokens", "generated-tokens", number(sum(now.found, "baton_generation_tokens_total"))],
    ["TTFT p50, p99", "ttft", `${seconds(first50)}, ${seconds(first99)}`],
    ["inter-token p50, p99", "itl", `${seconds(inter50)}, ${seconds(inter99)}`],
  ];
  put(page("figures"), figures.map(([name, id, value]) => el("div", {}, el("dt", {}, name), el("dd", { id: `now-${id}` }, value))));
  if (took) {
    charts.add(now.time, {
      rate: [rate("baton_requests_total")],
      ttft: [first50, first99],
      itl: [inter50, inter99],
      open: [open, queued],
    });
  }
}

function stateOf(worker) {
  const name = worker.is_drained ? `${worker.state}, drained` : worker.state;
  const kind = worker.is_slow || worker.is_drained ? "warn" : GOOD.has(worker.state) ? "good" : BAD.has(worker.state) ? "bad" : "warn";
  const since = worker.since ? ` for ${ago(worker.since)}` : "";
  return el("span", { class: `state ${kind}` }, `${name}${worker.is_slow ? ", slow" : ""}${since}`);
}

function ago(moment) {
  const past = Math.max(0, Date.now() / 1000 - moment);
  if (past < 90) return `${Math.round(past)} s`;
  if (past < 5400) return `${Math.round(past / 60)} min`;
  return `${Math.round(past / 3600)} h`;
}

const COLUMNS = ["worker", "state", "in use", "served", "per second", "first byte p50, p99", "inter-token p50, p99", "errors", "retries", "transfers"];

function workerRow(worker) {
  const name = worker.address.name ?? worker.name;
  return el(
    "tr",
    { "data-worker": name },
    el("th", { scope: "row" }, name),
    el("td", {}, stateOf(worker), worker.reason ? el("div", { class: "bad" }, worker.reason) : ""),
    cell(worker.seats ? `${worker.in_flight} of ${worker.seats}` : `${worker.in_flight}`, true),
    cell(number(worker.served), true, "served"),
    cell(number(worker.rate), true),
    cell(`${seconds(worker.first_byte_p50)}, ${seconds(worker.first_byte_p99)}`, true),
    cell(`${seconds(worker.inter_token_p50)}, ${seconds(worker.inter_token_p99)}`, true),
    cell(number(worker.errors), true, "errors"),
    cell(number(worker.retries), true),
    cell(number(worker.transfers), true, "transfers"),
  );
}

function pool(role, workers) {
  const caption = `${role}: ${workers.filter((one) => GOOD.has(one.state)).length} of ${workers.length} ready`;
  const region = { class: "wide", tabindex: "0", role: "region", "aria-label": caption };
  return el("div", region, table(caption, COLUMNS, workers.map(workerRow)));
}

function showPools(workers) {
  const models = new Map();
  for (const worker of workers) {
    const { model, role } = worker.address;
    const roles = models.get(model) ?? models.set(model, new Map()).get(model);
    (roles.get(role) ?? roles.set(role, []).get(role)).push(worker);
  }
  const parts = [];
  for (const [model, roles] of models) {
    const both = ["prefill", "decode"].map((role) => roles.get(role)).filter(Boolean);
    const given = (roles.get("decode") ?? []).reduce((all, one) => all + one.transfers, 0);
    const open = (role) => (roles.get(role) ?? []).reduce((all, one) => all + one.in_flight, 0);
    const flow = both.length === 2
      ? [el("p", { class: "flow-line" }, `${open("prefill")} in prefill → ${number(given)} hand-offs → ${open("decode")} in decode`)]
      : [];
    parts.push(el("h3", {}, model), ...flow, ...[...roles].map(([role, found]) => pool(role, found)));
  }
  put(page("pools"), parts);
}

function showLeases(found) {
  const figures = [];
  for (const [labels, value] of series(found, "baton_kv_leases")) figures.push([`leases ${labels.state}`, value]);
  for (const [labels, value] of series(found, "baton_kv_leases_ended_total")) figures.push([`ended ${labels.state}`, value]);
  for (const [labels, value] of series(found, "baton_kv_transfers_total")) figures.push([`KV ${labels.outcome}`, value]);
  figures.push(["leaked", count(found, "baton_kv_leases_leaked_total")]);
  put(page("leases"), figures.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, number(value)))));
}

// --- requests ------------------------------------------------------------------------------------------------

function requestRow(request) {
  const open = el("button", { type: "button", class: "link" }, request.id);
  open.addEventListener("click", () => showOne(request.id));
  const failed = request.error !== null || request.status >= 400;
  const workers = [request.prefill_worker, request.decode_worker].filter(Boolean).join(" → ");
  return el(
    "tr",
    { "data-request": request.id },
    el("th", { scope: "row" }, open),
    cell(at(request.received)),
    cell(request.model ?? "unknown"),
    el("td", { class: failed ? "bad" : "" }, request.error ?? `${request.status ?? request.state}`),
    cell(ms(request.total_ms), true),
    cell(`${request.attempts}`, true),
    cell(request.key ?? ""),
    cell(workers),
  );
}

const REQUEST_COLUMNS = ["request", "arrived", "model", "outcome", "took", "attempts", "key", "workers"];

async function showRequests() {
  const found = await document_of(`/admin/requests?limit=25${query}`);
  put(page("recent"), [table("", REQUEST_COLUMNS, found.requests.map(requestRow), [4, 5])]);
}

async function showOne(id) {
  shown = id;
  try {
    const request = await document_of(`/admin/requests/${encodeURIComponent(id)}`);
    if (shown === id) put(page("one"), timeline(request));
  } catch (error) {
    put(page("one"), [el("p", { class: "bad" }, `${error.message}`)]);
  }
  page("one").hidden = false;
}

function timeline(request) {
  const close = el("button", { type: "button" }, "close");
  close.addEventListener("click", () => {
    shown = "";
    page("one").hidden = true;
  });
  const end = Math.max(request.total_ms, 0.001);
  const line = request.timeline.map((moment, place) => {
    const until = request.timeline[place + 1]?.ms ?? moment.ms;
    const mark = el("td", { class: "track" }, bar(moment.ms, until, end));
    return el("tr", {}, cell(ms(moment.ms), true), cell(moment.what), cell(moment.worker ?? ""), mark);
  });
  return [
    el("h3", {}, request.id, " ", close),
    table("", ["at", "what", "worker", ""], line, [0]),
    ...["prefill", "decode"].flatMap((role) => why(role, request.plan?.[role])),
    request.plan?.whole_reason ? el("p", {}, `One worker served all of it: ${request.plan.whole_reason}`) : "",
    request.handoff?.lease ? el("p", {}, `Lease ${request.handoff.lease}; KV ${request.handoff.kv ?? "unknown"}`) : "",
  ];
}

function bar(from, until, end) {
  const mark = el("i", {});
  mark.style.left = `${Math.min(98, (100 * from) / end)}%`; // by script, which the policy allows; no style in markup
  mark.style.width = `${Math.min(100, (100 * (until - from)) / end)}%`;
  return el("div", { class: "bar", "aria-hidden": "true" }, mark);
}

function why(role, choice) {
  if (!choice?.reason) return [];
  const rejected = (choice.rejected ?? []).map((one) => `${one.worker}: ${one.why}`).join("; ");
  return [el("p", {}, `${role}: ${choice.reason}${rejected ? `. Not asked: ${rejected}` : ""}`)];
}

// --- events --------------------------------------------------------------------------------------------------

async function showEvents() {
  const events = await document_of(`/admin/events?after=${lastEvent}`);
  const log = page("log");
  for (const event of events) {
    if (event.number < lastEvent) continue;
    lastEvent = event.number;
    const time = el("time", { datetime: new Date(event.time * 1000).toISOString() }, at(event.time));
    log.prepend(el("li", {}, time, el("code", {}, event.kind), event.message, event.who ? ` (${event.who})` : ""));
  }
  while (log.children.length > MOST_EVENTS) log.lastChild.remove();
}

// --- the loop ------------------------------------------------------------------------------------------------

async function refresh() {
  const [metrics, workers] = await Promise.all([read("/metrics").then((answer) => answer.text()), document_of("/admin/workers")]);
  const now = { time: Date.now(), found: parse(metrics) };
  if (started !== sum(now.found, "process_start_time_seconds")) {
    started = sum(now.found, "process_start_time_seconds");
    [last, lastEvent] = [null, 0];
  }
  const [[build] = [{}]] = series(now.found, "baton_info");
  page("build").textContent = [build.version, build.form, build.transport].filter(Boolean).join(", ");
  page("door").hidden = true;
  page("content").hidden = false;
  showFigures(now);
  showPools(workers);
  showLeases(now.found);
  last = now;
  await Promise.all([showRequests(), showEvents()]);
  page("state").textContent = `as of ${at(now.time / 1000)}`;
  document.body.dataset.refreshed = `${Number(document.body.dataset.refreshed ?? 0) + 1}`;
}

async function run() {
  for (;;) {
    try {
      if (!document.hidden) await refresh();
    } catch (error) {
      if (error instanceof Refused) {
        page("content").hidden = true;
        page("door").hidden = false;
        page("refused").textContent = key ? error.message : "";
        await new Promise((resolve) => page("door").addEventListener("submit", resolve, { once: true }));
      } else {
        page("state").textContent = `no answer: ${error.message}`;
        last = null; // what comes next may be another process, whose counters begin anew
      }
    }
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
}

page("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = page("key").value;
  sessionStorage.setItem("baton-key", key); // until the tab is closed
});
for (const button of page("choice").querySelectorAll("button")) {
  button.addEventListener("click", () => {
    query = button.dataset.query;
    for (const one of page("choice").querySelectorAll("button")) one.setAttribute("aria-pressed", `${one === button}`);
    showRequests().catch((error) => {
      page("state").textContent = error.message;
    });
  });
}
run();
