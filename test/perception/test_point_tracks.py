# SPDX-License-Identifier: Apache-2.0
"""Point tracks through synthetic flow and pictures whose motion is known."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from deq_flow_ros.perception.point_tracks import (
    GAP,
    OUTSIDE,
    RESTART,
    SIZE,
    UNCERTAIN,
    UNKNOWN,
    PointTracker,
    TrackSettings,
    corners,
)

SHAPE = (96, 128)
WIDE = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (200, 400), np.uint8), (0, 0), 1.5)
SHIFT = np.array([2.3, -0.6])
SURE = np.full(SHAPE, 0.2, np.float32)


def picture(number: int, shift: np.ndarray = SHIFT) -> np.ndarray:
    """(H, W) uint8: the picture, moved by so many times the shift."""
    x, y = 200 - number * shift[0], 60 - number * shift[1]
    matrix = np.array([[1.0, 0.0, -x], [0.0, 1.0, -y]])
    return cv2.warpAffine(WIDE, matrix, SHAPE[::-1], flags=cv2.INTER_CUBIC)


def field(error: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """(H, W, 2) px: the true flow of ``picture`` plus an error."""
    return np.broadcast_to(np.float32(SHIFT + error), (*SHAPE, 2)).copy()


def follow(tracker: PointTracker, step: int, flow: np.ndarray | None = None, **changed: np.ndarray) -> dict[str, int]:
    inputs = {"uncertainty": SURE, "first": picture(step), "second": picture(step + 1), **changed}
    return dict(tracker.follow(field() if flow is None else flow, stamps_ns=(step * 100, step * 100 + 100), **inputs))


def test_points_are_followed_below_a_pixel_although_the_flow_errs() -> None:
    """Chained, 0.4 px a step would be 4 px after ten; the images correct each step."""
    tracker = PointTracker()
    follow(tracker, 0)
    start = {number: point for number, point in zip(tracker.tracks["id"], tracker.tracks["point"], strict=True)}
    for step in range(1, 11):
        follow(tracker, step, field((0.3, 0.3)))
    tracks = tracker.tracks
    old = np.flatnonzero(tracks["age"] >= 10)
    went = [(end, start[number]) for number, end, _, _ in tracks[old] if number in start]
    wrong = [np.linalg.norm(end - begin - 10 * SHIFT) for end, begin in went]
    assert len(wrong) > 10 and np.median(wrong) < 0.25 and max(wrong) < 0.75
    assert len(set(tracks["id"])) == len(tracks["id"]) and (tracks["error"][old] < 1.5).all()


@pytest.mark.parametrize("backward", [False, True])
def test_a_surface_that_grows_is_followed_without_drift_by_flow_of_either_direction(backward: bool) -> None:
    """Translations alone are wrong by a part of the growth in each step, which adds up to some px."""
    growth, steps = 1.03, 12

    def grown(number: int) -> np.ndarray:
        matrix = np.array([[growth**number, 0.0, 0.0], [0.0, growth**number, 0.0]])
        return cv2.warpAffine(WIDE, matrix, SHAPE[::-1], flags=cv2.INTER_CUBIC)

    y, x = np.indices(SHAPE, np.float32)
    flow = np.stack([x, y], axis=2) * np.float32((1 / growth if backward else growth) - 1)
    tracker, start = PointTracker(TrackSettings(max_tracks=0)), corners(grown(0), 8, 3.0)
    tracker.begin(start)
    for step in range(steps):
        tracker.follow(flow, SURE, grown(step), grown(step + 1), (step, step + 1), backward)
    tracks, truth = tracker.tracks, start * growth**steps
    visible = np.flatnonzero((truth < np.array(SHAPE[::-1]) - 8).all(axis=1))
    assert len(np.intersect1d(visible, tracks["id"])) > 0.9 * len(visible) > 15
    wrong = np.linalg.norm(tracks["point"] - truth[tracks["id"]], axis=1)
    assert np.median(wrong) < 0.1 and np.quantile(wrong, 0.9) < 0.4


def test_flow_carries_tracks_where_the_images_confirm_nothing() -> None:
    """Lost texture ends a sparse track at once; here the error that is to be expected ends it, after a while."""
    tracker = PointTracker(TrackSettings(max_error_px=1.0))
    follow(tracker, 0)
    count, grey = len(tracker.tracks), np.full(SHAPE, 128, np.uint8)
    ended = [follow(tracker, step, np.zeros((*SHAPE, 2), np.float32), first=grey, second=grey,
                    uncertainty=np.full(SHAPE, 0.4, np.float32)) for step in (1, 2, 3, 4, 5, 6, 7)]  # fmt: skip
    assert not ended[0] and len(tracker.tracks) == 0
    assert sum(each.get(UNCERTAIN, 0) for each in ended) == count


def test_ends_have_reasons() -> None:
    """No flow, out of the image: what ends for one reason is not counted as another."""
    tracker = PointTracker()
    follow(tracker, 0)
    hole = field()
    hole[:, :40] = np.nan
    before = tracker.tracks["point"]
    ended = follow(tracker, 1, hole)
    assert ended[UNKNOWN] >= np.sum(before[:, 0] < 39) > 0
    assert set(ended) <= {UNKNOWN, OUTSIDE}
    assert np.isfinite(tracker.tracks["point"]).all()


@pytest.mark.parametrize(("stamps", "reason"), [((300, 400), GAP), ((0, 100), RESTART)])
def test_a_lost_field_ends_all_tracks_by_name(stamps: tuple[int, int], reason: str) -> None:
    """A track across a field that is missing would be at the wrong place from then on."""
    tracker = PointTracker()
    follow(tracker, 0)
    old = set(tracker.tracks["id"])
    ended = tracker.follow(field(), SURE, picture(3), picture(4), stamps)
    assert ended == {reason: len(old)}
    assert len(tracker.tracks) and not old & set(tracker.tracks["id"])


def test_other_sizes_end_all_tracks_and_sizes_that_differ_are_named() -> None:
    """Positions of another size mean other points."""
    tracker = PointTracker()
    follow(tracker, 0)
    old = len(tracker.tracks)
    small = picture(1)[:48, :64]
    ended = tracker.follow(field()[:48, :64], SURE[:48, :64], small, small, (100, 200))
    assert ended == {SIZE: old}
    with pytest.raises(ValueError, match="of one size"):
        tracker.follow(field(), SURE[:48], picture(1), picture(2), (200, 300))
    with pytest.raises(ValueError, match="the earlier image first"):
        tracker.follow(field(), SURE, picture(2), picture(1), (300, 200))


def test_tracks_begin_where_there_is_texture_and_none_is() -> None:
    """Spread over the image; noise of a sensor on a plain wall is no texture."""
    image = picture(0).copy()
    noise = np.random.default_rng(2).normal(128, 1.5, (96, 64))
    image[:, :64] = np.rint(noise)
    found = corners(image, 12, 3.0)
    assert len(found) >= 20 and found[:, 0].min() >= 60
    tracker = PointTracker(TrackSettings(max_tracks=7))
    follow(tracker, 0)
    assert len(tracker.tracks) == 7
    tracker.settings = TrackSettings()
    follow(tracker, 1)
    points = tracker.tracks["point"]
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(len(points))
    assert len(points) > 30 and apart.min() >= 11


def test_tracks_of_a_large_image_begin_within_little_memory() -> None:
    """A distance of each free place from each track would be a hundred MB at 1920x1080."""
    image = np.tile(WIDE, (3, 3))[:540, :960]
    tracker = PointTracker(TrackSettings(spacing_px=6, max_tracks=20_000))
    tracker.begin(corners(image, 6, 2.0)[::2])
    tracemalloc.start()
    try:
        tracker.follow(np.zeros((540, 960, 2), np.float32), np.zeros((540, 960), np.float32), image, image, (0, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(tracker.tracks) > 4000 and peak < 60 * image.size
