"""A process that its backend starts again: its member follows it, and tells what keeps it from running."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

from launch.backends.base import Backend, BackendError, Started
from launch.local.member import Limits, Member, StartFailed
from launch.local.output import Output
from launch.local.processes import UNKNOWN_CODE, Guard
from launch.local.progress import Lines
from launch.plan import ProcessSpec, placed_spec
from orchestrator.config.options import Config

SPEC = placed_spec("m/both/0", "both")


class Kept:
    """What a backend has started; a test says what is known of it."""

    is_kept = True
    pid: int | None = None

    def __init__(self) -> None:
        self.starts = 1
        self.ready_url = ""
        self.trouble: str | None = None
        self.code: int | None = None

    def exit_code(self) -> int | None:
        return self.code

    def is_gone(self) -> bool:
        return False

    def hang_up(self) -> None:
        pass

    def signal(self, number: signal.Signals) -> None:
        pass

    async def end(self, limit_s: float, hurry: asyncio.Event) -> bool:
        return True

    def forget(self) -> None:
        pass


class Keeping(Backend):
    def __init__(self, refuses: bool = False) -> None:
        self.started = Kept()
        self._refuses = refuses

    @classmethod
    def make(cls, config: Config, directory: Path, say: Callable[[str], None], guard: Guard) -> Self:
        return cls()

    async def open(self, specs: Sequence[ProcessSpec]) -> None:
        pass

    def start(self, spec: ProcessSpec, log: Path) -> Started:
        if self._refuses:
            raise BackendError("the cluster is away")
        return self.started

    async def close(self) -> None:
        pass

    @classmethod
    def sweep(cls, handle: Mapping[str, str]) -> None:
        pass


class Site:
    """A member whose process runs, and what was said of it."""

    def __init__(self, tmp_path: Path) -> None:
        self._said = io.StringIO()
        self.log = tmp_path / SPEC.log_name
        self.log.write_text("ready\nboom\n")
        self.backend = Keeping()
        self.member = self.made(self.backend)
        asyncio.run(self._start())

    def made(self, backend: Backend) -> Member:
        progress = Lines(Output(self._said), {SPEC.name: str(self.log)})
        return Member(SPEC, self.log, Limits(), progress, backend)

    async def _start(self) -> None:
        self.member.start()

    @property
    def started(self) -> Kept:
        return self.backend.started

    @property
    def said(self) -> str:
        return self._said.getvalue()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_it_may_answer_once_it_has_a_place(site: Site) -> None:
    site.member.tend(0.0)
    assert not site.member.may_answer
    site.started.ready_url = "http://h:1/health"
    site.member.tend(0.0)
    assert site.member.may_answer
    assert site.member.entry().url == "http://h:1"


def test_a_missing_place_is_told_once_and_its_end_is_seen(site: Site) -> None:
    site.started.trouble = "no place for it: no GPU"
    site.member.tend(0.0)
    site.member.tend(0.0)
    assert site.said.count("m/both/0: no place for it: no GPU\n") == 1
    assert site.member.state == "waiting"
    site.started.trouble = None
    site.member.tend(0.0)
    assert site.member.state == "starting"


def test_a_lost_node_makes_it_lost_until_it_is_elsewhere(site: Site) -> None:
    site.started.ready_url = "http://h:1/health"
    site.member.tend(0.0)
    site.member.mark_ready()
    site.started.trouble = "out of reach"
    site.member.tend(0.0)
    assert (site.member.state, site.member.is_ready) == ("lost", False)
    site.started.trouble, site.started.starts, site.started.ready_url = None, 2, "http://other:1/health"
    site.member.tend(0.0)
    assert (site.member.state, site.member.restarts) == ("starting", 1)
    assert site.member.entry().url == "http://other:1"


def test_an_end_is_told_with_the_last_lines_cause_and_is_no_end_of_the_run(site: Site) -> None:
    site.started.ready_url = "http://h:1/health"
    site.member.tend(0.0)
    site.member.mark_ready()
    site.started.code = -9
    site.member.tend(0.0)
    site.member.tend(0.0)
    assert site.said.count("m/both/0 ended with signal SIGKILL and is started again") == 1
    assert site.member.state == "died"
    site.started.code, site.started.starts = None, 2
    site.member.tend(0.0)
    assert site.member.state == "starting"


def test_an_end_of_which_nobody_knows_the_exit_code_is_told_as_such(site: Site) -> None:
    site.started.trouble, site.started.code = "job 2_0 has ended, with CANCELLED", UNKNOWN_CODE
    site.member.tend(0.0)
    assert "m/both/0: job 2_0 has ended, with CANCELLED\n" in site.said
    assert "m/both/0 ended with no known exit code and is started again (log: " in site.said
    assert site.member.state == "died"


def test_an_end_while_all_is_started_fails_the_start(site: Site) -> None:
    site.started.code = 2
    with pytest.raises(StartFailed, match=r"m/both/0 ended while starting, with exit code 2(.|\n)*boom"):
        site.member.check_started()


def test_a_backend_that_refuses_fails_the_start(site: Site) -> None:
    with pytest.raises(StartFailed, match="m/both/0 cannot be started: the cluster is away"):
        site.made(Keeping(refuses=True)).start()
