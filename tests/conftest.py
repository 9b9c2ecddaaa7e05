from __future__ import annotations

import functools
import os
import resource
import signal
import ssl
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from bench.shared.processes import children
from orchestrator.compiled import is_compiled
from orchestrator.form import FORM_ENV, take_form
from tests import reaper
from tests.leftovers import taken_back

# This counts for processes that tests start, too: what was built here once is tested when it is asked for.
os.environ.setdefault(FORM_ENV, "pure")
take_form(os.environ)

# A slow machine is no failure; and CI tries the same examples each time, so that a red run means a change.
settings.register_profile(
    "baton",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("baton")

# A shell that starts a run in the background has it ignore Ctrl-C, and nohup has it ignore SIGHUP; so do all
# its children. But tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    reaper.start()


@pytest.fixture(scope="session", autouse=True)
def _certificates_are_read_once() -> Iterator[None]:
    """httpx reads those of the system for every client that it makes: 28 ms of CPU, even without TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with taken_back():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="not possible on the compiled form")
    for item in items if is_compiled() else ():
        if item.get_closest_marker("pure"):
            item.add_marker(skip)


# --- the mark `processes` -----------------------------------------------------------------------

BEFORE = pytest.StashKey["Children"]()


class Children:
    """The children that this process has now, and a number that grows once it has waited for another one."""

    def __init__(self) -> None:
        self.living = children(os.getpid())
        self.faults = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt

    def are_older_than(self, before: Children) -> bool:
        """Whether none was started since `before`."""
        ended = before.living - self.living
        return self.living <= before.living and (bool(ended) or self.faults == before.faults)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[BEFORE] = Children()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A test that starts processes says so, or it fails: `make quick` relies on it."""
    result = yield
    if not item.get_closest_marker("processes") and not Children().are_older_than(item.stash[BEFORE]):
        pytest.fail("it starts processes, and is not marked `processes`", pytrace=False)
    return result
