# SPDX-License-Identifier: Apache-2.0
"""What comes out of a stream for each pair of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deq_flow_ros.streaming.continuity import MIN_MATCH

SUPERSEDED = "superseded by a newer frame"
"""Why a frame is dropped when a newer one comes while the frame before is processed."""


@dataclass(frozen=True)
class FlowInfo:
    """How one flow field came about.

    :ivar stamp_ns: stamp of the later image.
    :ivar previous_stamp_ns: stamp of the earlier image.
    :ivar direction: "forward": flow on the earlier image's pixels; "backward": on the later one's, pointing back.
    :ivar iterations: evaluations of the update operator (of a cold start, those at the processing scale).
    :ivar stop_reason: "converged", "iterations", "deadline" or "diverged".
    :ivar warm: whether the solve started from the last pair's fixed point.
    :ivar residual_px: RMS of the last update, px of the input; NaN without any iteration.
    :ivar reset_reason: why the stream began anew before this pair; None within a stream.
    :ivar scale: processing scale, 1 is the input's resolution; above 1 the images were enlarged.
    :ivar stage_ms: time by stage since the frame arrived; ``prepare`` is among them where it was not called ahead. Of
        frames that were processed together, each has the times of all.
    :ivar latency_ms: from the frame's arrival to its result.
    :ivar budget_ms: what was allowed; None without a budget.
    :ivar time_limit_ms: what the caller allowed from the call on, besides the budget; None without.
    :ivar batch_size: how many frames were processed together.
    :ivar likeness: mean cosine of the features of cells of one image and of those of the other that the flow leads to,
        -1..1; see ``likeness`` in ``model/cells.py``. NaN where it is not known.
    :ivar starved: late with a single iteration at the lowest scale: nothing is left to give way, so the budget cannot
        be met on this machine, or not at present.
    :ivar runtime: what computed it: "eager", or "graphs" or "compiled" (graphs) on a GPU.
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

    @property
    def matched(self) -> bool:
        """Whether the two images show one scene; of noise alone, or across a cut, no flow means anything."""
        return not self.likeness < MIN_MATCH

    @property
    def over_budget(self) -> bool:
        """Whether the result came later than its budget allowed."""
        return self.budget_ms is not None and self.latency_ms > self.budget_ms


@dataclass(frozen=True)
class FlowResult:
    """Flow of a pair of frames, float32, in px of the input.

    :ivar flow: (H, W, 2), x before y.
    :ivar residual: (H, W), length of the last update: how far the iteration still moved. It says nothing about whether
        it moved towards the true flow; where there is no texture it is small.
    :ivar info: how the flow came about.
    :ivar uncertainty: (H, W), expected endpoint error: how wrong the flow probably is. None unless
        ``EstimatorSettings.uncertainty`` asks for it.
    """

    flow: np.ndarray
    residual: np.ndarray
    info: FlowInfo
    uncertainty: np.ndarray | None = None


def pair_values(info: FlowInfo, stage_ms: Mapping[str, float]) -> dict[str, str]:
    """What the account of a frame says of its pair (docs/node.md), as it is sent."""
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
        **{f"stage_{name}_ms": f"{value:.3f}" for name, value in stage_ms.items()},
    }


def _flag(value: bool) -> str:
    return "true" if value else "false"
