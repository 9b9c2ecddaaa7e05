"""The simulated engine keeps the contract of Responses."""

from __future__ import annotations

from tests.contract.responses_cases import *  # noqa: F403  # the tests themselves
