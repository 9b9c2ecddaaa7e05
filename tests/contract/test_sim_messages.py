"""The simulated engine keeps the contract of Messages."""

from __future__ import annotations

from tests.contract.messages_cases import *  # noqa: F403  # the tests themselves
