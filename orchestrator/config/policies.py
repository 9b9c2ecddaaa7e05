"""A routing policy stands in the config as its name, or as a mapping with its arguments.

    prefill: round_robin
    prefill: {policy: NAME, ARGUMENT: value}

The table of `routing/policies/` says which policies there are, and with which arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from orchestrator.config.base import Model
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Argument, PolicySpec

NAME: Final = "policy"  # the key beside the arguments
NAMED: Final = "The keys beside this one are arguments of the policy with this name."


class PolicyConfig(Model):
    """A policy's arguments are the fields of a subclass for each policy, made from its `PolicySpec`."""

    policy: str = Field(description=NAMED)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        """Refuse arguments that do not fit each other, or make no sense."""
        spec = POLICIES.get(self.policy)
        wrong = None if spec is None or spec.fault is None else spec.fault(self.arguments)
        if wrong is not None:
            raise ValueError(wrong)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self if name != NAME}

    def shortest(self) -> str | dict[str, Any]:
        """Return the policy as one would write it: only the name if all arguments are as by default."""
        given = {name: value for name, value in self if value != type(self).model_fields[name].get_default()}
        return given if given.keys() - {NAME} else self.policy


def policy_named(name: str) -> PolicyConfig:
    """Return the policy with the arguments that it has by default."""
    return model_of(POLICIES[name]).model_validate({NAME: name})


@functools.cache
def model_of(spec: PolicySpec) -> type[PolicyConfig]:
    fields: dict[str, Any] = {argument.name: _field_of(argument) for argument in spec.arguments}
    name = Literal[spec.name]  # type: ignore[name-defined]
    fields[NAME] = (name, Field(description=NAMED))
    made: type[PolicyConfig] = create_model(
        spec.name,
        __base__=PolicyConfig,
        __doc__=spec.description,
        **fields,
    )
    return made


def _field_of(argument: Argument) -> tuple[Any, Any]:
    kind: Any = list[str] if isinstance(argument.default, list) else type(argument.default)
    if argument.choices:
        kind = Literal[argument.choices]
    return kind, Field(
        argument.default, description=argument.description, ge=argument.least, le=argument.most
    )


def model_for(given: Any) -> type[PolicyConfig]:
    """Return the model of the policy that a mapping of the file names; the common one if it names none."""
    spec = POLICIES.get(str(given.get(NAME))) if isinstance(given, Mapping) else None
    return PolicyConfig if spec is None else model_of(spec)


class _ByName:
    """This makes pydantic take a policy in both forms, and look into the table at each validation."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _validated, serialization=core_schema.plain_serializer_function_ser_schema(PolicyConfig.shortest)
        )

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"enum": [*POLICIES]}, *map(_json_schema, POLICIES.values())]}


Policy = Annotated[PolicyConfig, _ByName()]


def _validated(given: Any) -> PolicyConfig:
    if isinstance(given, PolicyConfig):
        return given
    if isinstance(given, str):
        if given not in POLICIES:
            raise _unknown()
        return policy_named(given)
    if not isinstance(given, Mapping):
        raise ValueError("expected the name of a policy, or a mapping with `policy` and its arguments")
    if isinstance(given.get(NAME), str) and given[NAME] not in POLICIES:
        details = InitErrorDetails(type=_unknown(), loc=(NAME,), input=given[NAME])
        raise ValidationError.from_exception_data(NAME, [details])
    if NAME not in given and (meant := get_close_matches(NAME, map(str, given), n=1)):
        raise ValueError(f"unknown key {meant[0]!r}, did you mean {NAME!r}?")
    model = model_for(given)
    known = given if model is not PolicyConfig else {key: given[key] for key in given if key == NAME}
    return model.model_validate(known)


def _unknown() -> PydanticCustomError:
    return PydanticCustomError("unknown_policy", "there is no such policy")


def _json_schema(spec: PolicySpec) -> dict[str, Any]:
    schema = model_of(spec).model_json_schema()
    return {**schema, "required": [NAME]}
