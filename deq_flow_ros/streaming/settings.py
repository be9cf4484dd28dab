# SPDX-License-Identifier: Apache-2.0
"""What a stream is estimated with: one set of values, checked together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

DIRECTIONS = ("forward", "backward")
# Beyond, an image is mostly invented by its interpolation, and a small one already reaches ``costs.MAX_PIXELS``.
LARGEST_SCALE = 4.0


@dataclass(frozen=True)
class EstimatorSettings:
    """The settings of a ``FlowEstimator``.

    :ivar latency_budget_ms: from a frame's arrival to its result; None for no limit.
    :ivar max_iterations: per pair, >= 1.
    :ivar tolerance_px: stop when the RMS update is at or below this, in pixels of the input; None: iterate to the cap.
    :ivar direction: "forward" (flow on the earlier image's pixels) or "backward" (on the later one's).
    :ivar min_scale: the smallest processing scale that may be used, above 0 and at most ``max_scale``.
    :ivar max_scale: the largest, at most 4: above 1 frames are enlarged before they are processed, for finer flow.
    :ivar max_gap_ms: a longer time between two frames starts the stream anew.
    :ivar warm: start each pair from the fixed point of the last one; False starts every pair cold, to compare with.
    :ivar uncertainty: also give the expected error of each pixel's flow; needs weights with a head for it.
    :ivar refinement: steps of the refinement behind the network (``refinement.refined``), 0 to 20; 0: none. On the
        CPU, whatever the network runs on.
    :raises ValueError: for values outside of these, naming the setting, what it may be, and what it was.
    """

    latency_budget_ms: float | None = None
    max_iterations: int = 6
    tolerance_px: float | None = 0.1
    direction: str = "forward"
    min_scale: float = 0.25
    max_scale: float = 1.0
    max_gap_ms: float = 1000.0
    warm: bool = True
    uncertainty: bool = False
    refinement: int = 0

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
            ("uncertainty", isinstance(self.uncertainty, bool), "True or False"),
            ("refinement", type(self.refinement) is int and 0 <= self.refinement <= 20, "a whole number from 0 to 20"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        if self.min_scale > self.max_scale:
            raise ValueError(
                f"min_scale must be at most max_scale, got min_scale {self.min_scale!r} and max_scale "
                f"{self.max_scale!r}; change both"
            )

    def changed(self, **settings: Any) -> EstimatorSettings:
        """These settings with others for those named, checked together.

        :raises ValueError: for a name that is none, and as for the class.
        """
        known = [field.name for field in fields(self)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"no setting {', '.join(unknown)}; expected some of {', '.join(known)}")
        return replace(self, **settings)

    @property
    def solver(self) -> tuple[object, ...]:
        """What two pairs must have in common to be solved as one batch."""
        return self.direction, self.max_iterations, self.tolerance_px


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
