# SPDX-License-Identifier: Apache-2.0
"""What moves by itself is told from what the camera's motion moves, on flow that is computed from a known scene."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.perception import Gyroscope, rotation_of
from deq_flow_ros.perception.motion_mask import MaskSettings, MotionMask, MotionSegmenter

WIDTH, HEIGHT = 160, 120
CAMERA = CameraModel(130.0, 130.0, 79.5, 59.5, WIDTH, HEIGHT)
PIXELS = np.mgrid[:HEIGHT, :WIDTH][::-1].transpose(1, 2, 0).astype(np.float64)
BOX = (slice(40, 80), slice(100, 140))
TURN = np.array([0.01, -0.03, 0.02])
UNCERTAINTY = np.full((HEIGHT, WIDTH), 0.2, np.float32)


def depth() -> np.ndarray:
    """(H, W) m: hills and a wall in front of them."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    hills = 6 + 2 * np.sin(rows / 17.0) * np.cos(columns / 23.0)
    return np.where((columns > 20) & (columns < 60) & (rows > 30), 3.0, hills)


def flow(
    turn: np.ndarray = TURN, translation: tuple[float, float, float] = (0.0, 0.0, 0.0), camera: CameraModel = CAMERA
) -> np.ndarray:
    """(H, W, 2) px of a scene that stands still: the camera turns by a rotation vector, then points move as given."""
    rays = camera.bearings(PIXELS.reshape(-1, 2))
    points = rays / rays[:, 2:] * depth().reshape(-1, 1)
    seen = points @ cv2.Rodrigues(turn)[0].T + translation
    matrix = np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]])
    there = cv2.projectPoints(seen, np.zeros(3), np.zeros(3), matrix, np.array(camera.distortion or [0.0] * 4))[0]
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(HEIGHT, WIDTH, 2)), (0, 0), 2)
    return (there.reshape(PIXELS.shape) - PIXELS + 0.1 * noise / noise.std()).astype(np.float32)


def found(field: np.ndarray, camera: CameraModel | None = CAMERA, **settings: float) -> MotionMask:
    """What moves in a field."""
    return MotionSegmenter((HEIGHT, WIDTH), camera)(field, UNCERTAINTY, replace(MaskSettings(), **settings))


def overlap(mask: np.ndarray) -> float:
    """Intersection over union with ``BOX``."""
    true = np.zeros_like(mask)
    true[BOX] = True
    return float((mask & true).sum() / (mask | true).sum())


@pytest.mark.parametrize(
    ("field", "model"),
    [
        (flow(), "homography"),
        (np.zeros((HEIGHT, WIDTH, 2), np.float32), "homography"),
        (flow(translation=(0.3, 0.05, -0.3)), "essential matrix"),
        (flow(np.zeros(3), (0.0, 0.0, -0.5)), "essential matrix"),
    ],
    ids=["turning", "at rest", "turning and driving", "driving ahead"],
)
def test_nothing_moves_where_the_camera_alone_does(field: np.ndarray, model: str) -> None:
    """Near things move far in the image: they must not count, and the model must be no freer than it needs to be."""
    result = found(field)
    assert result.problem == "" and result.ego_motion is not None
    assert result.ego_motion.model == model and result.ego_motion.inliers > 0.95
    assert not result.mask.any() and len(result.boxes) == 0


@pytest.mark.parametrize("translation", [(0.0, 0.0, 0.0), (0.3, 0.05, -0.3)], ids=["turning", "driving"])
def test_a_box_that_moves_by_itself_is_found_while_the_camera_moves(translation: tuple[float, float, float]) -> None:
    """Its mask, its box, and how far it moves; what is uncertain is no evidence."""
    field = flow(translation=translation)
    field[BOX] += (-1.0, 3.0)
    result = found(field)
    assert overlap(result.mask) > 0.85
    (box,) = result.boxes
    assert abs(box.x - 119.5) <= 2 and abs(box.y - 59.5) <= 2 and abs(box.width - 40) <= 4 and abs(box.height - 40) <= 4
    assert box.motion == pytest.approx(np.hypot(1, 3), abs=0.8)
    doubtful = UNCERTAINTY.copy()
    doubtful[BOX] = 20.0
    assert not MotionSegmenter((HEIGHT, WIDTH), CAMERA)(field, doubtful, MaskSettings()).mask.any()


def test_what_moves_along_its_epipolar_line_the_wrong_way_is_found() -> None:
    """It stays on the line of a point that stands still; but there such a point would be behind the camera."""
    field = flow(np.zeros(3), (0.4, 0.0, 0.0))
    field[BOX] = (-4.0, 0.0)
    assert overlap(found(field).mask) > 0.85


def test_distortion_is_taken_off() -> None:
    """A wide lens bends the flow of what stands still by several pixels: that is no motion of its own."""
    bent = replace(CAMERA, distortion_model="plumb_bob", distortion=(-0.28, 0.07, 0.0, 0.0))
    field = flow(translation=(0.3, 0.05, -0.3), camera=bent)
    assert not found(field, bent).mask.any()
    field[BOX] += (-1.0, 3.0)
    assert overlap(found(field, bent).mask) > 0.8


def test_without_calibration_a_homography_is_all_there_is() -> None:
    """Enough for a camera that turns; the parallax of one that drives counts as motion, as the documentation says."""
    field = flow()
    field[BOX] += (-1.0, 3.0)
    assert overlap(found(field, None).mask) > 0.85
    assert found(flow(translation=(0.6, 0.0, 0.0)), None).mask.any()


def test_unknown_flow_neither_counts_nor_disturbs() -> None:
    """NaN over half of the image; and over all of it, nothing can be said."""
    field = flow(translation=(0.3, 0.05, -0.3))
    field[BOX] += (-1.0, 3.0)
    field[:, :70] = np.nan
    field[BOX[0], 100:104] = np.nan
    assert overlap(found(field).mask) > 0.75
    assert not found(field).mask[:, :70].any()
    result = found(np.full_like(field, np.nan))
    assert "have flow" in result.problem and result.ego_motion is None and not result.mask.any()


def test_what_cannot_be_trusted_is_said() -> None:
    """Everything moves for itself; or the flow is uncertain everywhere. Neither is a mask to act on."""
    field = np.random.default_rng(0).normal(0, 8, (HEIGHT, WIDTH, 2)).astype(np.float32)
    assert "min_inliers" in found(field).problem
    result = MotionSegmenter((HEIGHT, WIDTH), CAMERA)(flow(), 50 * UNCERTAINTY, MaskSettings())
    assert "too little texture" in result.problem


def test_the_limit_follows_the_noise_of_the_field() -> None:
    """Flow on bare asphalt wavers in patches by more than the least motion that counts; what moves still stands out."""
    waver = cv2.GaussianBlur(np.random.default_rng(1).normal(size=(HEIGHT, WIDTH, 2)), (0, 0), 6)
    field = flow() + (0.4 * waver / waver.std()).astype(np.float32)
    segment, wavering = MotionSegmenter((HEIGHT, WIDTH), CAMERA), 3 * UNCERTAINTY
    assert segment(field, wavering, MaskSettings(noise=0.0)).mask.any()
    assert not segment(field, wavering, MaskSettings()).mask.any()
    field[BOX] += (-2.0, 4.0)
    assert overlap(segment(field, wavering, MaskSettings()).mask) > 0.8


def test_a_measured_rotation_is_taken_as_it_is() -> None:
    """Two thirds of the view are a bus: fitted to all, the rest would move as well; the gyroscope knows better."""
    field = flow(TURN, (0.0, 0.0, -0.3))
    field[:, :105] = flow(TURN + np.array([0.0, 0.03, 0.0]), (0.0, 0.0, -0.3))[:, :105]
    turn = cv2.Rodrigues(TURN)[0]
    segment, settings = MotionSegmenter((HEIGHT, WIDTH), CAMERA), MaskSettings(min_inliers=0.2)
    assert segment(field, UNCERTAINTY, settings).mask[:, 110:].mean() > 0.5
    result = segment(field, UNCERTAINTY, settings, turn)
    assert result.mask[:, :100].mean() > 0.9 and result.mask[:, 110:].mean() < 0.1
    still = flow(TURN, (0.3, 0.05, -0.3))
    result = MotionSegmenter((HEIGHT, WIDTH), CAMERA)(still, UNCERTAINTY, MaskSettings(), turn)
    assert result.problem == "" and not result.mask.any()
    assert result.ego_motion is not None and result.ego_motion.translation is not None
    truth = np.array([0.3, 0.05, -0.3])
    assert result.ego_motion.translation @ truth / np.linalg.norm(truth) > 0.995


def test_a_camera_at_rest_has_no_translation() -> None:
    """Why: where nothing moves, no position tells a direction; a robot that stands still has such images."""
    still = np.zeros((HEIGHT, WIDTH, 2), np.float32)
    result = MotionSegmenter((HEIGHT, WIDTH), CAMERA)(still, UNCERTAINTY, MaskSettings(), np.eye(3))
    assert result.problem == "" and not result.mask.any()


def test_the_gyroscope_is_integrated_in_the_axes_of_the_camera() -> None:
    """An IMU with z up; turning left, about z, what stands still moves to the right in the image."""
    to_camera = rotation_of(np.array([0.5, -0.5, 0.5, 0.5]))  # REP 103: x ahead, y left, z up, to the optical frame
    assert np.allclose(to_camera @ [1, 0, 0], [0, 0, 1]) and np.allclose(to_camera @ [0, 0, 1], [0, -1, 0])
    gyroscope = Gyroscope(to_camera)
    for step in range(11):
        gyroscope.add(step * 10_000_000, np.array([0.0, 0.0, 0.1 * step]))  # rad/s, growing
    turn = gyroscope.rotation(20_000_000, 70_000_000)
    angle = 10 * (0.07**2 - 0.02**2) / 2
    assert turn is not None and np.allclose(turn @ [0, 0, 1], [np.sin(angle), 0, np.cos(angle)], atol=1e-4)
    back = gyroscope.rotation(70_000_000, 20_000_000)
    assert back is not None and np.allclose(back @ turn, np.eye(3), atol=1e-9)
    assert gyroscope.rotation(20_000_000, 101_000_000) is None
    gyroscope.add(5, np.zeros(3))  # a recording starts over
    assert gyroscope.rotation(20_000_000, 70_000_000) is None
