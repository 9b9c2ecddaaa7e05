"""`baton metrics` prints what monitoring needs of Baton, from the same table that `/metrics` is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

ABOUT: Final = (
    "print what monitoring needs: rules for Prometheus, a dashboard for Grafana, or the page on both"
)


def _alerts() -> str:
    from launch.monitoring.alerts import rules

    return rules()


def _dashboard() -> str:
    from launch.monitoring.dashboard import dashboard

    return dashboard()


def _docs() -> str:
    from launch.monitoring.docs import docs

    return docs()


PRINTED: Final[Mapping[str, Callable[[], str]]] = {
    "alerts": _alerts,
    "dashboard": _dashboard,
    "docs": _docs,
}
