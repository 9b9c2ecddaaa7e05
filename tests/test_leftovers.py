"""Nothing that a test does to its process stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.leftovers import taken_back


def test_all_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TEST_CHANGED", "before")
    monkeypatch.setenv("BATON_TEST_REMOVED", "before")
    monkeypatch.delenv("BATON_TEST_ADDED", raising=False)
    environ, folder = dict(os.environ), os.getcwd()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(ZeroDivisionError), taken_back():
        change_all(tmp_path)
    assert (dict(os.environ), os.getcwd()) == (environ, folder)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == held


def change_all(folder: Path) -> None:
    os.environ |= {"BATON_TEST_ADDED": "1", "BATON_TEST_CHANGED": "after"}
    del os.environ["BATON_TEST_REMOVED"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    os.chdir(folder)
    raise ZeroDivisionError


def test_it_holds_for_each_test(request: pytest.FixtureRequest) -> None:
    assert "_leaves_nothing" in request.fixturenames
