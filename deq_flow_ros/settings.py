# SPDX-License-Identifier: Apache-2.0
"""Fields of dataclasses of settings that say what is allowed and what for; a node declares its parameters from them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any


@dataclasses.dataclass(frozen=True)
class Value:
    """The allowed values of a setting: a number from ``minimum`` to ``maximum`` in a unit, or one of ``choices``."""

    default: Any
    minimum: float | None = None
    maximum: float | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()


number = Value


def one_of(default: str, *others: str) -> Value:
    """A setting whose value is one of these words."""
    return Value(default, choices=(default, *others))


def configured(value: Any, description: str, when: str = "configure") -> Any:
    """A field of a dataclass of settings.

    :param value: the allowed values, or only the default.
    :param description: what the setting is for.
    :param when: when it is read: in "configure"; "live", so that a change takes effect with the next image; at "start".
    """
    value = value if isinstance(value, Value) else Value(value)
    about = {**vars(value), "description": description, "live": when == "live", "at_start": when == "start"}
    return dataclasses.field(default=about.pop("default"), metadata=about)


live = partial(configured, when="live")
at_start = partial(configured, when="start")
