# SPDX-License-Identifier: Apache-2.0
"""A stream's clock can be replaced, and its warm start left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, frames

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import FlowEstimator, UpdateRequest, update_together
from deq_flow_ros.streaming.clock import Clock


@pytest.fixture(scope="module")
def model() -> DEQFlow:
    torch.manual_seed(0)
    return DEQFlow("nano").eval().requires_grad_(False)


class StoppedClock(Clock):
    """Time stands still, whatever the work takes."""

    def now_ns(self) -> int:
        return 5


def test_without_warm_starts_every_pair_is_that_of_two_lone_frames(model: DEQFlow) -> None:
    """Why: cold against warm is only a comparison if cold knows nothing of the frames before."""
    stream = frames(4)
    estimator = FlowEstimator(model, max_iterations=3, warm=False)
    results = [estimator.update(frame, i * PERIOD_NS) for i, frame in enumerate(stream)]
    lone = FlowEstimator(model, max_iterations=3)
    lone.update(stream[2], 0)
    expected, result = lone.update(stream[3], PERIOD_NS), results[3]
    assert expected is not None and result is not None and not result.info.warm and result.info.reset_reason is None
    np.testing.assert_array_equal(result.flow, expected.flow)


def test_deadlines_and_latencies_are_those_of_the_clock(model: DEQFlow) -> None:
    """Why: in a simulation the machine's own time must not leak into what the stream does."""
    estimator = FlowEstimator(model, StoppedClock(), latency_budget_ms=1e-3, max_iterations=3, tolerance_px=None)
    stream = frames(3)
    results = [estimator.update(frame, i * PERIOD_NS) for i, frame in enumerate(stream)]
    last = results[-1]
    assert last is not None and last.info.latency_ms == 0 and not last.info.over_budget
    other = FlowEstimator(model)
    with pytest.raises(ValueError, match="one model, clock and runtime"):
        update_together([UpdateRequest(estimator, stream[0], 0), UpdateRequest(other, stream[0], 0)])
