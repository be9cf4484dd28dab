# SPDX-License-Identifier: Apache-2.0
"""The settings of a method that is run on a recording, and their form on a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from deq_flow_ros.model import choose_precision
from deq_flow_ros.spelling import did_you_mean

METHODS = {"deq": "", "dis": "OpenCV DIS, medium preset", "farneback": "OpenCV Farneback"}
"""The network of this package, and two classical methods of OpenCV to compare it with."""


@dataclass(frozen=True)
class Setting:
    """One method of computing flow, with its settings.

    :ivar name: unique within a run; it appears in tables and plots.
    :ivar method: one of ``METHODS``; OpenCV's methods use ``direction`` only.
    :ivar model: see ``load_model``.
    :ivar device: "cpu", "cuda" or "cuda:N".
    :ivar precision: see ``load_model``; "auto" is replaced by the precision that it stands for.
    :ivar warm: see ``EstimatorSettings``, as for all that follow.
    :ivar budget_ms: time from the arrival of a frame to its flow, in ms; None: no limit.
    :ivar max_gap_ms: None: the default, or three periods of the recording if that is longer.
    :raises ValueError: for an unknown method, device or precision, or a name that cannot appear in a table.
    """

    name: str
    method: str = "deq"
    model: str = "nano"
    device: str = "cpu"
    precision: str = "auto"
    warm: bool = True
    budget_ms: float | None = None
    max_iterations: int = 6
    tolerance_px: float | None = 0.1
    direction: str = "forward"
    min_scale: float = 0.25
    max_scale: float = 1.0
    uncertainty: bool = False
    refinement: int = 0
    max_gap_ms: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"expected one of the methods {', '.join(METHODS)}, got {self.method!r}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"expected the device cpu, cuda or cuda:N, got {self.device!r}")
        object.__setattr__(self, "precision", choose_precision(self.precision, self.device))
        if not self.name or not self.name.isprintable() or set(self.name) & set(":,="):
            raise ValueError(f"expected a name without the characters : , =, got {self.name!r}")

    @property
    def solves(self) -> bool:
        """Whether the method has a solver, with iterations and residuals."""
        return self.method == "deq"

    @property
    def network(self) -> tuple[str, str, str]:
        """The arguments of ``load_model``: model, device, precision."""
        return self.model, self.device, self.precision

    @property
    def note(self) -> str:
        """A short description for people."""
        if not self.solves:
            return METHODS[self.method]
        start = "warm starts" if self.warm else "every pair from a cold start"
        limit = "no time limit" if self.budget_ms is None else f"budget {self.budget_ms:g} ms"
        tolerance = "" if self.tolerance_px is None else f" or {self.tolerance_px:g} px"
        most = f"up to {self.max_iterations} iterations{tolerance}"
        return f"{Path(self.model).name} on {self.device} in {self.precision}, {start}, {most}, {limit}"


def with_parameters(setting: Setting, texts: Sequence[str]) -> Setting:
    """Change a setting by parameters of flow_node, ``NAME:=VALUE``. A budget or tolerance of 0 means none.

    :raises ValueError: for a text that is wrong; the message says why.
    """
    known = {"latency_budget_ms" if f.name == "budget_ms" else f.name: f for f in fields(Setting)[2:]}
    values: dict[str, Any] = {}
    for text in texts:
        name, assigned, value = text.partition(":=")
        if not assigned:
            raise ValueError(f"expected --param NAME:=VALUE, got {text!r}")
        if name not in known:
            raise ValueError(
                f"expected --param with one of {', '.join(known)}, which the flow depends on, got {name}; the other "
                "parameters of flow_node can be set with --live only"
            )
        given = _value(name, value, str(known[name].type))
        values[known[name].name] = None if "None" in str(known[name].type) and given == 0 else given
    return replace(setting, **values)


def parse_setting(text: str, base: Setting) -> Setting:
    """Read ``NAME[:KEY=VALUE,...]`` as a setting that differs from ``base`` in these values.

    A name that is a method, ``dis`` or ``farneback``, chooses that method.

    :raises ValueError: for a text that is wrong; the message says why.
    """
    name, colon, rest = text.partition(":")
    values: dict[str, Any] = {"name": name}
    if name in METHODS:
        values["method"] = name
    elif not colon:  # the same setting once more, under the name of a method that was misspelt
        raise ValueError(
            f"expected a method ({', '.join(METHODS)}) or NAME:KEY=VALUE,..., got {text!r}"
            f"{did_you_mean(text, METHODS)}; name the recording before --compare"
        )
    known = {field.name: str(field.type) for field in fields(Setting) if field.name != "name"}
    for item in rest.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            raise ValueError(f"expected NAME:KEY=VALUE,... with the keys {', '.join(known)}, got {text!r}")
        values[key] = _value(key, value, known[key])
    return replace(base, **values)


_TYPES: dict[str, Callable[[str], Any]] = {
    "bool": {"true": True, "false": False}.__getitem__, "int": int, "float": float, "str": str,
}  # fmt: skip


def _value(key: str, text: str, type_name: str) -> Any:
    """Convert a text to the type of a field, which is given as in the class definition."""
    kind, _, optional = type_name.partition(" | ")
    if optional and text.lower() == "none":
        return None
    try:
        value = _TYPES[kind](text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"expected {key} to be {type_name.replace('bool', 'true or false')}, got {text!r}") from None
    return value


def all_settings(main: Setting, compared: Sequence[str]) -> tuple[Setting, ...]:
    """The main setting and those of ``--compare``.

    :raises ValueError: for a text that is not a setting, or a name that occurs twice.
    """
    settings = (main, *(parse_setting(text, main) for text in compared))
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected different names for the settings, got {', '.join(twice)} more than once")
    return settings
