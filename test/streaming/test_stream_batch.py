# SPDX-License-Identifier: Apache-2.0
"""Frames of several streams, processed as one batch: the results of each alone, and nothing of the others in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, Clock, frames

from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.streaming import FlowEstimator, FlowResult, UpdateRequest, update_together
from deq_flow_ros.streaming.costs import CostModel

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.fixture(scope="module")
def nano() -> DEQFlow:
    return load_model("nano")


def requests(estimators: list[FlowEstimator], images: list[np.ndarray], i: int) -> list[UpdateRequest]:
    return [UpdateRequest(e, image, i * PERIOD_NS) for e, image in zip(estimators, images, strict=True)]


def assert_same(together: FlowResult | None, alone: FlowResult | None) -> None:
    assert (together is None) == (alone is None)
    if together is not None and alone is not None:
        np.testing.assert_allclose(together.flow, alone.flow, atol=1e-4)
        np.testing.assert_allclose(together.residual, alone.residual, atol=1e-4)
        for name in ("stamp_ns", "previous_stamp_ns", "iterations", "stop_reason", "warm", "reset_reason", "scale"):
            assert getattr(together.info, name) == getattr(alone.info, name), name
        assert together.info.residual_px == pytest.approx(alone.info.residual_px, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_batch_gives_what_each_stream_gives_alone(
    nano: DEQFlow, direction: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why: batching is for speed alone. Each sample stops for itself; warm and cold ones share a batch, and so do sizes
    that are padded alike, also where the scale changes; another size goes its own way.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding depends on the kernel chosen
    model = nano if device == "cpu" else load_model("nano", device)
    sizes = [(128, 144), (125, 139), (128, 144), (64, 80)]
    steps = [3, 0, 6, 2]
    streams = [
        frames(6, height, width, step, seed)
        for seed, ((height, width), step) in enumerate(zip(sizes, steps, strict=True))
    ]
    together, alone = (
        [FlowEstimator(model, direction=direction, max_iterations=8, tolerance_px=0.05) for _ in sizes]
        for _ in range(2)
    )
    kinds, reasons = set(), set()
    for i in range(6):
        if i == 3:
            for estimator in (together[2], alone[2]):
                estimator.reset("its own reason")
        if i == 5:
            for estimator in together + alone:
                estimator.change(min_scale=0.5, max_scale=0.5)
        images = [stream[i] for stream in streams]
        results = update_together(requests(together, images, i))
        for estimator, image, result in zip(alone, images, results, strict=True):
            assert_same(result, estimator.update(image, i * PERIOD_NS))
        kinds.add(tuple(result and (result.info.warm, result.info.batch_size) for result in results))
        reasons.update(result.info.stop_reason for result in results if result is not None)
    assert kinds == {
        (None, None, None, None),  # first frames
        ((False, 3), (False, 3), (False, 3), (False, 1)),
        ((True, 3), (True, 3), (True, 3), (True, 1)),
        ((True, 2), (True, 2), None, (True, 1)),  # one camera starts anew
        ((True, 3), (True, 3), (False, 3), (True, 1)),
    }
    assert reasons == {"converged", "iterations"}


@pytest.mark.parametrize(
    "settings", [{"max_scale": 0.5}, {"max_iterations": 3}, {"tolerance_px": 1e6}, {"direction": "backward"}]
)
def test_streams_that_are_solved_otherwise_share_no_batch(model: DEQFlow, settings: dict) -> None:
    """Why: each camera may have settings of its own; they must not become those of another."""
    usual: dict = {"max_iterations": 2, "tolerance_px": None}
    together, alone = ([FlowEstimator(model, **{**usual, **own}) for own in ({}, settings)] for _ in range(2))
    images = frames(3)
    for i in range(3):
        results = update_together(requests(together, [images[i]] * 2, i))
        for estimator, result in zip(alone, results, strict=True):
            assert_same(result, estimator.update(images[i], i * PERIOD_NS))
    assert all(result is not None and result.info.batch_size == 1 for result in results)


def test_a_state_that_is_not_finite_stays_in_its_stream(model: DEQFlow) -> None:
    """Why: one camera's broken state must not reach the flow of another through the batch."""
    estimators = [FlowEstimator(model, max_iterations=2) for _ in range(2)]
    alone = FlowEstimator(model, max_iterations=2)
    streams = [frames(4, seed=0), frames(4, seed=1)]
    for i in range(4):
        if i == 2:
            hidden, flow = estimators[0].stream.slot.state
            estimators[0].stream.slot.state = torch.full_like(hidden, torch.nan), flow
        broken, sound = update_together(requests(estimators, [stream[i] for stream in streams], i))
        assert_same(sound, alone.update(streams[1][i], i * PERIOD_NS))
        if i == 2:
            assert broken is not None and broken.info.stop_reason == "diverged" and broken.info.iterations == 0
    assert broken is not None and broken.info.reset_reason == "the state was not finite" and not broken.info.warm
    assert np.isfinite(broken.flow).all() and broken.info.batch_size == 2


def test_costs_of_batches_are_their_own(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a single frame must neither be promised the time that a batch takes, nor the other way round.

    10 ms for encoding a frame, 20 ms for an iteration, 95 % of budgets of 120 and 80 ms: 5 and 3 iterations of one
    frame, 1 of two together, which end at the sooner deadline.
    """
    costs = CostModel()
    costs.add(1000, {"encode": 10.0, "solve": 20.0}, 1)
    assert costs.of_batch(3).high(1000, "encode") == pytest.approx(3 * costs.high(1000, "encode"))
    costs.of_batch(3).add(1000, {"encode": 500.0}, 0)  # the first one allocates
    costs.of_batch(3).add(1000, {"encode": 12.0}, 0)
    assert costs.of_batch(3).high(1000, "encode") < 20 < costs.of_batch(3).high(1000, "iteration")
    assert costs.high(1000, "encode") < 15

    clock = Clock(model, monkeypatch)
    estimators = [FlowEstimator(model, latency_budget_ms=ms, max_iterations=50, tolerance_px=None) for ms in (120, 80)]
    for estimator in estimators:
        estimator.warm_up(48, 64)
    streams = [frames(30, seed=0), frames(30, seed=1)]
    seen = []
    for i in range(30):
        if i % 2:
            results = update_together(
                [UpdateRequest(e, s[i], i * PERIOD_NS, clock.now_ns) for e, s in zip(estimators, streams, strict=True)]
            )
        else:
            results = [e.update(s[i], i * PERIOD_NS, clock.now_ns) for e, s in zip(estimators, streams, strict=True)]
        seen.append(
            [(r.info.batch_size, r.info.iterations, round(r.info.latency_ms)) for r in results if r is not None]
        )
    assert seen[-2:] == [[(1, 5, 110), (1, 3, 70)], [(2, 1, 60)] * 2]


def test_a_batch_that_costs_no_more_is_learnt(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: that is a GPU. What was guessed before the first batch must not hold the next ones back."""
    clock = Clock(model, monkeypatch, per_batch=True)
    estimators = [FlowEstimator(model, latency_budget_ms=100, max_iterations=50, tolerance_px=None) for _ in range(4)]
    for estimator in estimators:
        estimator.warm_up(48, 64)
    streams = [frames(25, seed=seed) for seed in range(4)]
    for i in range(25):
        results = update_together(
            [UpdateRequest(e, s[i], i * PERIOD_NS, clock.now_ns) for e, s in zip(estimators, streams, strict=True)]
        )
    assert [(r.info.batch_size, r.info.iterations, r.info.over_budget) for r in results if r] == [(4, 4, False)] * 4


def test_a_pressed_frame_does_not_cut_an_unhurried_one_short(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a batch ends at its soonest deadline; a camera whose frames waited too long must not starve another."""
    clock = Clock(model, monkeypatch)
    pressed, unhurried = (
        FlowEstimator(model, latency_budget_ms=budget, max_iterations=5, tolerance_px=None) for budget in (60, 1000)
    )
    streams = [frames(4, seed=0), frames(4, seed=1)]
    for i in range(4):
        results = update_together(
            [
                UpdateRequest(e, s[i], i * PERIOD_NS, clock.now_ns)
                for e, s in zip((unhurried, pressed), streams, strict=True)
            ]
        )
    assert [r.info.batch_size for r in results if r] == [1, 1]
    first, second = results
    assert first is not None and first.info.iterations == 5 and not first.info.over_budget
    assert second is not None and second.info.stop_reason == "deadline" and not second.info.over_budget


def test_impossible_requests_change_no_stream(model: DEQFlow) -> None:
    """Why: the caller can tell what was wrong, and go on with each frame alone."""
    estimators = [FlowEstimator(model, max_iterations=1) for _ in range(2)]
    images = frames(3)
    update_together(requests(estimators, [images[0]] * 2, 0))
    with pytest.raises(ValueError, match="one frame at a time, got several requests for one estimator"):
        update_together(requests([estimators[0]] * 2, [images[1]] * 2, 1))
    with pytest.raises(ValueError, match="one model, clock and runtime"):
        update_together(requests([estimators[0], FlowEstimator(DEQFlow("nano"))], [images[1]] * 2, 1))
    with pytest.raises(ValueError, match=r"at least 16x16 pixels, got 64x8"):
        UpdateRequest(estimators[0], images[1][:8], PERIOD_NS)
    with pytest.raises(ValueError, match="time_limit_ms must be a finite number or None, got nan"):
        UpdateRequest(estimators[0], images[1], PERIOD_NS, time_limit_ms=float("nan"))
    assert all(result is not None for result in update_together(requests(estimators, [images[1]] * 2, 1)))
    assert update_together([]) == []


def test_stamps_in_seconds_are_refused_and_integers_of_numpy_are_not(model: DEQFlow) -> None:
    """Why: 0.033 s taken for nanoseconds is a stream of one moment; and unsigned integers have no negative gaps."""
    estimator = FlowEstimator(model, max_iterations=1)
    for wrong in (0.033, np.float64(1.7e18), "7", None):
        with pytest.raises(ValueError, match="stamp_ns must be an integer in nanoseconds, got "):
            estimator.update(frames(1)[0], wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"arrival_ns must be an integer .* got 0.5 \(float\)"):
        estimator.update(frames(1)[0], 0, 0.5)  # type: ignore[arg-type]
    for stamp_ns in (np.uint64(2 * PERIOD_NS), np.uint64(PERIOD_NS)):
        assert estimator.update(frames(1)[0], stamp_ns) is None  # type: ignore[arg-type]
    assert estimator.left_out == f"stamped {PERIOD_NS / 1e6:.1f} ms earlier than the frame before: left out"
