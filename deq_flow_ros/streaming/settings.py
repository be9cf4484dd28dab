# SPDX-License-Identifier: Apache-2.0
"""The settings of a stream, which are checked together, and the palette that is one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

DIRECTIONS = ("forward", "backward")
# At larger scales, most of an image would be interpolated, and even a small one would reach ``plan.MAX_PIXELS``.
LARGEST_SCALE = 4.0


@dataclass(frozen=True, eq=False)
class Palette:
    """The colours of vectors.

    :ivar table: ((2 radius + 5)**2, 3) uint8 RGB, the colour of each vector from ``(-radius - 2, -radius - 2)`` on, x
        innermost. The outer two steps are for vectors that are too long.
    :ivar radius: the number of steps from no motion to ``max_px``.
    :ivar max_px: length of the longest vector that is not too long; None: the longest finite one of each field, but at
        least 1 px.
    """

    table: np.ndarray
    radius: int
    max_px: float | None = None


@dataclass(frozen=True)
class EstimatorSettings:
    """The settings of a ``FlowEstimator``.

    :ivar latency_budget_ms: time from the arrival of a frame to its result; None: no limit.
    :ivar max_iterations: largest number of iterations per pair, >= 1.
    :ivar tolerance_px: a solve stops when the RMS update is at most this, in pixels of the input; None: it never does.
    :ivar direction: "forward" (flow on the pixels of the earlier image) or "backward" (on those of the later one).
    :ivar min_scale: the smallest processing scale, above 0 and at most ``max_scale``.
    :ivar max_scale: the largest processing scale, at most 4. Above 1, frames are enlarged, for finer flow.
    :ivar max_gap_ms: a longer time between two frames starts the stream anew.
    :ivar warm: whether to start each pair from the fixed point of the last one. False is for comparisons.
    :ivar residual: whether to compute the length of the last update of each pixel.
    :ivar uncertainty: whether to compute the expected error of each pixel; needs weights with a head for it.
    :ivar refinement: steps of the refinement after the network (``fields.refined``), 0 to 20; 0: none. It runs on
        the CPU, whatever device the network runs on.
    :ivar palette: also paint the flow with it, if the device does that sooner than the host; None: do not.
    :raises ValueError: for other values; the message names the setting, its range and the value.
    """

    latency_budget_ms: float | None = None
    max_iterations: int = 6
    tolerance_px: float | None = 0.1
    direction: str = "forward"
    min_scale: float = 0.25
    max_scale: float = 1.0
    max_gap_ms: float = 1000.0
    warm: bool = True
    residual: bool = True
    uncertainty: bool = False
    refinement: int = 0
    palette: Palette | None = None

    def __post_init__(self) -> None:
        scales = f"in (0, {LARGEST_SCALE:g}]"
        for name, ok, expected in (
            ("latency_budget_ms", self.latency_budget_ms is None or _positive(self.latency_budget_ms), "> 0 or None"),
            ("max_iterations", _positive(self.max_iterations) and self.max_iterations % 1 == 0, "a whole number >= 1"),
            ("tolerance_px", self.tolerance_px is None or _positive(self.tolerance_px), "> 0 or None"),
            ("direction", self.direction in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}"),
            ("max_scale", _positive(self.max_scale) and self.max_scale <= LARGEST_SCALE, scales),
            ("min_scale", _positive(self.min_scale) and self.min_scale <= LARGEST_SCALE, scales),
            ("max_gap_ms", _positive(self.max_gap_ms), "> 0"),
            ("warm", isinstance(self.warm, bool), "True or False"),
            ("residual", isinstance(self.residual, bool), "True or False"),
            ("uncertainty", isinstance(self.uncertainty, bool), "True or False"),
            ("refinement", type(self.refinement) is int and 0 <= self.refinement <= 20, "a whole number from 0 to 20"),
            ("palette", self.palette is None or isinstance(self.palette, Palette), "a Palette or None"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        if self.min_scale > self.max_scale:
            got = f"min_scale {self.min_scale!r} and max_scale {self.max_scale!r}"
            raise ValueError(f"min_scale must be at most max_scale, got {got}; change both")

    def changed(self, **settings: Any) -> EstimatorSettings:
        """A copy with some settings changed, which are checked together.

        :raises ValueError: for an unknown name, or for a value outside of its range.
        """
        known = [field.name for field in fields(self)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"no setting {', '.join(unknown)}; expected some of {', '.join(known)}")
        return replace(self, **settings)

    @property
    def solver(self) -> tuple[object, ...]:
        """The settings that two pairs must share to be solved as one batch."""
        return self.direction, self.max_iterations, self.tolerance_px


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
