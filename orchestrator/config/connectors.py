"""A connector stands in the config as its name in the table of `legs/connectors/`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from orchestrator.legs.connectors import CONNECTORS


def _known(name: str) -> str:
    if name not in CONNECTORS:
        raise PydanticCustomError("unknown_connector", "there is no such connector")
    return name


ConnectorName = Annotated[str, AfterValidator(_known), WithJsonSchema({"enum": [*CONNECTORS]})]
