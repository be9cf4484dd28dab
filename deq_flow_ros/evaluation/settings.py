# SPDX-License-Identifier: Apache-2.0
"""What is run on a recording: a method with its settings, and how those are written on a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from deq_flow_ros.model import choose_precision

METHODS = ("deq", "dis", "farneback")
"""This package's network; and OpenCV's dense inverse search and Farneback's method, to compare with."""


@dataclass(frozen=True)
class Setting:
    """One way of computing flow.

    :ivar name: unique within a run; stands in tables and plots.
    :ivar method: out of `METHODS`; of OpenCV's, only `direction` means anything.
    :ivar model: as `load_model` takes it: a name or a weights file.
    :ivar device: "cpu", "cuda" or "cuda:N".
    :ivar precision: of weights and features, as `load_model` has it; of "auto", what it stands for on the device.
    :ivar warm: start each pair from the fixed point of the one before.
    :ivar budget_ms: from a frame's arrival to its flow; None for no limit.
    :ivar max_iterations: per pair; `tolerance_px`, `direction`, `min_scale`, `max_scale`: see `EstimatorSettings`.
    :raises ValueError: for a method, device or precision that does not exist, or a name that cannot stand in a table.
    """

    name: str
    method: str = "deq"
    model: str = "nano"
    device: str = "cpu"
    precision: str = "auto"
    warm: bool = True
    budget_ms: float | None = None
    max_iterations: int = 12
    tolerance_px: float | None = 0.05
    direction: str = "forward"
    min_scale: float = 0.25
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"expected a method out of {', '.join(METHODS)}, got {self.method!r}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"expected the device cpu, cuda or cuda:N, got {self.device!r}")
        object.__setattr__(self, "precision", choose_precision(self.precision, self.device))
        if not self.name or not self.name.isprintable() or set(self.name) & set(":,="):
            raise ValueError(f"expected a name without : , = in it, got {self.name!r}")

    @property
    def solves(self) -> bool:
        """Whether there is a solver, with iterations and residuals."""
        return self.method == "deq"

    @property
    def network(self) -> tuple[str, str, str]:
        """What is loaded for it: model, device, precision."""
        return self.model, self.device, self.precision

    @property
    def note(self) -> str:
        """What it is, in a few words."""
        if not self.solves:
            return {"dis": "OpenCV DIS, medium preset", "farneback": "OpenCV Farneback"}[self.method]
        start = "warm starts" if self.warm else "every pair from a cold start"
        limit = "no time limit" if self.budget_ms is None else f"budget {self.budget_ms:g} ms"
        tolerance = "" if self.tolerance_px is None else f" or {self.tolerance_px:g} px"
        most = f"up to {self.max_iterations} iterations{tolerance}"
        return f"{Path(self.model).name} on {self.device} in {self.precision}, {start}, {most}, {limit}"


def parse_setting(text: str, base: Setting) -> Setting:
    """`NAME[:KEY=VALUE,...]` as a setting that differs from `base` in these values; `dis` or `farneback` alone is the
    method.

    Raises ValueError naming what is wrong.
    """
    name, colon, rest = text.partition(":")
    values: dict[str, Any] = {"name": name}
    if name in METHODS:
        values["method"] = name
    known = {field.name: field.type for field in fields(Setting)}
    for item in rest.split(",") if colon else ():
        key, equals, value = item.partition("=")
        if not equals or key not in known or key == "name":
            expected = ", ".join(key for key in known if key != "name")
            raise ValueError(f"expected NAME:KEY=VALUE,... with keys out of {expected}, got {text!r}")
        values[key] = _value(key, value, str(known[key]))
    return replace(base, **values)


def _value(key: str, text: str, type_name: str) -> Any:
    """The text as the type of a field, as it is written there."""
    kinds = type_name.split(" | ")
    if "None" in kinds and text.lower() == "none":
        return None
    try:
        if "bool" in kinds:
            return {"true": True, "false": False}[text.lower()]
        if "int" in kinds:
            return int(text)
        if "float" in kinds:
            number = float(text)
            if not math.isfinite(number):
                raise ValueError(text)
            return number
    except (KeyError, ValueError):
        raise ValueError(f"expected {key} to be {type_name.replace('bool', 'true or false')}, got {text!r}") from None
    return text


def all_settings(main: Setting, compared: Sequence[str]) -> list[Setting]:
    """The main setting and those of `--compare`, each of which differs from the main one in what it names.

    Raises ValueError where a text is no setting, or a name is there twice.
    """
    settings = [main, *(parse_setting(text, main) for text in compared)]
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected different names for the settings, got {', '.join(twice)} more than once")
    return settings
