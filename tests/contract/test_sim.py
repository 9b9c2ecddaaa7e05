"""The simulated engine keeps the contract."""

from __future__ import annotations

from tests.contract.cases import *  # noqa: F403  # the tests themselves
