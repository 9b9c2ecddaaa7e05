"""Workers report their load, also that of other orchestrators' legs, and whether they want new legs."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.config.options import RoutingConfig
from orchestrator.wire.load import LoadReport
from orchestrator.workers.judge import Judge
from orchestrator.workers.news import News
from orchestrator.workers.worker import Worker


class Reports:
    """It notes at workers what they report, and tells the judge and all who hear of changes."""

    def __init__(self, judge: Judge, news: News, routing: RoutingConfig) -> None:
        self._judge = judge
        self._news = news
        self._routing = routing

    def reconfigure(self, routing: RoutingConfig, workers: Iterable[Worker]) -> None:
        """Go by this section from now on."""
        self._routing = routing
        self.hear(workers)

    def hear(self, workers: Iterable[Worker]) -> None:
        """Count the legs of others with the workers from now on, or do not, as the config has it."""
        for worker in workers:
            worker.reported.is_heard = self._routing.hears_loads
            if not worker.reported.is_heard:
                worker.note_others(0)
                worker.reported.senders = 1

    def note(self, worker: Worker, report: LoadReport | None) -> None:
        """Note what a worker reports of its load, and whether it wants new legs; None: it reports nothing."""
        reported = worker.reported
        reported.last = report
        if reported.is_heard:
            worker.note_others(0 if report is None else report.others or 0)
            self._note_senders(worker, 1 if report is None else report.senders or 1)
        self._judge.note_wish(worker, wants_legs=report is None or not report.is_draining)

    def _note_senders(self, worker: Worker, count: int) -> None:
        if count != worker.reported.senders:
            worker.reported.senders = count
            self._news.changed.tell()
