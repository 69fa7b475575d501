"""Strict, typed settings: what is wrong becomes one sentence that names the key, the value and what was expected."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from raysseg.errors import InputError, nearest_name

SettingsT = TypeVar("SettingsT", bound="Settings")


class Settings(pydantic.BaseModel):
    """Base of every settings class: frozen, and closed to unknown keys; each field's `description` says its source."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


def _fields_at(model: type[pydantic.BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the (nested) settings class that holds the last part of `location`."""
    current: Any = model
    for part in location[:-1]:
        if not (isinstance(current, type) and issubclass(current, pydantic.BaseModel)):
            return []
        field = current.model_fields.get(str(part))
        if field is None:
            return []
        candidates = [field.annotation, *typing.get_args(field.annotation)]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)
    if isinstance(current, type) and issubclass(current, pydantic.BaseModel):
        return list(current.model_fields)
    return []


def load_settings(model: type[SettingsT], values: Mapping[str, Any], *, where: str = "the configuration") -> SettingsT:
    """Builds a settings object from plain values.

    Args:
        model: the settings class.
        values: nested plain values, as read from YAML.
        where: what the values came from, for the message (a recipe's name, a file).

    Raises:
        InputError: for the first unknown key, wrong type, value out of range or impossible combination.
    """
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = tuple(first["loc"])
        key = ".".join(str(part) for part in location)
        if first["type"] == "extra_forbidden":
            hint = nearest_name(str(location[-1]), _fields_at(model, location))
            raise InputError(f"Unknown key '{key}' in {where}{hint}") from None
        if first["type"] == "missing":
            raise InputError(f"The key '{key}' is missing in {where}.") from None
        message = str(first["msg"]).removeprefix("Value error, ")
        if not key:
            raise InputError(f"In {where}: {message}") from None
        if isinstance(first["input"], (Mapping, pydantic.BaseModel)):
            raise InputError(f"In the section '{key}' of {where}: {message}.") from None
        raise InputError(f"The key '{key}' in {where} has the value {first['input']!r}: {message}.") from None
