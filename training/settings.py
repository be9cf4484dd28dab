# SPDX-License-Identifier: Apache-2.0
"""Settings as dataclasses whose values are checked (pydantic), among them those of a run's length and optimizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")
CHECKED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Float = Annotated[float, BeforeValidator(_number)]  # from text as well: YAML 1.1 takes 5e-4 for text
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Side = Annotated[int, Field(strict=True, ge=16, multiple_of=8)]
Flag = Annotated[bool, Field(strict=True)]  # else 1 and "off" are taken as well


class RecipeError(ValueError):
    """Settings that cannot be used, and why."""


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Settings from plain values, nested as the settings are.

    :raises RecipeError: naming the first value that is wrong or missing, or the first key that is unknown.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if first["type"] == "unexpected_keyword_argument":
            known = {name.rsplit(".", 1)[-1]: name for name in reversed(list(_names(kind)))}
            near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
            section = where.rpartition(".")[0]
            there = [name for name in _names(kind) if name.rpartition(".")[0] == section]
            hint = f" (did you mean {known[near[0]]!r}?)" if near else f": there are {', '.join(there)}"
            raise RecipeError(f"unknown key {where!r}{hint}") from None
        if first["type"] == "missing":
            raise RecipeError(f"{where} is missing") from None
        if not isinstance(first["input"], Mapping) and not is_dataclass(first["input"]) and where:
            message += f", got {first['input']!r}"
        raise RecipeError(f"{where}: {message}" if where else message) from None


def parse_change(text: str) -> dict[str, Any]:
    """``section.key=value`` with a value in YAML, as a nested mapping; ``RecipeError`` if it is not such."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"expected KEY=VALUE, as schedule.steps=1000, got {text!r}")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r}: the value is not YAML: {error}") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _names(section: Any, path: str = "") -> Iterator[str]:
    """The dotted names of all that a section has."""
    for name, kind in get_type_hints(section).items():
        yield path + name
        for part in filter(is_dataclass, (kind, *get_args(kind))):
            yield from _names(part, f"{path}{name}.")


@dataclass(frozen=True, config=CHECKED)
class Schedule:
    """How long is trained, and at what rate. Shares are of the steps of the run, or of its time if that is given.

    "trapezoid": the rate rises for ``warmup`` steps, stays until the share ``stable``, then falls linearly to zero
    (warmup-stable-decay, arXiv 2404.06395). "one-cycle": up, until the share ``rise``, and down in straight lines
    (Smith and Topin, arXiv 1708.07120), as RAFT trains (arXiv 2003.12039).
    """

    kind: Literal["trapezoid", "one-cycle"] = "trapezoid"
    steps: Count = 20_000  # of the whole run
    seconds: Positive | None = None  # the time instead, of all starts, with loading, validation and saving
    rate: Annotated[Positive, Field(lt=1)] = 5e-4  # the largest
    warmup: Natural = 200
    stable: Annotated[Share, Field(lt=1)] = 0.6
    rise: Annotated[Positive, Field(lt=1)] = 0.05

    def rate_at(self, step: int, progress: float | None = None) -> float:
        """Rate of the step that begins at ``step``, counted from 0.

        :param progress: share of the time that has passed, 0 to 1, for a timed schedule.
        """
        if self.kind == "one-cycle":
            # The end points of PyTorch's OneCycleLR by default: rate / 25 at the start, 1e-4 of that at the end.
            first = self.rate / 25
            peak, last = max(self.rise * self.steps - 1, 0.0), float(self.steps - 1)
            position = float(step)
            if progress is not None:
                peak, last, position = self.rise, 1.0, progress
            return float(np.interp(position, (0, peak, last), (first, self.rate, first * 1e-4)))
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        done = step / self.steps if progress is None else progress
        return self.rate * min(rising, max(0.0, (1 - done) / (1 - self.stable)))


@dataclass(frozen=True, config=CHECKED)
class Optimization:
    """AdamW and what surrounds it."""

    weight_decay: NotNegative = 1e-4
    clip: Positive = 1.0  # largest norm of the gradient
    ema: Annotated[Share, Field(lt=1)] = 0.999  # decay of the averaged weights per step
    freeze_batch_norm: Flag = False  # keep the stored statistics; for every stage after the first, as RAFT does
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 on CUDA, fp32 on a CPU, where bf16 mostly is slow


def parse_duration(text: str) -> float:
    """Seconds of a time such as ``90s``, ``28m`` or ``1.5h``; ``ValueError`` if it is not such, or not above 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"expected a time above 0 as 90s, 28m or 1.5h, got {text!r}")
    return seconds
