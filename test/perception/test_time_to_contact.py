# SPDX-License-Identifier: Apache-2.0
"""Times to contact from synthetic flow whose truth is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.perception.time_to_contact import ContactEstimator, ContactSettings

SHAPE, FOCAL, ELAPSED_S = (120, 160), 115.0, 0.1
CAMERA = CameraModel(FOCAL, FOCAL, 79.5, 59.5, 160, 120)
SETTINGS = ContactSettings(rows=3, columns=4)
SURE = np.full(SHAPE, 0.02, np.float32)


def flow(
    translation: tuple[float, float, float],
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0),
    plane: tuple[float, float, float] = (0.0, 0.0, 0.25),
    elapsed_s: float = ELAPSED_S,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact flow (H, W, 2) px of a plane, and the times to contact (H, W) s along the line of sight.

    :param translation: of the camera, m/s, in its first axes; ``turn``: its rotation, rad/s.
    :param plane: n of the plane ``n . X = 1``, 1/m.
    """
    y, x = np.indices(SHAPE, np.float64)
    rays = np.stack([(x - 79.5) / FOCAL, (y - 59.5) / FOCAL, np.ones(SHAPE)])
    points = rays / np.einsum("i,ihw->hw", np.array(plane), rays)
    velocity = np.reshape(translation, (3, 1, 1))
    seen = np.einsum("ji,jhw->ihw", cv2.Rodrigues(np.array(turn) * elapsed_s)[0], points - velocity * elapsed_s)
    target = FOCAL * seen[:2] / seen[2] + np.array([79.5, 59.5]).reshape(2, 1, 1)
    distance = np.linalg.norm(points, axis=0)
    with np.errstate(divide="ignore"):
        seconds = distance**2 / np.sum(points * velocity, axis=0)
    return (target - np.stack([x, y])).transpose(1, 2, 0).astype(np.float32), seconds


def centres(field: np.ndarray) -> np.ndarray:
    """What a field (H, W) has in the middle of each region, (3, 4)."""
    return np.mean([field[20 - k :: 40, 20 - k :: 40] for k in (0, 1)], axis=0)


@pytest.mark.parametrize("elapsed_s", [ELAPSED_S, -ELAPSED_S])
@pytest.mark.parametrize("plane", [(0.0, 0.0, 0.25), (0.1, -0.05, 0.25)])
def test_an_approach_takes_its_true_time_however_the_camera_turns(
    plane: tuple[float, float, float], elapsed_s: float
) -> None:
    """Rotation alone has a divergence off the centre, slant and sideways motion as well; of neither may the time be."""
    turn = np.array([0.1, 0.3, 0.2])
    field, truth = flow((0.4, 0.1, 2.0), tuple(turn), plane, elapsed_s)
    rotation = cv2.Rodrigues(-turn * elapsed_s)[0]
    found = ContactEstimator(SHAPE, CAMERA, SETTINGS)(field, SURE, elapsed_s, rotation)
    assert np.abs(found.seconds / centres(truth) - 1).max() < 0.04
    assert found.confidence.min() > 0.5 and found.first == pytest.approx(float(found.seconds.min()))


def test_the_rotation_is_fitted_where_it_is_not_given() -> None:
    """Depth in the scene tells rotation from sideways motion."""
    near, times_near = flow((0.4, 0.0, 1.5), (0.0, 0.3, 0.0), (0.0, 0.0, 0.5))
    far, times_far = flow((0.4, 0.0, 1.5), (0.0, 0.3, 0.0), (0.02, 0.0, 0.15))
    near[:, 80:], times_near[:, 80:] = far[:, 80:], times_far[:, 80:]
    found = ContactEstimator(SHAPE, CAMERA, SETTINGS)(near, SURE, ELAPSED_S)
    assert found.rotation_known
    assert np.nanmax(np.abs(found.seconds / centres(times_near) - 1)) < 0.1


@pytest.mark.parametrize("velocity", [0.0, -2.0])
def test_what_stands_or_recedes_never_comes(velocity: float) -> None:
    """Infinite and known, which differs from not known."""
    found = ContactEstimator(SHAPE, CAMERA, SETTINGS)(flow((0.0, 0.0, velocity))[0], SURE, ELAPSED_S, np.eye(3))
    assert np.isinf(found.seconds).all() and (found.confidence > 0.9).all() and np.isinf(found.first)


def test_regions_without_flow_or_texture_say_nothing() -> None:
    """A region without texture has a large uncertainty and zero flow, which looks like standing still."""
    field, _ = flow((0.0, 0.0, 2.0))
    unsure = SURE.copy()
    field[:40, :40] = np.nan
    field[40:80, 40:80], unsure[40:80, 40:80] = 0.0, 5.0
    found = ContactEstimator(SHAPE, CAMERA, SETTINGS)(field, unsure, ELAPSED_S, np.eye(3))
    silent = np.isnan(found.seconds)
    assert silent[0, 0] and silent[1, 1] and silent.sum() == 2
    assert (found.confidence[silent] == 0).all()


def test_outliers_and_a_region_of_two_surfaces_do_not_move_the_time() -> None:
    """A fifth of each region moves otherwise, as at the border of an object."""
    field, truth = flow((0.0, 0.0, 2.0))
    for column in range(0, 160, 40):
        field[:, column : column + 8] += 3.0
    found = ContactEstimator(SHAPE, CAMERA, SETTINGS)(field, SURE, ELAPSED_S, np.eye(3))
    assert np.abs(found.seconds / centres(truth) - 1).max() < 0.05


def test_memory_smooths_what_moves_by_itself_and_is_forgotten() -> None:
    """After a gap, the mean of another scene would be published as the time of this one."""
    estimator = ContactEstimator(SHAPE, CAMERA, ContactSettings(rows=3, columns=4, smoothing_s=1.0))
    (fast, truth), (slow, _) = flow((0.0, 0.0, 4.0)), flow((0.0, 0.0, 1.0))
    faster = slow.copy()
    faster[:40, :40] = fast[:40, :40]
    estimator(slow, SURE, ELAPSED_S, np.eye(3))
    blended = estimator(faster, SURE, ELAPSED_S, np.eye(3)).seconds[0, 0]
    estimator.forget()
    fresh = estimator(faster, SURE, ELAPSED_S, np.eye(3)).seconds[0, 0]
    assert fresh == pytest.approx(centres(truth)[0, 0], rel=0.05) and blended > 1.2 * fresh


@pytest.mark.parametrize("elapsed_s", [ELAPSED_S, -ELAPSED_S])
def test_a_change_of_the_speed_does_not_lag(elapsed_s: float) -> None:
    """The memory has the slower approach, and the flow the mean of what was between the images; braking looks alike."""
    estimator = ContactEstimator(SHAPE, CAMERA, ContactSettings(rows=3, columns=4, smoothing_s=1.0))
    for number in range(6):
        middle = 1.0 * 1.2**number  # m/s, of each interval; at its ends, the speed is this by 1.2 ** +-0.5
        found = estimator(flow((0.0, 0.0, middle), elapsed_s=elapsed_s)[0], SURE, elapsed_s, np.eye(3))
        end = middle * 1.2 ** (0.5 if elapsed_s < 0 else -0.5)
        if number > 1:
            assert np.abs(found.seconds / centres(flow((0.0, 0.0, end))[1]) - 1).max() < 0.1, number


def test_what_cannot_be_is_named() -> None:
    """Sizes and times that do not fit, rather than a wrong time."""
    with pytest.raises(ValueError, match="60x50 of them in fields of 160x120 px"):
        ContactEstimator(SHAPE, CAMERA, ContactSettings(rows=50, columns=60))
    estimator = ContactEstimator(SHAPE, CAMERA, SETTINGS)
    with pytest.raises(ValueError, match="time between the two images, got 0"):
        estimator(flow((0.0, 0.0, 1.0))[0], SURE, 0.0)
