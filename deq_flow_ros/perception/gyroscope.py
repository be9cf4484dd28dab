# SPDX-License-Identifier: Apache-2.0
"""The rotation of a camera between two images, from the angular velocities that an IMU measures."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

KEPT = 2000
"""Measurements: two seconds of an IMU at 1 kHz."""


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
        """The matrix (3, 3) that takes directions in the camera at one time to those at another, earlier or later one.

        Angular velocities are interpolated linearly, and their integral is taken for the rotation vector, which is
        exact as long as the axis does not change in between.

        :returns: None where the measurements do not reach from the one to the other.
        """
        measured = list(self._measured)
        if (
            len(measured) < 2
            or not measured[0][0] <= min(first_ns, second_ns) <= max(first_ns, second_ns) <= measured[-1][0]
        ):
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
    if not 0.0 < length < float("inf"):
        raise ValueError(f"expected a quaternion x, y, z, w of a length above 0, got {np.asarray(quaternion).tolist()}")
    x, y, z, w = quaternion / length
    angle = 2 * np.arctan2(np.linalg.norm([x, y, z]), w)
    axis = np.array([x, y, z]) / max(float(np.linalg.norm([x, y, z])), 1e-12)
    return cv2.Rodrigues(axis * angle)[0]
