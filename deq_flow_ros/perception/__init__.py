# SPDX-License-Identifier: Apache-2.0
"""What a robot gets out of a flow field, in numpy and OpenCV alone: no ROS, no network.

Here is the motion of the camera, fitted robustly to a flow field, and how far each pixel deviates from it.
Positions are normalized image coordinates (x / z, y / z) of a calibrated camera. Without a calibration they may be
pixels by any focal length, and a homography is all that can be fitted.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import cv2
import numpy as np

CONFIDENCE, MAX_ITERATIONS = 0.999, 1000
"""Of the random search of USAC."""
FEWEST = 50
"""Positions below which no fit is tried."""
INLIER = 2.5
"""Expected errors within which a position counts as explained."""
REFINEMENTS, STEP = 5, 1e-6
"""Of the least squares: how many, and the change of a parameter by which slopes are measured."""
PAIRS = 60
"""Tried for the translation that goes with a known rotation."""
KEPT = 2000
"""Measurements of a gyroscope: two seconds of one at 1 kHz."""


@dataclass(frozen=True)
class EgoMotion:
    """How what stands still moves through the image, because the camera moves.

    :ivar matrix: (3, 3), takes homogeneous positions of the first image to those of the second: a homography, or the
        rotation, which is where points at an infinite distance appear.
    :ivar translation: (3,) unit vector: what is nearer than that is displaced towards it, in homogeneous positions of
        the second image, by an unknown length. None: there is no such displacement (a homography).
    :ivar inliers: share, 0..1, of the positions that it was fitted to which it explains.
    :ivar cost: what chose between the models, in units of the squared expected error; the smaller, the better.
    """

    matrix: np.ndarray
    translation: np.ndarray | None
    inliers: float = 0.0
    cost: float = math.inf

    @property
    def model(self) -> str:
        """In a word: "homography" or "essential matrix"."""
        return "homography" if self.translation is None else "essential matrix"

    def deviation(self, here: np.ndarray, there: np.ndarray) -> np.ndarray:
        """How far positions are from where something that stands still could be.

        That is a half-line: it begins where a point at infinity would appear, and leads on along the epipolar line the
        nearer the point is (Hartley & Zisserman, "Multiple View Geometry", 2nd edition, section 9.6).

        :param here, there: (N, 2) in the first and in the second image.
        :returns: (N,), in the units of the positions; NaN where a position is.
        """
        away, across, progress = self.split(here, there)
        distance = np.hypot(*away.T)
        return distance if self.translation is None else np.where(progress >= 0, np.abs(across), distance)

    def split(self, here: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The way from where a point at infinity would appear, (N, 2), and its parts across and along the line."""
        far = here @ self.matrix[:, :2].T + self.matrix[:, 2]
        away = there - far[:, :2] / far[:, 2:]
        t = np.zeros(3) if self.translation is None else self.translation
        x, y = (t[axis] * far[:, 2] - far[:, axis] * t[2] for axis in (0, 1))
        length = np.maximum(np.hypot(x, y), 1e-12)
        return away, (away[:, 0] * y - away[:, 1] * x) / length, (away[:, 0] * x + away[:, 1] * y) / length


def fit_ego_motion(
    here: np.ndarray, there: np.ndarray, sigma: np.ndarray, calibrated: bool = True, rotation: np.ndarray | None = None
) -> EgoMotion | None:
    """Fit the motion of the camera to positions in two images, by USAC with MAGSAC++ (Barath et al., CVPR 2020).

    Of the models that can be fitted, the one is taken that explains the positions best, by the criterion GRIC (Torr,
    "Geometric motion segmentation and model selection", 1998), which charges a model for the freedom that it has: an
    essential matrix lets each point move along a line, a homography leaves it no freedom.

    :param here, there: (N, 2) positions in the first and in the second image, finite.
    :param sigma: (N,) expected errors of ``there``, in its units, above 0.
    :param calibrated: whether the positions are normalized coordinates; else a homography is all that is fitted.
    :param rotation: (3, 3), takes directions of the first camera to those of the second, where it was measured
        (a gyroscope). Then only the direction of the translation is fitted, if there is any.
    :returns: None where fewer than ``FEWEST`` positions are given.
    """
    if len(here) < FEWEST:
        return None
    here, there = np.ascontiguousarray(here, np.float64), np.ascontiguousarray(there, np.float64)
    pairs = here, there, sigma
    if rotation is not None:
        candidates = [EgoMotion(rotation, None)]
        if calibrated and (motion := _with_translation(rotation, *pairs)) is not None:
            candidates.append(_refined(motion, *pairs, fixed_rotation=True))
        return _best(candidates, *pairs)
    candidates, limit = [EgoMotion(np.eye(3), None)], 2 * float(np.median(sigma))
    matrix, _ = cv2.findHomography(here, there, cv2.USAC_MAGSAC, limit, maxIters=MAX_ITERATIONS, confidence=CONFIDENCE)
    if matrix is not None:
        candidates.append(_refined(EgoMotion(matrix / matrix[2, 2], None), *pairs))
    if calibrated:
        essential, _ = cv2.findEssentialMat(here, there, np.eye(3), cv2.USAC_MAGSAC, CONFIDENCE, limit)
        if essential is not None and essential.shape == (3, 3):
            # Of its four decompositions, the one that has most positions in front of the camera.
            one, other, translation = cv2.decomposeEssentialMat(essential)
            poses = [EgoMotion(turn, sign * translation[:, 0]) for turn in (one, other) for sign in (1, -1)]
            candidates.append(_refined(_best(poses, *pairs), *pairs))
    return _best(candidates, *pairs)


def _best(motions: list[EgoMotion], here: np.ndarray, there: np.ndarray, sigma: np.ndarray) -> EgoMotion:
    """The motion of the least GRIC, which is divided by the number of positions, with its share of inliers."""
    judged = []
    for motion in motions:
        squared = (motion.deviation(here, there) / sigma) ** 2
        # Torr's terms: four measurements for each position, on a manifold of as many dimensions.
        dimensions, parameters = (2, 8) if motion.translation is None else (3, 5)
        penalty = math.log(4) * dimensions + math.log(4 * len(here)) * parameters / len(here)
        cost = float(np.minimum(squared, 2.0 * (4 - dimensions)).mean()) + penalty
        judged.append(replace(motion, inliers=float(np.mean(squared < INLIER**2)), cost=cost))
    return min(judged, key=lambda motion: motion.cost)


def _refined(
    motion: EgoMotion, here: np.ndarray, there: np.ndarray, sigma: np.ndarray, fixed_rotation: bool = False
) -> EgoMotion:
    """The motion of a model that fits best near the one given: least squares, in which outliers lose their weight.

    USAC takes what is within its limit for an inlier; here, what deviates less counts more (Geman and McClure).
    """
    parameters = 8 if motion.translation is None else 5
    varied = np.eye(parameters)[3 if fixed_rotation else 0 :]

    def deviations(step: np.ndarray) -> np.ndarray:
        away, across, _ = _moved(motion, step).split(here, there)
        return away.T if motion.translation is None else across[None]

    for _ in range(REFINEMENTS):
        now = deviations(np.zeros(parameters))
        slopes = [(deviations(step) - now) / STEP for step in STEP * varied]
        weight = np.broadcast_to(1 / (sigma * (1 + np.sum((now / sigma) ** 2, axis=0))), now.shape).ravel()
        weighted = np.stack([slope.ravel() * weight for slope in slopes], axis=1)
        motion = _moved(motion, np.linalg.lstsq(weighted, -now.ravel() * weight, rcond=None)[0] @ varied)
    return motion


def _moved(motion: EgoMotion, step: np.ndarray) -> EgoMotion:
    """Changed in all parameters: the entries of a homography; a rotation, and a turn of the translation."""
    if motion.translation is None:
        return EgoMotion(motion.matrix + np.append(step, 0.0).reshape(3, 3), None)
    side = np.cross(motion.translation, np.eye(3)[np.argmin(np.abs(motion.translation))])
    side /= np.linalg.norm(side)
    moved = motion.translation + step[3] * side + step[4] * np.cross(motion.translation, side)
    return EgoMotion(cv2.Rodrigues(step[:3])[0] @ motion.matrix, moved / np.linalg.norm(moved))


def _with_translation(rotation: np.ndarray, here: np.ndarray, there: np.ndarray, sigma: np.ndarray) -> EgoMotion | None:
    """A known rotation with the translation that explains most positions; None if the rotation leaves no motion.

    Each position allows directions in one plane, so that two give one; the best of many such pairs is taken.
    """
    far = here @ rotation[:, :2].T + rotation[:, 2]
    normals = np.cross(far, np.column_stack([there, np.ones(len(there))]))
    first, second = np.random.default_rng(0).integers(0, len(here), (2, PAIRS))
    directions = np.cross(normals[first], normals[second])
    lengths = np.linalg.norm(directions, axis=1)
    directions = directions[lengths > 0] / lengths[lengths > 0, None]
    tried = [EgoMotion(rotation, sign * each) for each in directions for sign in (1, -1)]
    return _best(tried, here, there, sigma) if tried else None


class Gyroscope:
    """Keeps the latest measurements.

    :param to_camera: (3, 3), takes directions in the axes of the IMU to those of the camera's optical frame (REP 103).
    """

    def __init__(self, to_camera: np.ndarray) -> None:
        self._to_camera = to_camera
        self._measured: deque[tuple[int, np.ndarray]] = deque(maxlen=KEPT)

    def add(self, stamp_ns: int, rate: np.ndarray) -> None:
        """Take a measurement, (3,) rad/s in the axes of the IMU; when time goes back, the earlier ones go."""
        if self._measured and stamp_ns <= self._measured[-1][0]:
            self._measured.clear()
        self._measured.append((stamp_ns, rate))

    def rotation(self, first_ns: int, second_ns: int) -> np.ndarray | None:
        """The matrix (3, 3) that takes directions in the camera at one time to those at another, earlier or later one;
        None where the measurements do not reach from the one to the other.

        The integral of the angular velocity counts as the rotation vector: exact as long as the axis does not change.
        """
        measured, (begin, end) = list(self._measured), sorted((first_ns, second_ns))
        if len(measured) < 2 or begin < measured[0][0] or end > measured[-1][0]:
            return None
        times = np.array([stamp - first_ns for stamp, _ in measured]) * 1e-9
        rates = np.array([rate for _, rate in measured])
        angles = np.zeros((len(times), 3))
        angles[1:] = np.cumsum(np.diff(times)[:, None] * (rates[1:] + rates[:-1]) / 2, axis=0)
        ends = np.array([0.0, (second_ns - first_ns) * 1e-9])
        turned = np.array([np.interp(ends, times, column) for column in angles.T])
        # What stands still turns the other way in the axes of what rotates.
        return cv2.Rodrigues(-self._to_camera @ (turned[:, 1] - turned[:, 0]))[0]


def rotation_of(quaternion: np.ndarray) -> np.ndarray:
    """The matrix (3, 3) of a quaternion x, y, z, w, whose length does not matter.

    :raises ValueError: for one of length 0.
    """
    length = float(np.linalg.norm(quaternion))
    if not 0.0 < length < math.inf:
        raise ValueError(f"expected a quaternion x, y, z, w of a length above 0, got {np.asarray(quaternion).tolist()}")
    x, y, z, w = quaternion / length
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross
