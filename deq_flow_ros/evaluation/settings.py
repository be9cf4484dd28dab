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
OF_ALL_METHODS = ("method", "direction", "max_gap_ms")
"""What can be set of OpenCV's methods as well."""


@dataclass(frozen=True)
class Setting:
    """One method of computing flow, with its settings.

    :ivar name: unique within a run; it appears in tables and plots.
    :ivar method: one of ``METHODS``; OpenCV's methods use ``OF_ALL_METHODS`` only.
    :ivar model: see ``load_model``.
    :ivar device: "cpu", "cuda" or "cuda:N".
    :ivar precision: see ``load_model``; "auto" is replaced by the precision that it stands for.
    :ivar warm: see ``EstimatorSettings``, as for all that follow.
    :ivar budget_ms: time from the arrival of a frame to its flow, in ms; None: no limit.
    :ivar max_gap_ms: None: the default, or three periods of the recording if that is longer.
    :raises ValueError: for an unknown method, device or precision, a gap that is none, or a name that cannot appear in
        a table.
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
        if self.max_gap_ms is not None and self.max_gap_ms <= 0:
            raise ValueError(f"expected max_gap_ms above 0, got {self.max_gap_ms:g}")
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
                f"expected --param with one of {', '.join(known)}, which the flow depends on, got {name}"
                f"{did_you_mean(name, known)}; the other parameters of flow_node can be set with --live only"
            )
        _set(values, known[name].name, value, name, "with --param")
    return replace(setting, **values)


def parse_setting(text: str, base: Setting) -> Setting:
    """Read ``NAME[:KEY=VALUE,...]`` as a setting that differs from ``base`` in these values.

    A name that is a method, ``dis`` or ``farneback``, chooses that method.

    :raises ValueError: for a text that is wrong; the message says why.
    """
    name, colon, rest = text.partition(":")
    values: dict[str, Any] = {}
    if name not in METHODS and not colon:  # the same setting once more, under the name of a method that was misspelt
        raise ValueError(
            f"expected a method ({', '.join(METHODS)}) or NAME:KEY=VALUE,..., got {text!r}"
            f"{did_you_mean(text, METHODS)}; name the recording before --compare"
        )
    for item in rest.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not equals or key not in _KINDS:
            hint = did_you_mean(key, _KINDS) if equals else ""
            raise ValueError(f"expected NAME:KEY=VALUE,... with the keys {', '.join(_KINDS)}, got {text!r}{hint}")
        _set(values, key, value, key, f"in {text!r}")
    method = values.setdefault("method", name if name in METHODS else base.method)
    if name in METHODS and method != name:
        raise ValueError(f"expected another name for the method {method} than that of the method {name}, got {text!r}")
    if method != "deq" and (foreign := [key for key in values if key not in OF_ALL_METHODS]):
        raise ValueError(
            f"the method {method} has no {' and no '.join(foreign)}; what can be set of it is "
            f"{' and '.join(OF_ALL_METHODS[1:])}, got {text!r}"
        )
    return replace(base, name=name, **values)


_KINDS = {field.name: str(field.type) for field in fields(Setting) if field.name != "name"}


def _set(values: dict[str, Any], key: str, text: str, name: str, where: str) -> None:
    """Add the value of a text, which the user calls ``name``.

    :raises ValueError: if it is wrong, or there is one already. A budget or tolerance of 0 means none.
    """
    if key in values:
        raise ValueError(f"expected one value of {name}, got several {where}")
    value = _value(name, text, _KINDS[key])
    values[key] = None if key in ("budget_ms", "tolerance_px") and value == 0 else value


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
        words = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(kind, type_name)
        raise ValueError(f"expected {key} to be {words}{' or none' if optional else ''}, got {text!r}") from None
    return value


def all_settings(main: Setting, compared: Sequence[str]) -> tuple[Setting, ...]:
    """The main setting and those of ``--compare``.

    :raises ValueError: for a text that is not a setting, or a name that occurs twice.
    """
    settings = (main, *(parse_setting(text, main) for text in compared))
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        taken = f"(the main one is {main.name})"
        raise ValueError(f"expected different names for the settings {taken}, got {', '.join(twice)} more than once")
    return settings
