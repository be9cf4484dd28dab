# SPDX-License-Identifier: Apache-2.0
"""The results of a stream for each pair of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deq_flow_ros.streaming.continuity import MIN_MATCH

SUPERSEDED = "superseded by a newer frame"
"""Why a frame is dropped if a newer one arrives while the previous one is processed."""
REPEATED_SHARE = 0.1
"""The share of ``repeated`` frames from which on they are a fault; video encoders repeat a few."""


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
    :ivar likeness: mean cosine between the features of the cells of one image and those of the cells of the other image
        to which the flow leads, -1..1; see ``likeness`` in ``model/cells.py``. NaN if it is not known.
    :ivar starved: whether the frame was late with a single iteration at the lowest scale, so that this machine cannot
        keep the budget, at least at present.
    :ivar repeated: whether the two images are the same, pixel by pixel. Raw images of a camera never are.
    :ivar runtime: what computed the flow: "eager", or "graphs" or "compiled" (graphs) on a GPU.
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
    """The flow of a pair of frames, float32, in px of the input.

    :ivar flow: (H, W, 2), x before y.
    :ivar residual: (H, W), the length of the last update. A small residual does not mean that the flow is right; where
        there is no texture, it is always small. None unless ``EstimatorSettings.residual`` asks for it.
    :ivar info: how the flow was computed.
    :ivar uncertainty: (H, W), the expected endpoint error. None unless ``EstimatorSettings.uncertainty`` asks for it.
    :ivar colors: (H, W, 3) uint8 RGB, the flow in the colours of ``EstimatorSettings.palette``. None unless that asks
        for it, and the device painted it: a GPU with captured graphs does, without ``refinement``.
    """

    flow: np.ndarray
    residual: np.ndarray | None
    info: FlowInfo
    uncertainty: np.ndarray | None = None
    colors: np.ndarray | None = None


def pair_values(info: FlowInfo, stage_ms: Mapping[str, float]) -> dict[str, str]:
    """The values for the pair in the account of a frame (docs/node.md), as they are sent."""
    return {
        "image1_stamp_ns": str(info.previous_stamp_ns),
        "direction": info.direction,
        "iterations": str(info.iterations),
        "stop_reason": info.stop_reason,
        "warm": _flag(info.warm),
        "residual_px": f"{info.residual_px:.6g}",
        "reset_reason": info.reset_reason or "",
        "scale": f"{info.scale:.6g}",
        "latency_ms": f"{info.latency_ms:.3f}",
        "budget_ms": "" if info.budget_ms is None else f"{info.budget_ms:.3f}",
        "over_budget": _flag(info.over_budget),
        "starved": _flag(info.starved),
        "runtime": info.runtime,
        "likeness": f"{info.likeness:.4g}",
        "matched": _flag(info.matched),
        "repeated": _flag(info.repeated),
        **{f"stage_{name}_ms": f"{value:.3f}" for name, value in stage_ms.items()},
    }


def _flag(value: bool) -> str:
    return "true" if value else "false"
