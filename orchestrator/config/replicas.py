"""A pool has a number of replicas, or a range in which `scaling` decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Self

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, model_validator
from pydantic_core import CoreSchema, core_schema

from orchestrator.config.base import Model

MOST_REPLICAS: Final = 4096  # of all models together: above is a slip of the hand
Count = Annotated[int, Field(ge=1, le=MOST_REPLICAS, strict=True)]
_COUNT: Final = TypeAdapter(Count)


class ReplicaRange(Model):
    """`scaling` decides how many there are, from `min` to `max`; a run begins with `min`."""

    min: Count = Field(description="There are at least this many workers, also while nothing is asked.")
    max: Count = Field(description="There are at most this many workers.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}: min must not be above max")
        return self


class _CountOrRange:
    """This makes pydantic take a number and a mapping, and tell of each what is wrong with it alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_validated)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [_COUNT.json_schema(), ReplicaRange.model_json_schema()]}


Replicas = Annotated[int | ReplicaRange, _CountOrRange()]


def _validated(given: Any) -> int | ReplicaRange:
    if isinstance(given, ReplicaRange | Mapping):
        return ReplicaRange.model_validate(given)
    return _COUNT.validate_python(given)
