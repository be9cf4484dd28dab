# SPDX-License-Identifier: Apache-2.0
"""Time limits besides the budget, by which several cameras share one processor; and what is said when time is short."""

from __future__ import annotations

import pytest
from streams import PERIOD_NS, Clock, frames

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import FlowEstimator, FlowInfo


def test_a_time_limit_is_kept_as_the_budget_is(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: it ends the solve before; it counts from the call, the budget from the arrival, and the sooner one holds.

    10 ms of encoding and 20 ms an iteration, of 95 % of the time allowed: 4 iterations in 100 ms, 2 in 55 ms.
    """
    clock = Clock(model, monkeypatch)
    estimator = FlowEstimator(model, latency_budget_ms=100, max_iterations=50, tolerance_px=None)
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 64x8"):
        estimator.warm_up(8, 64)
    FlowEstimator(model).warm_up(20, 160)  # which is enlarged beyond the largest scale
    estimator.warm_up(48, 64)
    stream = iter(enumerate(frames(40)))

    def info(waited_ms: int, limit_ms: float | None) -> FlowInfo | None:
        i, frame = next(stream)
        arrival_ns = clock.now_ns
        clock.now_ns += round(1e6 * waited_ms)
        result = estimator.update(frame, i * PERIOD_NS, arrival_ns, limit_ms)
        return result and result.info

    info(0, None)
    for waited_ms, limit_ms, iterations, latency_ms in (
        (0, None, 4, 90),
        (0, 55.0, 2, 50),
        (0, 500.0, 4, 90),
        (40, 55.0, 2, 90),  # counted from the arrival, the limit would leave room for none
        (40, 90.0, 2, 90),  # here the budget is the sooner one
    ):
        seen = info(waited_ms, limit_ms)
        assert seen is not None and (seen.iterations, round(seen.latency_ms)) == (iterations, latency_ms)
        assert seen.stop_reason == "deadline" and not seen.over_budget and not seen.starved
        assert seen.budget_ms == 100 and seen.time_limit_ms == limit_ms
    estimator.change(latency_budget_ms=None)
    seen = info(1000, 55.0)
    assert seen is not None and seen.iterations == 2 and seen.budget_ms is None and not seen.over_budget


def test_two_cameras_with_half_the_time_each_meet_their_budgets(
    model: DEQFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: one processor, frames that arrive together: without limits the first takes all of the budget and the second
    comes late; with them both are in time, the larger one at a smaller scale.

    2 + 3 ms at 48x64 pixels and in proportion for others: 62 ms for the large image, 20 ms for the small; budgets of
    75 ms.
    """
    clock = Clock(model, monkeypatch, per_pixel=True)
    clock.encode_ms, clock.iteration_ms = 2.0, 3.0

    def late(limit_ms: float | None) -> tuple[list[bool], list[float], float]:
        large, small = (
            FlowEstimator(model, latency_budget_ms=75, max_iterations=50, tolerance_px=None, min_scale=0.5)
            for _ in range(2)
        )
        large.warm_up(192, 200)
        small.warm_up(96, 128)
        late, longest = [False, False], 0.0
        for i, (a, b) in enumerate(zip(frames(10, 192, 200), frames(10, 96, 128), strict=True)):
            arrival_ns, infos = clock.now_ns, []
            for estimator, frame in ((large, a), (small, b)):
                began_ns = clock.now_ns
                result = estimator.update(frame, i * PERIOD_NS, arrival_ns, limit_ms)
                if result is not None:
                    infos.append(result.info)
                    if i > 5:
                        longest = max(longest, (clock.now_ns - began_ns) / 1e6)
            if i > 5:
                late = [before or info.over_budget for before, info in zip(late, infos, strict=True)]
        return late, [info.scale for info in infos], longest

    assert late(None)[0] == [False, True]
    nobody, scales, longest = late(37.5)
    assert nobody == [False, False] and scales[0] < 1.0 == scales[1] and longest <= 37.5


def test_a_limit_alone_lowers_the_scale(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a limit must be kept when not one iteration fits into it at full scale, budget or none."""
    clock = Clock(model, monkeypatch, per_pixel=True)
    clock.encode_ms, clock.iteration_ms = 2.0, 3.0
    estimator = FlowEstimator(model, max_iterations=50, tolerance_px=None, min_scale=0.5)
    estimator.warm_up(192, 200)
    for i, frame in enumerate(frames(6, 192, 200)):
        began_ns = clock.now_ns
        result = estimator.update(frame, i * PERIOD_NS, time_limit_ms=30.0)
    assert result is not None and result.info.scale < 1.0 and clock.now_ns - began_ns <= 30_000_000
    assert result.info.iterations >= 1 and not result.info.over_budget and not result.info.starved


def test_a_budget_that_cannot_be_met_is_said(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: late once may be chance; late with nothing left to give way is what the operator has to know."""
    clock = Clock(model, monkeypatch)
    estimator = FlowEstimator(model, latency_budget_ms=25, max_iterations=50, tolerance_px=None, min_scale=0.5)
    estimator.warm_up(200, 240)  # 10 + 20 ms at every scale
    infos = []
    for i, frame in enumerate(frames(8, 200, 240)):
        if i == 5:
            estimator.change(latency_budget_ms=100)
        result = estimator.update(frame, i * PERIOD_NS, clock.now_ns)
        if result is not None:
            infos.append(result.info)
    assert [(info.scale, info.iterations, info.over_budget, info.starved) for info in infos] == [
        *[(0.5, 1, True, True)] * 4,
        *[(0.5, 4, False, False)] * 3,
    ]
    clock.encode_ms = 200.0  # late by surprise, at a scale that could still be lowered
    estimator = FlowEstimator(model, latency_budget_ms=100, max_iterations=1, tolerance_px=None, min_scale=0.5)
    for i, frame in enumerate(frames(2, 200, 240)):
        result = estimator.update(frame, i * PERIOD_NS, clock.now_ns)
    assert result is not None and result.info.scale == 1.0 and result.info.over_budget and not result.info.starved
