from __future__ import annotations

import resource

import pytest

from orchestrator.config import descriptors


class Limits:
    """As if the system had these."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def get(self, which: int) -> tuple[int, int]:
        return self.now

    def set(self, which: int, limits: tuple[int, int]) -> None:
        self.now = limits


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    made = Limits(1024, 4096)
    monkeypatch.setattr(resource, "getrlimit", made.get)
    monkeypatch.setattr(resource, "setrlimit", made.set)
    return made


def test_the_soft_limit_is_raised_to_the_hard_one(limits: Limits) -> None:
    assert descriptors.raise_limit() == 4096
    assert limits.now == (4096, 4096)
    assert descriptors.raise_limit() == 4096


def test_a_hard_limit_without_bounds_is_not_taken_at_its_word(limits: Limits) -> None:
    limits.now = (256, resource.RLIM_INFINITY)
    assert descriptors.raise_limit() == 1024 * 1024


def test_a_limit_that_cannot_be_raised_stays(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, wanted: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert descriptors.raise_limit() == 1024


@pytest.mark.parametrize(("limit", "clients"), [(4096, 2016), (1024, 480), (200, 68), (64, 16), (10, 16)])
def test_clients_have_half_of_what_is_left(limits: Limits, limit: int, clients: int) -> None:
    limits.now = (limit, limit)
    assert descriptors.most_clients() == clients
