# SPDX-License-Identifier: Apache-2.0
"""What goes in and out, as plain values: settings of a stream, results of a pair, and what an engine says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from deq_flow_ros.streaming.continuity import MIN_MATCH

DIRECTIONS, SWITCHES = ("forward", "backward"), ("warm", "residual", "uncertainty")
# At larger scales, most of an image would be interpolated, and even a small one would reach ``plan.MAX_PIXELS``.
LARGEST_SCALE = 4.0
SUPERSEDED = "superseded by a newer frame"
"""Why a frame is dropped if a newer one arrives while the previous one is processed."""
REPEATED_SHARE = 0.1
"""The share of ``repeated`` frames from which on they are a fault; video encoders repeat a few."""


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
    """The settings of a ``FlowEstimator``, which are checked together.

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
            *((name, isinstance(getattr(self, name), bool), "True or False") for name in SWITCHES),
            ("refinement", type(self.refinement) is int and 0 <= self.refinement <= 20, "a whole number from 0 to 20"),
            ("palette", self.palette is None or isinstance(self.palette, Palette), "a Palette or None"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        if self.min_scale > self.max_scale:
            got = f"min_scale {self.min_scale!r} and max_scale {self.max_scale!r}"
            raise ValueError(f"min_scale must be at most max_scale, got {got}; change both")

    def changed(self, **settings: Any) -> EstimatorSettings:
        """A copy with some settings changed.

        :raises ValueError: for an unknown name, or for a value outside of its range.
        """
        known = [field.name for field in fields(self)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"no setting {', '.join(unknown)}; expected some of {', '.join(known)}")
        return replace(self, **settings)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


class Likeness(NamedTuple):
    """How alike two frames are at a flow of zero, and at the carried flow; see ``likeness`` in ``model/cells.py``.

    Without a carried flow, both are the same.
    """

    still: float
    carried: float


class Wanted(NamedTuple):
    """Which fields are asked for besides the flow; for the uncertainty, the model has a head."""

    residual: bool = True
    uncertainty: bool = False


@dataclass(frozen=True)
class Solved:
    """What an engine found for one pair.

    Fields are as in ``FlowResult``, at the resolution of the frame as it came, and figures as in ``FlowInfo``, but:

    :ivar evaluations: iterations made for its batch.
    :ivar residual_px: RMS of the last update, px of what was processed.
    """

    flow: np.ndarray
    residual: np.ndarray | None
    uncertainty: np.ndarray | None
    iterations: int
    evaluations: int
    residual_px: float
    stop_reason: str
    likeness: float
    runtime: str = "eager"
    colors: np.ndarray | None = None


@dataclass(frozen=True)
class FlowInfo:
    """How a flow field was computed.

    :ivar stamp_ns: stamp of the later image.
    :ivar previous_stamp_ns: stamp of the earlier image.
    :ivar direction: "forward": flow on the pixels of the earlier image; "backward": on those of the later one.
    :ivar iterations: evaluations of the update operator (in a cold start, those at the processing scale).
    :ivar stop_reason: "converged", "iterations", "deadline" or "diverged".
    :ivar warm: whether the solve started from the last pair's fixed point.
    :ivar residual_px: RMS of the last update, px of the input; NaN if there was no iteration.
    :ivar reset_reason: why the stream started anew before this pair; None within a stream.
    :ivar scale: processing scale; 1 is the resolution of the input; above 1 the images were enlarged.
    :ivar stage_ms: time of each stage since the frame arrived. It includes ``prepare`` if that was not called ahead.
        Frames that were processed together all have the times of the batch.
    :ivar latency_ms: time from the arrival of the frame to its result.
    :ivar budget_ms: the latency budget; None without one.
    :ivar time_limit_ms: the time that the caller allowed besides the budget; None without a limit.
    :ivar batch_size: how many frames were processed together.
    :ivar starved: whether the frame was late with a single iteration at the lowest scale, so that this machine cannot
        keep the budget, at least at present.
    :ivar runtime: what computed the flow: "eager", or "graphs" or "compiled" (graphs) on a GPU.
    :ivar likeness: mean cosine between the features of the cells of one image and those of the cells of the other image
        to which the flow leads, -1..1; see ``likeness`` in ``model/cells.py``. NaN if it is not known.
    :ivar repeated: whether the two images are the same, pixel by pixel. Raw images of a camera never are.
    """

    stamp_ns: int
    previous_stamp_ns: int
    direction: str
    iterations: int
    stop_reason: str
    warm: bool
    residual_px: float
    reset_reason: str | None
    scale: float
    stage_ms: dict[str, float]
    latency_ms: float
    budget_ms: float | None
    time_limit_ms: float | None = None
    batch_size: int = 1
    starved: bool = False
    runtime: str = "eager"
    likeness: float = math.nan
    repeated: bool = False

    @property
    def matched(self) -> bool:
        """Whether the two images show the same scene. If not (noise, a cut), the flow means nothing."""
        return not self.likeness < MIN_MATCH

    @property
    def over_budget(self) -> bool:
        """Whether the result came later than the budget allowed."""
        return self.budget_ms is not None and self.latency_ms > self.budget_ms


@dataclass(frozen=True)
class FlowResult:
    """The flow of a pair of frames, float32, in px of the input. What the settings do not ask for is None.

    :ivar flow: (H, W, 2), x before y.
    :ivar residual: (H, W), the length of the last update. A small residual does not mean that the flow is right; where
        there is no texture, it is always small.
    :ivar info: how the flow was computed.
    :ivar uncertainty: (H, W), the expected endpoint error.
    :ivar colors: (H, W, 3) uint8 RGB, the flow in the colours of ``EstimatorSettings.palette``, if the device painted
        it: a GPU with captured graphs does, without ``refinement``.
    """

    flow: np.ndarray
    residual: np.ndarray | None
    info: FlowInfo
    uncertainty: np.ndarray | None = None
    colors: np.ndarray | None = None


def pair_values(info: FlowInfo, stage_ms: Mapping[str, float]) -> dict[str, str]:
    """The values for the pair in the account of a frame (docs/node.md), as they are sent."""
    values = {
        "image1_stamp_ns": str(info.previous_stamp_ns),
        "direction": info.direction,
        "iterations": str(info.iterations),
        "stop_reason": info.stop_reason,
        "warm": info.warm,
        "residual_px": f"{info.residual_px:.6g}",
        "reset_reason": info.reset_reason or "",
        "scale": f"{info.scale:.6g}",
        "latency_ms": f"{info.latency_ms:.3f}",
        "budget_ms": "" if info.budget_ms is None else f"{info.budget_ms:.3f}",
        "over_budget": info.over_budget,
        "starved": info.starved,
        "runtime": info.runtime,
        "likeness": f"{info.likeness:.4g}",
        "matched": info.matched,
        "repeated": info.repeated,
        **{f"stage_{name}_ms": f"{value:.3f}" for name, value in stage_ms.items()},
    }
    flags = (bool, np.bool_)  # of a budget that is a number of numpy's
    return {name: str(value).lower() if isinstance(value, flags) else str(value) for name, value in values.items()}
