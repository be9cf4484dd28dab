# SPDX-License-Identifier: Apache-2.0
"""Camera models of ``sensor_msgs/CameraInfo``, without ROS: the directions in which pixels look."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

_OPENCV = (4, 5, 8, 12, 14)
COEFFICIENTS = {"none": (0,), "plumb_bob": _OPENCV, "rational_polynomial": _OPENCV, "equidistant": (4,)}
"""Distortion models of ``sensor_msgs/distortion_models.hpp`` and the numbers of coefficients that they take: those of
OpenCV's ``calibrateCamera``, which image_geometry passes on for every model, or of its ``fisheye``."""
ALIASES = {
    **dict.fromkeys(("radtan", "radial_tangential", "brown_conrady"), "plumb_bob"),
    "rational": "rational_polynomial",
    **dict.fromkeys(("fisheye", "equi", "kannala_brandt", "kannala_brandt4"), "equidistant"),
}
"""Other names that drivers, OpenCV and Kalibr use for the same models."""

_UNDISTORT_UNTIL = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 40, 1e-6)
_SOLVED_PX = 1e-2
"""A ray must project back onto its pixel within this distance, else the pixel has no ray. Distortion polynomials fold
back outside of the region that they were fitted to."""


def known_distortion(model: str, coefficients: Sequence[float]) -> tuple[str, tuple[float, ...]]:
    """Bring the distortion of a ``sensor_msgs/CameraInfo`` to a name and number of coefficients of ``COEFFICIENTS``.

    Drivers write names by other conventions, and append zeros. Coefficients that are not zero all stay.
    """
    name = re.sub(r"[\s-]+", "_", model.strip().lower())
    name, given = ALIASES.get(name, name), tuple(map(float, coefficients))
    if name not in COEFFICIENTS:
        return model, given
    for count in COEFFICIENTS[name]:
        if len(given) >= count and not any(given[count:]):
            return name, given[:count]
    return name, given


@dataclass(frozen=True)
class CameraModel:
    """A calibrated camera. Pixel coordinates are (x, y), and (0, 0) is the centre of the first pixel.

    :ivar fx, fy, cx, cy: focal lengths and principal point, px.
    :ivar width, height: of the image, px.
    :ivar distortion_model: a key of ``COEFFICIENTS``; "none" for rectified images.
    :ivar distortion: its coefficients.
    :raises ValueError: for values that no camera can have; the message names them.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    distortion_model: str = "none"
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (self.fx > 0 and self.fy > 0 and all(map(math.isfinite, (self.fx, self.fy, self.cx, self.cy)))):
            got = f"fx {self.fx:g}, fy {self.fy:g}, cx {self.cx:g}, cy {self.cy:g}"
            raise ValueError(f"expected focal lengths above 0 and a finite principal point, got {got}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"expected a camera of at least 1 x 1 px, got {self.width} x {self.height}")
        counts = COEFFICIENTS.get(self.distortion_model)
        if counts is None:
            got = f"got {self.distortion_model!r} with coefficients that are not all zero"
            hint = "calibrate the camera with one of these models, or use its rectified images (image_rect)"
            raise ValueError(f"expected a distortion model of {', '.join(COEFFICIENTS)}, {got}; {hint}")
        if len(self.distortion) not in counts or not all(map(math.isfinite, self.distortion)):
            expected = " or ".join(filter(None, [", ".join(map(str, counts[:-1])), str(counts[-1])]))
            raise ValueError(f"{self.distortion_model} expects {expected} finite coefficients, got {self.distortion}")

    def cropped(self, x: int, y: int, width: int, height: int) -> CameraModel:
        """The camera of a part of the image, whose first pixel is (x, y).

        :raises ValueError: for a part that is not inside of the image.
        """
        if x < 0 or y < 0 or x + width > self.width or y + height > self.height:
            part = f"x {x}, y {y}, width {width}, height {height}"
            raise ValueError(f"expected a part of the {self.width} x {self.height} image, got {part}")
        return replace(self, cx=self.cx - x, cy=self.cy - y, width=width, height=height)

    def scaled(self, x: float, y: float) -> CameraModel:
        """The camera of the image enlarged by these factors. Pixel (u, v) becomes (u x, v y), as in image_proc."""
        width, height = int(self.width * x + 1e-6), int(self.height * y + 1e-6)  # whole pixels; factors may be rounded
        return replace(self, fx=self.fx * x, fy=self.fy * y, cx=self.cx * x, cy=self.cy * y, width=width, height=height)

    def bearings(self, points: np.ndarray) -> np.ndarray:
        """Unit vectors (N, 3) float64 of the rays of pixels (N, 2); NaN for a pixel without a ray.

        Their axes are those of REP 103's optical frame: x right, y down, z forward.
        """
        if self.distortion_model == "equidistant":
            return self._fisheye_bearings(points)
        rays = np.ones((len(points), 3))
        rays[:, :2] = self.normalized(points)
        return rays / np.linalg.norm(rays, axis=1, keepdims=True)

    def normalized(self, points: np.ndarray) -> np.ndarray:
        """Undistorted x / z and y / z, (N, 2) float64, of the rays of pixels (N, 2); NaN for a pixel without a ray."""
        points = np.asarray(points, np.float64)
        if self.distortion_model == "equidistant":
            rays = self._fisheye_bearings(points)
            ahead = rays[:, 2] > 0
            return np.where(ahead[:, None], rays[:, :2] / np.where(ahead, rays[:, 2], 1.0)[:, None], np.nan)
        if not any(self.distortion) or not len(points):
            return (points - (self.cx, self.cy)) / (self.fx, self.fy)
        # In OpenCV 4, only a separate function lets the caller choose the precision.
        undistort = getattr(cv2, "undistortPointsIter", cv2.undistortPoints)
        camera = np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]]), np.array(self.distortion)
        one, zero, pixels = np.eye(3), np.zeros(3), points.reshape(-1, 1, 2)
        normal = undistort(pixels, *camera, R=one, P=one, criteria=_UNDISTORT_UNTIL).reshape(-1, 2)
        with np.errstate(all="ignore"):
            again = cv2.projectPoints(np.column_stack([normal, np.ones(len(normal))]), zero, zero, *camera)[0]
            solved = np.abs(again.reshape(-1, 2) - points).max(axis=1) <= _SOLVED_PX
        return np.where(solved[:, None], normal, np.nan)

    def _fisheye_bearings(self, points: np.ndarray) -> np.ndarray:
        """Solve for the angle to the axis, which may exceed 90 degrees, unlike in cv2.fisheye (tangent)."""
        scaled = (np.asarray(points, np.float64) - (self.cx, self.cy)) / (self.fx, self.fy)
        distorted = np.hypot(scaled[:, 0], scaled[:, 1])
        polynomial = np.polynomial.Polynomial(np.array([0, 1, 0, *np.ravel([(k, 0) for k in self.distortion])[:-1]]))
        slope = polynomial.deriv()
        # Beyond the angle where the polynomial turns back, a pixel would have two rays. The fit holds below that angle.
        turns = [root.real for root in slope.roots() if abs(root.imag) < 1e-9 and root.real > 0]
        limit = min([*turns, math.pi])
        table = np.linspace(0, limit, 1000)
        angle = np.interp(distorted, polynomial(table), table)
        with np.errstate(all="ignore"):
            for _ in range(4):  # Newton
                angle = np.clip(angle - (polynomial(angle) - distorted) / slope(angle), 0, limit)
            solved = np.abs(polynomial(angle) - distorted) * self.fx <= _SOLVED_PX
            direction = scaled * np.where(distorted > 0, np.sin(angle) / distorted, 1.0)[:, None]
        rays = np.column_stack([direction, np.cos(angle)])
        return np.where(solved[:, None], rays, np.nan)


class NormalizedFlow:
    """Converts whole flow fields of a camera to normalized coordinates.

    What distortion changes is a smooth function of the pixel. It is computed once for all pixels, and interpolated at
    the target of each flow vector; outside of the image, it is computed.
    """

    def __init__(self, camera: CameraModel) -> None:
        self.camera = camera
        self._focal = np.array([camera.fx, camera.fy], np.float32)
        self._bend: np.ndarray | None = None  # (H, W, 2) float32
        if any(camera.distortion) or camera.distortion_model == "equidistant":
            self._pixels = np.mgrid[: camera.height, : camera.width][::-1].transpose(1, 2, 0).astype(np.float32)
            self._bend = self._bend_at(self._pixels.reshape(-1, 2)).reshape(self._pixels.shape)

    def __call__(self, flow: np.ndarray) -> np.ndarray:
        """Normalized coordinates of the target minus those of the start of each vector of a flow (H, W, 2) px, float32.

        It is exact to 0.02 px, and NaN where there is no flow or a pixel has no ray.
        """
        normal = flow / self._focal
        if self._bend is None:
            return normal
        there = self._pixels + flow
        bend = cv2.remap(self._bend, there, None, cv2.INTER_LINEAR, borderValue=(np.nan, np.nan))
        unknown = np.isnan(bend[..., 0]) & np.isfinite(there[..., 0] + there[..., 1])
        bend[unknown] = self._bend_at(there[unknown])
        return normal + bend - self._bend

    def _bend_at(self, points: np.ndarray) -> np.ndarray:
        """Normalized coordinates of pixels (N, 2) minus those without distortion, (N, 2) float32."""
        linear = replace(self.camera, distortion_model="none", distortion=())
        return (self.camera.normalized(points) - linear.normalized(points)).astype(np.float32)
