"""The config's sections share these: their base, the mark `Reloadable`, the walk over all options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

T = TypeVar("T")


class Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_strip_whitespace=True
    )


class _ReloadableMark:
    """`Reloadable` puts this on an option; the JSON Schema shows it as `"x-reloadable": true`."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), "x-reloadable": True}


Reloadable = Annotated[T, _ReloadableMark()]
"""An option that a running orchestrator takes over from a changed file (`control/reload.py`).

All others need a restart. Whoever marks an option sees to it that `reconfigure` of its component takes it.
"""


def is_reloadable(option: FieldInfo) -> bool:
    return any(isinstance(mark, _ReloadableMark) for mark in option.metadata)


def options_of(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield all options and sections below `model`, each section before what is in it.

    What is in options that are `Reloadable` is left out, as it is changed with them.

    An option's name is as `--set` takes it, with a * for the index of an item: `models.*.prefill.urls`.
    """
    for key, option in model.model_fields.items():
        name = f"{section}{key}"
        yield name, option
        inner = model_in(option.annotation)
        if inner is not None and not is_reloadable(option):
            yield from options_of(inner, f"{name}.*." if _is_list(option.annotation) else f"{name}.")


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model of an option's type, for instance of `PoolConfig | None` or `list[ModelConfig]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := model_in(arg))), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(_is_list(arg) for arg in get_args(annotation))
