"""Metrics have vLLM's names, as far as the simulation has something to count; `sim:` are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LABELS = ("engine", "model_name")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FINISHED_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """Every series exists from the start, on a registry of its own."""

    def __init__(self, model_name: str, rank: int = 0) -> None:
        self._registry = CollectorRegistry()
        self._values = (str(rank), model_name)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.external_queries = self._counter(
            "external_prefix_cache_queries", "Prompt tokens asked of others."
        )
        self.external_hits = self._counter("external_prefix_cache_hits", "Prompt tokens that others had.")
        self.kv_expired = self._counter("nixl_num_kv_expired_reqs", "Requests whose KV expired.")
        self.failed_transfers = self._counter("nixl_num_failed_transfers", "Failed KV transfers.")
        self.failed_notifications = self._counter("nixl_num_failed_notifications", "Failed KV notifications.")
        self.late_notifications = self._counter(
            "nixl_num_notifications_after_expiry", "Notifications for requests that were no longer tracked."
        )
        self.preemptions = self._counter("num_preemptions", "Preemptions: the simulation has none.")
        self.tokenized_prompts = self._counter("tokenized_prompts", "Prompts that came as text.", "sim")
        self.transfer_seconds = self._histogram("nixl_xfer_time_seconds", "Duration of KV transfers.")
        self.first_token_seconds = self._histogram("time_to_first_token_seconds", "Time to first token.")
        self.request_seconds = self._histogram("e2e_request_latency_seconds", "Request latency.")
        self.finished = self._finished()

    def watch(
        self,
        *,
        running: Callable[[], float],
        waiting: Callable[[], float],
        kv_usage: Callable[[], float],
        fetches: Mapping[str, Callable[[], float]],
    ) -> None:
        """Say what the gauges read, each time they are asked; `fetches` are by stage."""
        self._gauge("num_requests_running", "Requests running.").set_function(running)
        self._gauge("num_requests_waiting", "Requests waiting.").set_function(waiting)
        self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.").set_function(kv_usage)
        self._fetches(fetches)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def _fetches(self, stages: Mapping[str, Callable[[], float]]) -> None:
        name, text = "vllm:num_requests_kv_fetch_by_stage", "Requests with a hand-off, by stage."
        metric = Gauge(name, text, (*_LABELS, "stage"), registry=self._registry)
        for stage, read in stages.items():
            metric.labels(*self._values, stage).set_function(read)

    def _counter(self, name: str, text: str, family: str = "vllm") -> Counter:
        return Counter(f"{family}:{name}", text, _LABELS, registry=self._registry).labels(*self._values)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self._registry).labels(*self._values)

    def _histogram(self, name: str, text: str) -> Histogram:
        metric = Histogram(f"vllm:{name}", text, _LABELS, registry=self._registry, buckets=_SECONDS)
        return metric.labels(*self._values)

    def _finished(self) -> dict[str, Counter]:
        labels = (*_LABELS, "finished_reason")
        metric = Counter(
            "vllm:request_success", "Requests by how they ended.", labels, registry=self._registry
        )
        return {reason: metric.labels(*self._values, reason) for reason in _FINISHED_REASONS}
