# SPDX-License-Identifier: Apache-2.0
"""What the flow of a run is compared with: a solution from a cold start."""

from __future__ import annotations

import os

import numpy as np

from deq_flow_ros.media.analysis import ColdFlow
from deq_flow_ros.media.flow_recording import FrameReport


def cold_flow(model: str, device: str, direction: str) -> ColdFlow:
    """Solves a pair again from nothing, at the scale that the stream had for it, with as many iterations there.

    Without a deadline, so always from a coarse-to-fine start, whose iterations at lower resolutions come on top.
    """
    import torch

    from deq_flow_ros.model import load_model
    from deq_flow_ros.streaming import FlowEstimator

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    estimator = FlowEstimator(load_model(model, device), tolerance_px=None, direction=direction, max_gap_ms=3.6e6)

    def solve(report: FrameReport, image1: np.ndarray, image2: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        iterations, scale = report.number("iterations"), report.number("scale")
        if not iterations >= 1:
            return None
        estimator.reset("cold start")
        estimator.change(max_iterations=int(iterations), min_scale=scale, max_scale=scale)
        estimator.update(image1, 0)
        result = estimator.update(image2, 1)
        return None if result is None else (result.flow, result.residual)

    return solve
