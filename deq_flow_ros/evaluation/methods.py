# SPDX-License-Identifier: Apache-2.0
"""The methods that compute flow, ``FlowEstimator`` and OpenCV's with the same interface, and their settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from deq_flow_ros import did_you_mean
from deq_flow_ros.model import DEQFlow, choose_precision, load_model
from deq_flow_ros.streaming import EstimatorSettings, FlowEstimator, FlowInfo, FlowResult
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.continuity import Seen

METHODS = {"deq": "", "dis": "OpenCV DIS, medium preset", "farneback": "OpenCV Farneback"}
"""The network of this package, and two classical methods of OpenCV to compare it with."""
OF_ALL_METHODS = ("method", "direction", "max_gap_ms")
"""What can be set of OpenCV's methods as well."""
PARAMETERS = ("warm", "tolerance_px", "min_scale", "max_scale", "uncertainty", "refinement", "max_gap_ms")
"""What ``--param`` can set."""


@dataclass(frozen=True)
class Setting:
    """One method of computing flow, with its settings: those of ``load_model`` and of ``EstimatorSettings``.

    :ivar name: unique within a run; it appears in tables and plots.
    :ivar method: one of ``METHODS``; OpenCV's methods use ``OF_ALL_METHODS`` only.
    :ivar precision: "auto" is replaced by the precision that it stands for.
    :ivar budget_ms: time from the arrival of a frame to its flow, in ms; None: no limit.
    :ivar max_gap_ms: None: the default, or three periods of the recording if that is longer.
    :raises ValueError: for a value that is unknown or impossible, or a name that cannot appear in a table.
    """

    name: str
    method: str = "deq"
    model: str = "nano"
    device: str = "cpu"
    precision: str = "auto"
    warm: bool = EstimatorSettings.warm
    budget_ms: float | None = EstimatorSettings.latency_budget_ms
    max_iterations: int = EstimatorSettings.max_iterations
    tolerance_px: float | None = EstimatorSettings.tolerance_px
    direction: str = EstimatorSettings.direction
    min_scale: float = EstimatorSettings.min_scale
    max_scale: float = EstimatorSettings.max_scale
    uncertainty: bool = EstimatorSettings.uncertainty
    refinement: int = EstimatorSettings.refinement
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
        """Model, device and precision, as ``load_model`` takes them."""
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


def with_parameters(setting: Setting, texts: Mapping[str, str]) -> Setting:
    """Change a setting by the values of parameters of flow_node. A budget or tolerance of 0 means none.

    :raises ValueError: for a text that is wrong; the message says why.
    """
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in PARAMETERS:
            raise ValueError(
                f"expected --param with one of {', '.join(PARAMETERS)}, which the flow depends on, got {name}"
                f"{did_you_mean(name, PARAMETERS)}; the other parameters of flow_node can be set with --live only"
            )
        _set(values, name, text, "with --param")
    return replace(setting, **values)


def parse_setting(text: str, base: Setting) -> Setting:
    """Read ``NAME[:KEY=VALUE,...]`` as a setting that differs from ``base`` in these values, or the name of a method.

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
        _set(values, key, value, f"in {text!r}")
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
_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {
    "bool": ({"true": True, "false": False}.__getitem__, "true or false"), "int": (int, "a whole number"),
    "float": (float, "a number"), "str": (str, "a text"),
}  # fmt: skip


def _set(values: dict[str, Any], key: str, text: str, where: str) -> None:
    """Add the value of a text. A budget or tolerance of 0 means none."""
    if key in values:
        raise ValueError(f"expected one value of {key}, got several {where}")
    kind, _, optional = _KINDS[key].partition(" | ")
    convert, words = _TYPES[kind]
    try:
        value = None if optional and text.lower() == "none" else convert(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"expected {key} to be {words}{' or none' if optional else ''}, got {text!r}") from None
    values[key] = None if key in ("budget_ms", "tolerance_px") and value == 0 else value


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


FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes image 1 and image 2, (H, W, 3) uint8 RGB; returns the flow (H, W, 2) float32 px on the pixels of image 1."""
Models = Mapping[tuple[str, str, str], DEQFlow]  # by ``Setting.network``


def farneback(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """Farneback's method (2003) with the settings of OpenCV's examples, as a ``FlowFunction``."""
    return cv2.calcOpticalFlowFarneback(
        _grey(image1), _grey(image2), None, pyr_scale=0.5, levels=5, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2,
        flags=0,
    )  # fmt: skip


def dense_inverse_search(preset: int = cv2.DISOPTICAL_FLOW_PRESET_MEDIUM) -> FlowFunction:
    """DIS flow (Kroeger et al., 2016) with one of OpenCV's presets."""
    method = cv2.DISOpticalFlow.create(preset)
    return lambda image1, image2: method.calc(_grey(image1), _grey(image2), None)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


class ClassicalEstimator:
    """One of OpenCV's methods on a stream. It starts anew under the same conditions as ``FlowEstimator``."""

    left_out: str | None = None

    def __init__(self, setting: Setting, clock: Clock) -> None:
        self.reset_reason: str | None = "start"
        self._direction, self._clock, self._stages = setting.direction, clock, clock.stages(torch.device("cpu"))
        self._flow = farneback if setting.method == "farneback" else dense_inverse_search()
        self._max_gap_ms = setting.max_gap_ms or EstimatorSettings().max_gap_ms
        self._previous: tuple[np.ndarray, Seen] | None = None

    def update(self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None) -> FlowResult | None:
        arrival_ns = self._clock.now_ns() if arrival_ns is None else arrival_ns
        seen = Seen.of(frame, stamp_ns)
        if self._previous is not None and (reason := seen.break_after(self._previous[1], self._max_gap_ms)):
            self.reset(reason)
        previous, self._previous = self._previous, (frame, seen)
        if previous is None:
            return None
        self._stages.begin(frame.shape[0] * frame.shape[1])
        images = (previous[0], frame) if self._direction == "forward" else (frame, previous[0])
        flow = self._stages.counted(self._flow)(*images)
        self._stages.lap("solve")
        info = FlowInfo(
            stamp_ns, previous[1].stamp_ns, self._direction, iterations=0, stop_reason="", warm=False,
            residual_px=float("nan"), reset_reason=self.reset_reason, scale=1.0, stage_ms=self._stages.read(),
            latency_ms=(self._clock.now_ns() - arrival_ns) / 1e6, budget_ms=None,
        )  # fmt: skip
        self.reset_reason = None
        return FlowResult(flow, None, info)

    def prepare(self) -> None: ...

    def warm_up(self, height: int, width: int) -> None: ...

    def reset(self, reason: str) -> None:
        self.reset_reason, self._previous = reason, None


Estimator = FlowEstimator | ClassicalEstimator


def make_estimator(setting: Setting, model: DEQFlow | None, clock: Clock | None = None) -> Estimator:
    """The estimator of a setting; without a ``clock``, by that of the machine.

    :raises ValueError: for impossible settings.
    """
    clock = clock or Clock()
    if not setting.solves:
        return ClassicalEstimator(setting, clock)
    assert model is not None
    same = {field.name for field in fields(EstimatorSettings)} & vars(setting).keys()
    values = {name: getattr(setting, name) for name in same if name != "max_gap_ms" or setting.max_gap_ms is not None}
    # Graphs would be captured during the recording, so that no two runs would use the same operations.
    return FlowEstimator(model, clock, "eager", latency_budget_ms=setting.budget_ms, **values)


class ReverseFlow:
    """Computes the flow in the other direction for some pairs, the first one included, from a cold start each.

    :param every: the least number of frames from one such pair to the next.
    """

    def __init__(self, setting: Setting, model: DEQFlow | None, every: int) -> None:
        direction = "backward" if setting.direction == "forward" else "forward"
        self._estimator = make_estimator(replace(setting, direction=direction, budget_ms=None, warm=False), model)
        self._every, self._next_index = every, 0

    def of(self, index: int, image1: np.ndarray, image2: np.ndarray) -> np.ndarray | None:
        """The flow (H, W, 2) px of the pair whose later frame has this index; None if the pair is not one of those."""
        if index < self._next_index:
            return None
        self._next_index = index + self._every
        self._estimator.reset("another pair")
        self._estimator.update(image1, 0)
        result = self._estimator.update(image2, 1)
        return None if result is None else result.flow


def load_models(settings: Iterable[Setting]) -> Models:
    """Load every model that the settings name. It fails as ``load_model`` does."""
    wanted = {setting.network for setting in settings if setting.solves}
    return {network: load_model(*network[:2], precision=network[2]) for network in sorted(wanted)}


@contextmanager
def deterministic() -> Iterator[None]:
    """A context in which a machine computes exactly the same flow in every run. Some GPU operations get slower."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations have no deterministic form
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
