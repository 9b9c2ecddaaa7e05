from __future__ import annotations

import typing

from fastapi.routing import APIRoute
from starlette.responses import Response

from tests.worker.sim.workers import MODEL
from worker.sim.api import create_app
from worker.sim.settings import Settings


def test_no_answer_takes_the_way_through_fastapis_encoder() -> None:
    """Each endpoint returns a `Response` whose bytes are written already (`bench/micro/responses.py`)."""
    endpoints = [
        route.endpoint
        for route in create_app(Settings(model_name=MODEL)).routes
        if isinstance(route, APIRoute)
    ]
    assert len(endpoints) > 10
    for endpoint in endpoints:
        assert issubclass(typing.get_type_hints(endpoint)["return"], Response), endpoint
