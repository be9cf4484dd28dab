# SPDX-License-Identifier: Apache-2.0
"""A stream of frames: what is reused, when it starts anew, and how the budget is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, Clock, frames

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.model.cells import carry, forward_warp
from deq_flow_ros.streaming import FlowEstimator
from deq_flow_ros.streaming.continuity import SAME_STAMP


def test_every_frame_is_encoded_once(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a stream is not a list of pairs; encoding twice would double the largest fixed cost."""
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda image: calls.append(image) or encode(image))
    estimator = FlowEstimator(model, max_iterations=2)
    results = [estimator.update(frame, i * PERIOD_NS) for i, frame in enumerate(frames(5))]
    assert len(calls) == 5
    assert results[0] is None and all(result is not None for result in results[1:])


def test_a_stream_is_warm_after_its_first_pair(model: DEQFlow) -> None:
    """Why: info must tell a cold answer from a warm one, and which frames it belongs to."""
    estimator = FlowEstimator(model, max_iterations=3, tolerance_px=None)
    assert estimator.update(frames(1)[0], 0) is None and estimator.reset_reason == "start"
    infos = []
    for i, frame in enumerate(frames(3)[1:], start=1):
        result = estimator.update(frame, i * PERIOD_NS)
        assert result is not None and result.flow.shape == (48, 64, 2) and result.residual.shape == (48, 64)
        assert result.flow.dtype == result.residual.dtype == np.float32
        infos.append(result.info)
    assert [info.warm for info in infos] == [False, True]
    assert [info.reset_reason for info in infos] == ["start", None]
    assert (infos[1].previous_stamp_ns, infos[1].stamp_ns) == (PERIOD_NS, 2 * PERIOD_NS)
    assert infos[1].iterations == 3 and infos[1].stop_reason == "iterations" and infos[1].scale == 1.0
    assert {"encode", "correlate", "prepare", "solve", "upsample", "output"} <= set(infos[1].stage_ms)


def test_preparing_ahead_changes_the_time_and_not_the_result(model: DEQFlow) -> None:
    """Why: work moved out of a frame's latency must be the same work."""
    flows, stages = [], []
    for ahead in (False, True):
        estimator = FlowEstimator(model, max_iterations=3, tolerance_px=None)
        for i, frame in enumerate(frames(4)):
            result = estimator.update(frame, i * PERIOD_NS)
            if ahead:
                estimator.prepare()
        assert result is not None
        flows.append(result.flow)
        stages.append(result.info.stage_ms)
    np.testing.assert_array_equal(flows[0], flows[1])
    assert "prepare" in stages[0] and "prepare" not in stages[1]


@pytest.mark.parametrize(
    ("frame", "stamp_ns", "reason"),
    [
        (frames(1, height=40)[0], 2 * PERIOD_NS, "size changed from 64x48 to 64x40"),
        (frames(3)[2], PERIOD_NS + 2_000_000_000, "gap of 2000 ms, longer than 1000 ms"),
        (frames(1, seed=7)[0] // 4, 2 * PERIOD_NS, "scene cut"),
    ],
)
def test_a_discontinuity_starts_the_stream_anew(model: DEQFlow, frame: np.ndarray, stamp_ns: int, reason: str) -> None:
    """Why: flow between frames that do not follow each other is meaningless; each reason is named."""
    estimator = FlowEstimator(model, max_iterations=1)
    for i, first in enumerate(frames(2)):
        estimator.update(first, i * PERIOD_NS)
    assert estimator.update(frame, stamp_ns) is None
    assert estimator.reset_reason is not None and estimator.reset_reason.startswith(reason)
    following = estimator.update(frame, stamp_ns + PERIOD_NS)
    assert following is not None and not following.info.warm
    assert following.info.reset_reason is not None and following.info.reset_reason.startswith(reason)


def test_frames_sent_twice_late_or_without_a_stamp_are_left_out_and_the_stream_stays_warm(model: DEQFlow) -> None:
    """Why: each of them made two pairs cold, and of a camera that sends everything twice every pair was."""
    estimator = FlowEstimator(model, max_iterations=1)
    stamps, warm = [0, 0, 1, 1, 3, 2, 4, 0, 5], []
    for stamp, frame in zip(stamps, frames(len(stamps)), strict=True):
        result = estimator.update(frame, stamp * PERIOD_NS)
        warm.append(estimator.left_out if result is None else result.info.warm)
    late = "stamped 33.0 ms earlier than the frame before: left out"
    assert warm == [None, SAME_STAMP, False, SAME_STAMP, True, late, True, "without a stamp: left out", True]


def test_a_clock_that_was_set_back_starts_the_stream_anew_with_its_second_frame(model: DEQFlow) -> None:
    """Why: of one frame nobody can tell whether it is late; but a camera must not be left out for ever."""
    estimator = FlowEstimator(model, max_iterations=1)
    for stamp, frame in zip([10, 11, 5, 6], frames(4), strict=True):
        result = estimator.update(frame, stamp * PERIOD_NS)
    assert result is None and estimator.reset_reason == "time went back by 165.0 ms"
    result = estimator.update(frames(5)[4], 7 * PERIOD_NS)
    assert result is not None and not result.info.warm


def test_motion_and_light_alone_are_no_scene_cut(model: DEQFlow) -> None:
    """Why: fast motion or a change of exposure must not throw the warm start away."""
    estimator = FlowEstimator(model, max_iterations=1)
    stream = frames(4, step=12)
    stream[3] = (0.6 * stream[3]).astype(np.uint8)
    results = [estimator.update(frame, i * PERIOD_NS) for i, frame in enumerate(stream)]
    assert all(result is not None for result in results[1:])


def test_a_state_that_is_not_finite_is_not_passed_on(model: DEQFlow) -> None:
    """Why: one NaN would live in a warm-started stream for ever."""
    estimator = FlowEstimator(model, max_iterations=2)
    stream = frames(5)
    for i in range(2):
        estimator.update(stream[i], i * PERIOD_NS)
    bias = model.update_block.flow_head.conv2.bias
    assert bias is not None
    good = bias.clone()
    bias.fill_(torch.nan)
    result = estimator.update(stream[2], 2 * PERIOD_NS)
    assert result is not None and result.info.stop_reason == "diverged" and np.isfinite(result.flow).all()
    bias.copy_(good)
    result = estimator.update(stream[3], 3 * PERIOD_NS)
    assert result is not None and not result.info.warm and result.info.reset_reason == "the state was not finite"
    result = estimator.update(stream[4], 4 * PERIOD_NS)
    assert result is not None and result.info.warm and result.info.reset_reason is None


def test_a_bad_frame_is_refused_and_the_stream_goes_on(model: DEQFlow) -> None:
    """Why: one malformed frame must not cost the stream its state."""
    estimator = FlowEstimator(model, max_iterations=1)
    stream = frames(3)
    estimator.update(stream[0], 0)
    estimator.update(stream[1], PERIOD_NS)
    for bad, message in (
        (stream[2][..., 0], r"uint8 array of shape \(H, W, 3\), got uint8 \(48, 64\)"),
        (stream[2].astype(np.float32), "got float32"),
        (stream[2][:8], "at least 16x16 pixels, got 64x8"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.update(bad, 2 * PERIOD_NS)
    result = estimator.update(stream[2], 2 * PERIOD_NS)
    assert result is not None and result.info.warm


def test_the_budget_is_kept_by_stopping_early(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a deadline is met before, not noticed after: 10 ms of encoding and 4 iterations of 20 ms fit into 100 ms.

    3 ms of them are the reserve, so a frame that has waited 8 ms gets one iteration less.
    """
    clock = Clock(model, monkeypatch)
    estimator = FlowEstimator(model, latency_budget_ms=100, max_iterations=50, tolerance_px=None)
    estimator.warm_up(48, 64)
    infos = []
    for i, frame in enumerate(frames(40)):
        arrival_ns = clock.now_ns
        clock.now_ns += 8_000_000 * (i % 2)  # every other frame waits 8 ms, which the budget includes
        result = estimator.update(frame, i * PERIOD_NS, arrival_ns)
        if result is not None:
            infos.append(result.info)
    assert {info.stop_reason for info in infos} == {"deadline"}
    assert not any(info.over_budget for info in infos)
    assert {(info.iterations, round(info.latency_ms)) for info in infos[-4:]} == {(4, 90), (3, 78)}


def test_another_size_starts_with_scaled_costs(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: costs learnt on a small image, taken for those of a large one, would overrun its first frames."""
    clock = Clock(model, monkeypatch)
    estimator = FlowEstimator(model, latency_budget_ms=90, max_iterations=50, tolerance_px=None, min_scale=0.25)
    estimator.warm_up(48, 64)
    large = frames(2, 192, 256)
    estimator.update(large[0], 0, clock.now_ns)
    result = estimator.update(large[1], PERIOD_NS, clock.now_ns)
    # 16 times the pixels: expected to take 16 times as long, so the frame is processed smaller.
    assert result is not None and result.info.scale < 1


def test_frames_without_time_for_one_iteration_are_processed_smaller() -> None:
    """Why: the scale gives way before the flow stops changing; at the lowest, late is better than never."""
    torch.manual_seed(0)  # features of the smaller network would say that the motion is not the one of before
    estimator = FlowEstimator(DEQFlow("nano").eval(), latency_budget_ms=1000, max_iterations=2, min_scale=0.5)
    estimator.warm_up(200, 240)
    stream = frames(5, 200, 240)
    for i in range(2):
        estimator.update(stream[i], i * PERIOD_NS)
    estimator.change(latency_budget_ms=0.001)
    for i in range(2, 5):
        result = estimator.update(stream[i], i * PERIOD_NS)
        assert result is not None and result.info.scale == 0.5 and result.flow.shape == (200, 240, 2)
        assert result.info.iterations == 1 and result.info.warm and result.info.over_budget


def test_a_warm_start_without_time_is_returned_as_it_is(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: one late frame must not be made later; its residual says that nothing was iterated."""
    model.update_block.flow_head.conv2.weight.mul_(0.1)  # untrained: else it wanders, which is no start
    clock = Clock(model, monkeypatch)
    estimator = FlowEstimator(model, latency_budget_ms=100, tolerance_px=None)
    stream = frames(4, 200, 240)
    for i in range(3):
        estimator.update(stream[i], i * PERIOD_NS)
    clock.encode_ms = 95 + clock.encode_ms  # the machine is busy with something else
    result = estimator.update(stream[3], 3 * PERIOD_NS)
    assert result is not None and result.info.iterations == 0 and result.info.stop_reason == "deadline"
    assert np.isnan(result.residual).all() and np.isnan(result.info.residual_px) and result.info.warm


def test_huge_frames_are_never_processed_whole(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: memory grows with the pixels; with attention over all pairs of cells, to 67 GB at 3840x2160."""
    monkeypatch.setattr(DEQFlow, "max_pixels", 1 << 17)
    estimator = FlowEstimator(model, max_iterations=1)
    frame = np.zeros((400, 700, 3), np.uint8)
    frame[::7] = 255
    assert estimator.update(frame, 0) is None
    result = estimator.update(frame, PERIOD_NS)
    assert result is not None and result.info.scale == 0.625 and result.flow.shape == (400, 700, 2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_state_moves_with_the_content(direction: str) -> None:
    """Why: a state left where it was would start every moving edge with the wrong hidden state."""
    hidden, flow = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    hidden[..., 2, 3] = 1.0
    flow[:, 0] = 2.0 if direction == "forward" else -2.0
    moved, moved_flow = carry((hidden, flow), direction)
    assert float(moved[0, 0, 2, 5]) == 1.0 and float(moved[0, 0, 2, 3]) == 0.0
    torch.testing.assert_close(moved_flow, flow)


def test_forward_warp_conserves_what_it_moves() -> None:
    """Why: weights shared among four cells must sum to one cell, wherever it lands; what leaves the frame is gone."""
    torch.manual_seed(0)
    weight = forward_warp(torch.rand(1, 1, 9, 9), torch.full((1, 2, 9, 9), 0.3))[1]
    assert float(weight[..., 1:-1, 1:-1].min()) == pytest.approx(1.0)
    assert float(forward_warp(torch.rand(1, 1, 9, 9), torch.full((1, 2, 9, 9), 1e9))[1].max()) == 0.0
