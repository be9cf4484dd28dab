# SPDX-License-Identifier: Apache-2.0
"""Pixels that move by themselves while the camera moves too: those that the camera's motion does not explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from deq_flow_ros.imaging.camera import CameraModel, NormalizedFlow
from deq_flow_ros.perception import FEWEST, INLIER, EgoMotion, fit_ego_motion
from deq_flow_ros.settings import live, number

FITTED = 1200
"""About so many pixels are used for the fit."""
ERROR_FLOOR_PX = 0.1
"""An error that flow has everywhere, beside its uncertainty."""


@dataclass(frozen=True)
class MaskSettings:
    """What counts as moving, and when the camera's motion is believed."""

    threshold: float = live(
        number(0.5, 0.0, 100.0),
        "how far a pixel must deviate from the camera's motion, as a multiple of the uncertainty of its flow",
    )
    noise: float = live(
        number(3.7, 0.0, 100.0),  # 2.5 standard deviations of a normal distribution, each of which is 1.48 medians
        "and as a multiple of the noise of the flow: the median deviation of what the camera's motion explains",
    )
    min_motion_px: float = live(number(0.5, 0.01, 1000.0, "px"), "and in any case")
    grow: float = live(
        number(0.5, 0.05, 1.0), "share of these limits down to which the surroundings of what exceeds them belong to it"
    )
    min_area: float = live(number(0.002, 0.0, 1.0), "smallest area of a moving region, as a share of the image")
    smoothing_px: int = live(number(5, 1, 99, "px"), "size of specks that go and of gaps that are closed. 1 = none")
    min_inliers: float = live(
        number(0.5, 0.0, 1.0), "share of the pixels that the camera's motion must explain; below, no mask is published"
    )
    max_uncertainty_px: float = live(
        number(3.0, 0.0, 1000.0, "px"),
        "median uncertainty of the flow above which no mask is published: too little texture or light",
    )


class Box(NamedTuple):
    """A moving region, px: the centre and size of the box around it, its area, and the median of its deviation from the
    camera's motion. Pixel (0, 0) has its centre at (0, 0).
    """

    x: float
    y: float
    width: int
    height: int
    area: int
    motion: float


@dataclass(frozen=True)
class MotionMask:
    """What moves by itself.

    :ivar mask: (H, W) bool.
    :ivar boxes: the connected regions of the mask, the largest first.
    :ivar ego_motion: what was fitted; None where nothing could be.
    :ivar problem: why the mask is not to be trusted, and what to do; empty where it is.
    :ivar noise_px: the median deviation of the pixels that the camera's motion explains.
    """

    mask: np.ndarray
    boxes: Sequence[Box]
    ego_motion: EgoMotion | None
    problem: str
    noise_px: float = float("nan")


class MotionSegmenter:
    """Finds what moves by itself in flow fields of one camera.

    :param shape: height and width of the fields.
    :param camera: of their pixels; None: without calibration, so that parallax counts as motion.
    """

    def __init__(self, shape: tuple[int, int], camera: CameraModel | None) -> None:
        self.shape, self.camera = shape, camera
        height, width = shape
        pixels = np.mgrid[:height, :width][::-1].reshape(2, -1).T.astype(np.float64)
        self._focal = float(max(shape)) if camera is None else (camera.fx + camera.fy) / 2
        self._normalized = None if camera is None else NormalizedFlow(camera)
        centre = np.array([width - 1, height - 1]) / 2
        self._here = (pixels - centre) / self._focal if camera is None else camera.normalized(pixels)

    def __call__(
        self, flow: np.ndarray, uncertainty: np.ndarray, settings: MaskSettings, rotation: np.ndarray | None = None
    ) -> MotionMask:
        """Segment a field.

        :param flow: (H, W, 2) float32 px, NaN where unknown, which never counts as moving.
        :param uncertainty: (H, W) float32 px, the expected error of the flow.
        :param rotation: of the camera, where it was measured; see ``fit_ego_motion``.
        """
        normal = flow / np.float32(self._focal) if self._normalized is None else self._normalized(flow)
        there = self._here + normal.reshape(-1, 2)
        sigma = np.hypot(uncertainty, np.float32(ERROR_FLOOR_PX)).ravel() / self._focal
        known = np.isfinite(there[:, 0]) & np.isfinite(self._here[:, 0]) & np.isfinite(sigma)
        chosen = np.zeros(self.shape, bool)
        stride = max(1, round((chosen.size / FITTED) ** 0.5))
        chosen[stride // 2 :: stride, stride // 2 :: stride] = True
        chosen = chosen.ravel() & known
        motion, problem = None, ""
        if (count := int(chosen.sum())) < FEWEST:
            problem = f"{count} of the pixels to fit the camera's motion to have flow, expected at least {FEWEST}"
        elif (median := float(np.nanmedian(uncertainty))) > settings.max_uncertainty_px:
            problem = (
                f"the median uncertainty of the flow is {median:.1f} px, above max_uncertainty_px "
                f"{settings.max_uncertainty_px:g}: too little texture or light, or too fast a motion"
            )
        else:
            motion = fit_ego_motion(self._here[chosen], there[chosen], sigma[chosen], self.camera is not None, rotation)
        if motion is None:
            return MotionMask(np.zeros(self.shape, bool), (), None, problem)
        deviation = np.where(known, motion.deviation(self._here, there), 0.0)
        deviation_px = deviation.reshape(self.shape) * self._focal
        explained = chosen & (deviation < INLIER * sigma)
        noise_px = float(np.median(deviation[explained])) * self._focal if explained.any() else 0.0
        least_px = np.maximum(settings.threshold * uncertainty, max(settings.noise * noise_px, settings.min_motion_px))
        score = np.where(known.reshape(self.shape), deviation_px / least_px, 0.0)
        if motion.inliers < settings.min_inliers:
            problem = (
                f"the {motion.model} explains {motion.inliers:.0%} of the flow, below min_inliers "
                f"{settings.min_inliers:.0%}: most of the image moves by itself, or the flow is wrong"
            )
        return MotionMask(*_regions(score, deviation_px, settings), motion, problem, noise_px)


def _regions(score: np.ndarray, deviation: np.ndarray, settings: MaskSettings) -> tuple[np.ndarray, list[Box]]:
    """The mask and the boxes of its regions.

    A region is what is connected with a score (H, W) above ``grow``, if it reaches 1 in ``min_area`` (hysteresis), its
    specks gone and its holes filled.
    """
    mask = (score > settings.grow).astype(np.uint8)
    if settings.smoothing_px > 1:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (settings.smoothing_px,) * 2)
        mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel), cv2.MORPH_CLOSE, kernel)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    result, boxes = np.zeros_like(mask), []
    for outline in outlines:
        x, y, width, height = cv2.boundingRect(outline)
        part = (slice(y, y + height), slice(x, x + width))
        region = np.zeros((height, width), np.uint8)
        cv2.drawContours(region, [outline], -1, 1, cv2.FILLED, offset=(-x, -y))
        inside = region.astype(bool)
        if np.count_nonzero(inside & (score[part] > 1)) >= settings.min_area * mask.size:
            result[part] |= region
            centre, motion = (x + (width - 1) / 2, y + (height - 1) / 2), float(np.median(deviation[part][inside]))
            boxes.append(Box(*centre, width, height, int(inside.sum()), motion))
    return result.astype(bool), sorted(boxes, key=lambda box: -box.area)
