# SPDX-License-Identifier: Apache-2.0
"""What a stream does behind cuts and images without content, and what it takes for none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streams import PERIOD_NS, frames

from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.model.cells import likeness
from deq_flow_ros.streaming import FlowEstimator
from deq_flow_ros.streaming.continuity import UNEXPLAINED, UNMATCHED, Seen, why_no_start
from deq_flow_ros.streaming.interface import pair_values

SIZE = 128, 160
PLAIN = {"black": 0, "white": 255, "grey": 128}


@pytest.fixture(scope="module")
def nano() -> DEQFlow:
    return load_model("nano")


@pytest.mark.parametrize("level", PLAIN.values(), ids=PLAIN)
def test_after_a_frame_of_one_colour_the_next_picture_starts_cold(nano: DEQFlow, level: int) -> None:
    """Why: a camera that starts black, a lens cap, a flash: the flow from there to a picture means nothing, and carried
    on it once was 75 px where 3 px were true.
    """
    plain, pictures = np.full((*SIZE, 3), level, np.uint8), frames(4, *SIZE)
    estimator = FlowEstimator(nano, max_iterations=2, tolerance_px=None)
    seen = []
    for i, frame in enumerate([plain, plain, *pictures[:2], plain, *pictures[2:]]):
        result = estimator.update(frame, i * PERIOD_NS)
        seen.append(None if result is None else (result.info.warm, result.info.reset_reason))
        if i == 1:
            assert estimator.reset_reason == "flat image: nothing to match"
    cold = (False, "flat image before: nothing to match")
    assert seen == [None, None, None, cold, None, None, cold]


def test_after_black_with_sensor_noise_the_next_picture_starts_a_stream(nano: DEQFlow) -> None:
    """Why: a covered lens is not exactly black; its noise has no layout that a picture could have in common with it."""
    noise = np.random.default_rng(0).normal(4, 2, (2, *SIZE, 3)).clip(0, 255).astype(np.uint8)
    estimator = FlowEstimator(nano, max_iterations=2, tolerance_px=None)
    results = [estimator.update(frame, i * PERIOD_NS) for i, frame in enumerate([*noise, *frames(2, *SIZE)])]
    assert results[2] is None and results[3] is not None
    assert results[3].info.reset_reason == "scene cut" and not results[3].info.warm


def test_a_dim_picture_is_not_flat() -> None:
    """Why: features do not depend on the strength of the light, so at 5 % of it there still is something to match."""
    picture = frames(1, *SIZE)[0]
    assert not Seen.of((0.05 * picture).astype(np.uint8), 0).flat
    fine = np.where(np.indices(SIZE).sum(0) % 2, 100, 140).astype(np.uint8)
    assert not Seen.of(np.dstack(3 * [fine]), 0).flat


def test_a_cut_from_a_picture_with_plain_parts_is_seen() -> None:
    """Why: OpenCV gives 1 as correlation with a plain template, which once was taken for the same layout."""
    picture = frames(1, *SIZE)[0]
    framed = picture.copy()
    framed[16:-16, 16:-16] = 250  # all that is looked for is plain
    half = picture.copy()
    half[:, 80:] = 5
    other = Seen.of(255 - frames(1, *SIZE, seed=5)[0] // 4, 0)
    for earlier, later in ((Seen.of(framed, 0), other), (other, Seen.of(half, 0))):
        assert later.is_cut_from(earlier)
    assert not Seen.of(half, 0).is_cut_from(Seen.of(half, 0))


def test_a_cut_that_colours_do_not_give_away_starts_cold(nano: DEQFlow) -> None:
    """Why: two scenes of the same colours; the motion found between them would lead the pairs behind it astray."""
    before, after = frames(3, *SIZE, seed=0), frames(3, *SIZE, seed=5)
    flows = []
    for warm in (True, False):
        estimator = FlowEstimator(nano, max_iterations=2, tolerance_px=None, warm=warm)
        results = [estimator.update(frame, i * PERIOD_NS) for i, frame in enumerate([*before, *after])]
        flows.append(results[-2])
        if warm:
            infos = [result.info for result in results[1:]]
    assert [info.warm for info in infos] == [False, True, False, False, True]
    assert (infos[2].reset_reason, infos[3].reset_reason) == (UNEXPLAINED, UNMATCHED)
    np.testing.assert_array_equal(flows[0].flow, flows[1].flow)


def test_a_wall_of_noise_alone_is_never_a_start(nano: DEQFlow) -> None:
    """Why: what is found between two images of noise means nothing, and grows from pair to pair if it is carried on."""
    rng = np.random.default_rng(0)
    estimator = FlowEstimator(nano, max_iterations=2, tolerance_px=None)
    walls = [np.clip(90 + rng.normal(0, 3, (*SIZE, 3)), 0, 255).astype(np.uint8) for _ in range(4)]
    results = [estimator.update(wall, i * PERIOD_NS) for i, wall in enumerate(walls)]
    assert [(r.info.warm, r.info.reset_reason) for r in results[2:]] == 2 * [(False, UNMATCHED)]  # type: ignore[union-attr]
    accounts = [pair_values(result.info, {}) for result in results[1:]]  # type: ignore[union-attr]
    assert [account["matched"] for account in accounts] == 3 * ["false"]
    assert all(float(account["likeness"]) < 0.35 for account in accounts)


def test_a_dark_and_noisy_picture_is_still_matched(nano: DEQFlow) -> None:
    """Why: ``matched`` is there for images of noise alone; at a twentieth of the light there is a scene to be seen."""
    rng = np.random.default_rng(0)
    estimator = FlowEstimator(nano, max_iterations=2, tolerance_px=None)
    dim = [0.05 * frame + rng.normal(0, 1, frame.shape) for frame in frames(2, *SIZE)]
    dark = [frame.clip(0, 255).astype(np.uint8) for frame in dim]
    estimator.update(dark[0], 0)
    result = estimator.update(dark[1], PERIOD_NS)
    assert result is not None and result.info.matched and not result.info.repeated
    again = estimator.update(dark[1].copy(), 2 * PERIOD_NS)
    assert again is not None and again.info.repeated, "a camera whose noise stands still is frozen"


def test_frames_may_be_read_into_the_same_memory(nano: DEQFlow) -> None:
    """Why: OpenCV's ``read(image)`` does; the frame before would be the present one, when the scale changes too."""
    flows = []
    for memory in (None, np.empty((*SIZE, 3), np.uint8)):
        estimator, found = FlowEstimator(nano, max_iterations=2, tolerance_px=None, max_scale=1.0), []
        for number, frame in enumerate(frames(3, *SIZE)):
            given = frame if memory is None else memory
            given[:] = frame
            estimator.change(min_scale=0.75 if number == 2 else 1.0, max_scale=0.75 if number == 2 else 1.0)
            found.append(estimator.update(given, number * PERIOD_NS))
        assert found[2] is not None and found[2].info.scale < 1
        flows.append(found[2].flow)
    np.testing.assert_array_equal(*flows)
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    estimator.reset("another size")
    estimator.update(noise, 10 * PERIOD_NS)
    noise[:4, :4] ^= 1
    result = estimator.update(noise, 11 * PERIOD_NS)
    assert result is not None and not result.info.repeated


def test_likeness_is_that_of_the_cells_that_are_led_to() -> None:
    """Why: a stream starts anew by it; what leaves the image must not count, and an x taken for a y would."""
    features = torch.randn(1, 16, 40, 56, generator=torch.Generator().manual_seed(0))
    moved = torch.roll(features, (3, -2), (-1, -2))
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 40, 56)
    flows = torch.cat((flow, 0 * flow, 1e9 * flow, torch.nan * flow))
    right, still, outside, undefined = likeness(flows, features, moved).tolist()
    assert right == pytest.approx(1) and abs(still) < 0.1 and outside == undefined == 0
    assert likeness(flow, 0 * features, moved).tolist() == [0]  # features of nothing are like nothing


def test_bounds_are_of_ratios_only_where_there_is_something_to_compare() -> None:
    """Why: between pairs that do not match either, a ratio is that of two accidents."""
    assert why_no_start(0.9, 0.9, 0.95) is None and why_no_start(0.9, 0.85, None) is None
    assert why_no_start(0.2, 0.3, 0.9) == why_no_start(0.9, 0.5, None) == UNEXPLAINED
    assert why_no_start(0.2, 0.1, None) is None
