# SPDX-License-Identifier: Apache-2.0
"""The refinement behind the network, alone and in a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, Clock, frames

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import FlowEstimator
from deq_flow_ros.streaming.fields import refined

SIZE = 96, 128


def moved(flow: np.ndarray) -> float:
    """Mean distance from a motion of two pixels to the left, px."""
    return float(np.linalg.norm(flow - np.float32([-2, 0]), axis=2)[:, 8:-8].mean())


def test_a_field_that_is_nearly_right_gets_nearer() -> None:
    """Why: it is what it is for; and the field that it is given is the network's, which stays the start of the next."""
    earlier, later = frames(2, *SIZE)
    rough = np.tile(np.float32([-1.6, 0.3]), (*SIZE, 1))
    before = rough.copy()
    finer = refined(rough, earlier, later, 5)
    assert finer.dtype == np.float32 and finer.shape == rough.shape
    assert moved(finer) < 0.6 * moved(rough)
    np.testing.assert_array_equal(rough, before)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_stream_refines_each_field_and_carries_the_networks_own(direction: str) -> None:
    """Why: the images have an order that depends on the direction, and the state belongs to the unrefined flow."""
    torch.manual_seed(0)
    model = DEQFlow("nano").eval().requires_grad_(False)
    stream = frames(4, *SIZE)
    plain, fine = (FlowEstimator(model, max_iterations=1, direction=direction, refinement=n) for n in (0, 3))
    memory = stream[0].copy()
    for i, frame in enumerate(stream):
        memory[:] = frame  # as OpenCV's video reader does, if it is given an array
        one, other = (estimator.update(memory, i * PERIOD_NS) for estimator in (plain, fine))
        if one is None or other is None:
            continue
        images = (stream[i - 1], frame) if direction == "forward" else (frame, stream[i - 1])
        np.testing.assert_array_equal(other.flow, refined(one.flow, *images, 3))
        assert "refine" in other.info.stage_ms and "refine" not in one.info.stage_ms


def test_what_the_refinement_costs_is_kept_in_the_budget_while_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a budget that leaves no time for it would be missed by every frame; one that goes on to would waste it."""
    torch.manual_seed(0)
    model = DEQFlow("nano").eval().requires_grad_(False)
    clock = Clock(model, monkeypatch)
    monkeypatch.setattr(
        "deq_flow_ros.streaming.batch.refined",
        lambda flow, *_: setattr(clock, "now_ns", clock.now_ns + 30 * 10**6) or flow,
    )
    estimator = FlowEstimator(model, latency_budget_ms=100, max_iterations=9, tolerance_px=None, refinement=2)
    stream = frames(8, 48, 64)

    def play(number: int) -> int:
        result = estimator.update(stream[number], number * PERIOD_NS, clock.now_ns)
        assert result is not None and (number < 2 or not result.info.over_budget)
        return result.info.iterations

    estimator.update(stream[0], 0, clock.now_ns)
    made = [play(number) for number in range(1, 5)]
    estimator.change(refinement=0)
    later = [play(number) for number in range(5, 8)]
    assert made[-1] == 2 and later[-1] == 4, "of 100 ms, 10 for encoding, 20 for each iteration, 30 for the refinement"
