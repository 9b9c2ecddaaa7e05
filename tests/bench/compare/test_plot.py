from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.compare.plot import save_plot

SMALL: dict[str, Any] = {
    "title": "small chat",
    "columns": {"cpu_us": "CPU us/request", "per_second": "requests/s"},
    "rows": [
        {"router": "baton", "figures": {"cpu_us": 60.0}, "samples": [{"cpu_us": 50.0}, {"cpu_us": 70.0}]},
        {"router": "nginx", "reason": "nginx is not installed"},
    ],
}
NOTHING: dict[str, Any] = {
    "title": "sse",
    "columns": {"cpu_us": "CPU us/event"},
    "rows": [{"router": "baton", "reason": "HTTP 500"}],
}


def test_plot_shows_the_routers_that_have_figures(tmp_path: Path) -> None:
    path = tmp_path / "result.png"
    save_plot([SMALL, NOTHING, SMALL, SMALL], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_figures_there_is_no_plot(tmp_path: Path) -> None:
    save_plot([NOTHING], tmp_path / "result.svg")
    assert list(tmp_path.iterdir()) == []
