# SPDX-License-Identifier: Apache-2.0
"""Settings of a stream: checked together, changed while it runs; scales above 1; and its state for a bug report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, Clock, frames

from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.streaming import FlowEstimator, FlowResult
from deq_flow_ros.streaming.plan import MAX_PIXELS, scale_ladder


def run(estimator: FlowEstimator, stream: list[np.ndarray], first: int, last: int) -> list[FlowResult | None]:
    return [estimator.update(stream[i], i * PERIOD_NS) for i in range(first, last + 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency_budget_ms": 0}, "latency_budget_ms must be > 0 or None, got 0"),
        ({"latency_budget_ms": float("nan")}, "latency_budget_ms must be > 0 or None, got nan"),
        ({"max_iterations": 0}, "max_iterations must be a whole number >= 1, got 0"),
        ({"max_iterations": 2.5}, "max_iterations must be a whole number >= 1, got 2.5"),
        ({"direction": "up"}, "direction must be one of forward, backward, got 'up'"),
        ({"min_scale": 0}, r"min_scale must be in \(0, 4\], got 0"),
        ({"max_scale": 4.5}, r"max_scale must be in \(0, 4\], got 4.5"),
        ({"max_scale": 0.125}, "min_scale must be at most max_scale, got min_scale 0.25 and max_scale 0.125"),
        ({"tolerance_px": -1}, "tolerance_px must be > 0 or None, got -1"),
        ({"max_gap_ms": "long"}, "max_gap_ms must be > 0, got 'long'"),
        ({"max_iteration": 3}, "no setting max_iteration; expected some of latency_budget_ms, max_iterations"),
    ],
)
def test_impossible_settings_are_refused(model: DEQFlow, settings: dict, message: str) -> None:
    """Why: the error names the setting, what it may be, and what it was; and of a change nothing is done then."""
    with pytest.raises(ValueError, match=message):
        FlowEstimator(model, **settings)
    estimator = FlowEstimator(model)
    before = estimator.settings
    with pytest.raises(ValueError, match=message):
        estimator.change(**{"latency_budget_ms": 5.0, **settings})
    assert estimator.settings is before


def test_a_running_stream_takes_other_settings() -> None:
    """Why: a robot tunes its budget while it drives; what the last fixed point still fits must not be thrown away."""
    # Trained: a stream starts anew where its motion explains nothing.
    estimator = FlowEstimator(load_model("nano"), max_iterations=4, tolerance_px=None)
    stream = frames(12, 200, 240)
    run(estimator, stream, 0, 2)
    estimator.change(max_iterations=2, latency_budget_ms=60000.0, max_gap_ms=500.0)
    (result,) = run(estimator, stream, 3, 3)
    assert result is not None and result.info.warm and result.info.iterations == 2
    assert result.info.budget_ms == 60000.0 and result.info.reset_reason is None
    estimator.change(min_scale=0.5, max_scale=0.5)
    (result,) = run(estimator, stream, 4, 4)
    assert result is not None and result.info.warm and result.info.scale == 0.5
    estimator.change(latency_budget_ms=None, tolerance_px=1e6, max_scale=1.5)
    (result,) = run(estimator, stream, 5, 5)
    assert result is not None and result.info.warm and result.info.scale == 1.5
    assert result.info.stop_reason == "converged" and result.flow.shape == (200, 240, 2)
    estimator.change(direction="backward")
    first, second, third = run(estimator, stream, 6, 8)
    assert first is None and second is not None and third is not None
    assert not second.info.warm and second.info.reset_reason == "direction changed from forward to backward"
    assert second.info.direction == "backward" and third.info.warm and third.info.reset_reason is None
    estimator.change(direction="backward", max_iterations=1)
    (result,) = run(estimator, stream, 9, 9)
    assert result is not None and result.info.warm


def test_before_the_first_frame_a_change_resets_nothing(model: DEQFlow) -> None:
    """Why: the reason of the first frame's reset is that the stream starts."""
    estimator = FlowEstimator(model)
    estimator.change(direction="backward")
    assert estimator.update(frames(1)[0], 0) is None and estimator.reset_reason == "start"


def test_enlarged_frames_give_finer_flow_of_the_same_size() -> None:
    """Why: a camera of few pixels has time to spare; the network computes on cells of 8 px, so its flow is finer then.

    The middle of the picture moves by 2.5 px, the rest by half a pixel.
    """
    model = load_model("nano")
    height, width = 96, 128
    rng = np.random.default_rng(3)
    noise = torch.from_numpy(rng.uniform(0, 255, (1, 3, height // 3, width // 3)).astype(np.float32))
    picture = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 255)
    truth = np.full((height, width, 2), (0.5, 0.0), np.float32)
    truth[36:60, 48:80] = (2.5, 0.0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    # The later image: each of its pixels from where it was (near the edge of the middle, neither).
    where = np.stack(((x - truth[..., 0] + 0.5) * 2 / width - 1, (y + 0.5) * 2 / height - 1), -1)[None]
    later = torch.nn.functional.grid_sample(picture, torch.from_numpy(where), align_corners=False, mode="bicubic")
    pair = [image[0].permute(1, 2, 0).clamp(0, 255).byte().numpy() for image in (picture, later)]
    errors = {}
    for scale in (1.0, 2.0):
        estimator = FlowEstimator(model, max_scale=scale, tolerance_px=None)
        estimator.update(pair[0], 0)
        result = estimator.update(pair[1], PERIOD_NS)
        assert result is not None and result.info.scale == scale and result.flow.shape == (height, width, 2)
        errors[scale] = float(np.linalg.norm(result.flow - truth, axis=2)[8:-8, 8:-8].mean())
    assert errors[2.0] < 0.8 * errors[1.0] < 0.4, errors


def test_enlarging_gives_way_to_the_budget(model: DEQFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: ``max_scale`` is what may be done, not what must be.

    10 + 20 ms at 48x64 pixels and in proportion for others: two iterations take 78 ms at 1.25 times the size, 113 ms
    at 1.5.
    """
    clock = Clock(model, monkeypatch, per_pixel=True)
    estimator = FlowEstimator(model, latency_budget_ms=100, max_scale=2.0, tolerance_px=None, max_iterations=50)
    estimator.warm_up(48, 64)
    stream = frames(35)
    infos = []
    for i in range(35):
        if i == 12:
            estimator.change(latency_budget_ms=400)
        result = estimator.update(stream[i], i * PERIOD_NS, clock.now_ns)
        infos.append(result and result.info)
    assert infos[11] and infos[11].scale == 1.25 and infos[34] and infos[34].scale == 2.0
    assert not any(info.over_budget for info in infos if info)


def test_scales_have_their_bounds_at_every_size() -> None:
    """Why: above 2^20 px memory runs out, below 96 px nothing is seen; whatever the limits allow."""
    assert list(scale_ladder((96, 128), 0.25, 4.0)) == [4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0]
    below = [0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25]
    assert list(scale_ladder((480, 640), 0.25, 4.0)) == [1.75, 1.5, 1.25, 1.0, *below]
    assert list(scale_ladder((40, 40), 0.25, 4.0)) == [4.0, 3.5, 3.0, 2.5]
    assert list(scale_ladder((32, 40), 0.25, 1.0)) == [3.0]  # images of a few cells are enlarged, whatever is asked for
    assert list(scale_ladder((480, 640), 0.2, 0.2)) == [0.2]
    for fixed in (1.0, 4.0):
        (scale,) = scale_ladder((1100, 2000), fixed, fixed)
        assert 1100 * 2000 * scale**2 == pytest.approx(MAX_PIXELS)


def test_a_snapshot_holds_what_a_pair_can_be_solved_again_from() -> None:
    """Why: a bug report must let others repeat what the robot saw; and it must not change with the stream."""
    model = load_model("nano")
    estimator = FlowEstimator(model, max_iterations=3, tolerance_px=None)
    assert estimator.snapshot() == {}
    stream = frames(5, 48, 64)
    estimator.update(stream[0], 0)
    assert set(estimator.snapshot()) == {"image2", "stamp2_ns", "scale"}
    *_, result = run(estimator, stream, 1, 3)
    assert result is not None
    snapshot = estimator.snapshot()
    np.testing.assert_array_equal(snapshot["image1"], stream[2])
    np.testing.assert_array_equal(snapshot["image2"], stream[3])
    assert (snapshot["stamp1_ns"], snapshot["stamp2_ns"], snapshot["scale"]) == (2 * PERIOD_NS, 3 * PERIOD_NS, 1.0)
    kept = {name: array.copy() for name, array in snapshot.items()}
    run(estimator, stream, 4, 4)
    stream[2][:] = stream[3][:] = 0  # the stream needs them no longer
    for name, array in kept.items():
        np.testing.assert_array_equal(snapshot[name], array)
    images = [torch.from_numpy(snapshot[name]).permute(2, 0, 1)[None] for name in ("image1", "image2")]
    start = tuple(torch.from_numpy(snapshot[name])[None] for name in ("start_hidden", "start_flow"))
    again = model(*images, max_iterations=3, state=start)
    np.testing.assert_allclose(again.flow[0].permute(1, 2, 0).numpy(), result.flow, atol=1e-3)
    for name, tensor in zip(("hidden", "flow"), again.state, strict=True):
        np.testing.assert_allclose(tensor[0].numpy(), snapshot[name], atol=1e-3)
    estimator.reset("done")
    assert estimator.snapshot() == {}
