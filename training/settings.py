# SPDX-License-Identifier: Apache-2.0
"""Settings as dataclasses whose values are checked (pydantic), and what is said of a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

T = TypeVar("T")
CHECKED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
"""The configuration of all settings: keys that there are not are refused."""


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Float = Annotated[float, BeforeValidator(_number)]  # from text as well: YAML 1.1 takes 5e-4 for text
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]


class RecipeError(ValueError):
    """Settings that cannot be used, and why."""


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Settings from plain values, nested as the settings are.

    :raises RecipeError: naming the first value that is wrong or missing, or the first key that is unknown.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "unexpected_keyword_argument":
            raise RecipeError(f"unknown key {where!r}") from None
        if first["type"] == "missing":
            raise RecipeError(f"{where} is missing") from None
        if not isinstance(first["input"], (Mapping, kind)) and where:
            message += f", got {first['input']!r}"
        raise RecipeError(f"{where}: {message}" if where else message) from None
