# SPDX-License-Identifier: Apache-2.0
"""Settings as dataclasses whose values are checked (pydantic): of a run, of its optimizer and of generated clips."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")
ScheduleKind = Literal["trapezoid", "one-cycle"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleKind)
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

    kind: ScheduleKind = "trapezoid"
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
        done = step / self.steps if progress is None else progress
        if self.kind == "one-cycle":
            # The end points of PyTorch's OneCycleLR by default: rate / 25 at the start, 1e-4 of that at the end.
            first, last = self.rate / 25, 1 - 1 / self.steps if progress is None else 1.0
            peak = max(self.rise - (1 - last), 0.0)
            return float(np.interp(done, (0, peak, last), (first, self.rate, first * 1e-4)))
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
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


@dataclass(frozen=True, config=CHECKED)
class SceneSettings:
    """What is drawn. Shares are of all clips."""

    height: Annotated[Count, Field(ge=16)]
    width: Annotated[Count, Field(ge=16)]
    # Typical motion of background and layers between two frames: log-uniform between these.
    max_displacement_px: Positive
    min_displacement_px: Positive = 0.5
    frames: Annotated[Count, Field(ge=2)] = 3  # per clip
    max_layers: Annotated[Natural, Field(le=8)] = 8  # over the background
    static_share: Share = 0.06  # nothing moves but noise and light
    particle_share: Share = 0.08  # see ``particles``
    fine_share: Share = 0.06  # displacements of 0.05 to 1 px
    photographs: Natural = 0  # textures with indices below this are photographs, the ``patterns`` after them procedural
    patterns: Count = 120
    seed: Natural = 0  # another one, other clips
    photometric: Flag = True  # fog, shadows, changes of light and colour, blur and noise

    def __post_init__(self) -> None:
        low, high = self.min_displacement_px, self.width / 2
        if not low < self.max_displacement_px <= high:
            raise ValueError(f"max_displacement_px: expected above min_displacement_px, {low}, and at most half the "
                             f"width, {high}, got {self.max_displacement_px}")  # fmt: skip
        if (shares := self.static_share + self.particle_share + self.fine_share) > 1:
            raise ValueError(f"static_share + particle_share + fine_share: expected at most 1, got {shares}")


class Dice(np.random.Generator):
    """Random numbers for a clip of these settings: those of ``np.random.default_rng(seed)``."""

    def __init__(self, settings: SceneSettings, seed: int | Sequence[int]) -> None:
        super().__init__(np.random.PCG64(seed))
        self.settings = settings

    def pick(self, weights: dict[Any, float]) -> Any:
        """Draw a key with its weight (they sum to 1); a tenth of the time of ``choice``."""
        rest = self.random()
        for key, weight in weights.items():
            rest -= weight
            if rest < 0:
                return key
        return key

    def sign(self) -> float:
        """1 or -1."""
        return 1.0 if self.random() < 0.5 else -1.0

    def log_uniform(self, low: float, high: float) -> float:
        """A number in low..high, every factor equally likely."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def layer_count(self) -> int:
        """0 to max_layers, about 3 on average: few things are the rule, many the exception."""
        weights = {0: 0.06, 1: 0.14, 2: 0.18, 3: 0.2, 4: 0.16, 5: 0.1, 6: 0.07, 7: 0.05, 8: 0.04}
        return min(self.pick(weights), self.settings.max_layers)

    def object_radius(self) -> float:
        """Half the size of an object in px: its size is log-uniform from 7 % to 70 % of the frame."""
        return 0.5 * self.log_uniform(0.07, 0.7) * float(np.sqrt(self.settings.height * self.settings.width))

    def thin_px(self, most: float = 4.0) -> float:
        """A thickness of 1 to ``most`` px, in proportion in frames wider than 400 px."""
        return self.log_uniform(1, most) * max(1.0, self.settings.width / 400)

    def schedule(self) -> np.ndarray:
        """Progress of a motion at each frame, (T,): 0, 1, about 2 (+- 0.3), ...: near-constant velocity."""
        frames = self.settings.frames
        steps = np.concatenate([[0.0, 1.0], 1 + self.uniform(-0.3, 0.3, max(0, frames - 2))])
        return np.cumsum(steps)[:frames]
