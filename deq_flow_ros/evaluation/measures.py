# SPDX-License-Identifier: Apache-2.0
"""Measures of how good the flow of a pair is: by its images, by the previous pair, and by true flow if there is any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml

from deq_flow_ros.imaging.metrics import (
    endpoint_error,
    forward_backward,
    outlier_share,
    photometric_map,
    squared_length,
    visible_weight,
)

WINDOW = 5
"""Side in px of the window around a pixel that decides whether it stands still."""
TEXTURE = 3.0
"""Least texture of a window, so that any motion would show: grey levels per px in the direction with the least texture,
as RMS over the window, in an image smoothed by a Gaussian of 1 px."""
STILL_PX = 0.25
"""A pixel stands still if its window changes less than by a motion of this length, in px."""
FEWEST_STATIC = 0.005
"""Least share of static pixels. With fewer, the flicker is not measured."""


@dataclass(frozen=True, eq=False)
class PairFields:
    """The arrays of one pair of frames, which are measured, shown and recorded. What is not known is None.

    :ivar image1: the earlier image, (H, W, 3) uint8 RGB; ``image2`` is the later one.
    :ivar flow: (H, W, 2) px, NaN where it is not known. With the direction "forward", it is the flow from ``image1`` to
        ``image2`` on the pixels of ``image1``; with "backward", the other way round.
    :ivar residual: (H, W) px, the length of the solver's last update.
    :ivar truth: the true flow, in the form of ``flow``.
    :ivar visible: (H, W) bool, whether the pixel is visible in both images.
    :ivar backward: the flow in the other direction, on the pixels of the other image.
    :ivar uncertainty: (H, W) px, the expected endpoint error.
    """

    image1: np.ndarray
    image2: np.ndarray
    flow: np.ndarray
    residual: np.ndarray | None = None
    truth: np.ndarray | None = None
    visible: np.ndarray | None = None
    backward: np.ndarray | None = None
    direction: str = "forward"
    uncertainty: np.ndarray | None = None

    @property
    def here(self) -> np.ndarray:
        """The image on whose pixels the flow is defined."""
        return self.image1 if self.direction == "forward" else self.image2

    @property
    def there(self) -> np.ndarray:
        """The other image, to which the flow points."""
        return self.image2 if self.direction == "forward" else self.image1


@dataclass(frozen=True)
class Measure:
    """A measure: its title, its unit, its definition in one sentence, and its source."""

    title: str
    unit: str
    definition: str
    reference: str


_TABLE = yaml.safe_load(Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8"))
MEASURES = {name: Measure(**values) for name, values in _TABLE.items()}
"""All measures, by their names in ``frames.csv`` and ``metrics.json``. For measures of the flow, less is better."""


def measure(fields: PairFields, previous: PairFields | None = None) -> dict[str, float]:
    """Compute the measures of a pair, by the names of ``MEASURES``. Those that are not known are left out.

    :param previous: the previous pair of the same stream; without it, the flicker is not measured.
    """
    weight = visible_weight(fields.flow)
    difference, still = photometric_map(fields.here, fields.there, fields.flow)
    measures = {"photometric": _mean(difference, weight), "photometric_still": _mean(still, weight)}
    if fields.backward is not None:
        measures |= consistency(fields.flow, fields.backward)
    if previous is not None and previous.flow.shape == fields.flow.shape:
        measures |= _flicker(fields, previous)
    if fields.truth is not None:
        nothing = np.where(np.isfinite(fields.flow), np.float32(0), fields.flow)
        measures["epe_px"] = endpoint_error(fields.flow, fields.truth)
        measures["epe_still_px"] = endpoint_error(nothing, fields.truth, fields.visible)
        if fields.visible is not None:
            measures["epe_visible_px"] = endpoint_error(fields.flow, fields.truth, fields.visible)
        measures["fl_percent"] = 100 * outlier_share(fields.flow, fields.truth)
    return {name: value for name, value in measures.items() if np.isfinite(value)}


def consistency(flow: np.ndarray, backward: np.ndarray) -> dict[str, float]:
    """The measures of consistency between a flow (H, W, 2) px and the flow in the other direction."""
    found = forward_backward(flow, backward)
    return {} if found is None else {"consistency_px": found[0], "inconsistent_percent": 100 * found[1]}


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    return float(np.nansum(values * weight)) / total if total > 0 else float("nan")


def _flicker(fields: PairFields, previous: PairFields) -> dict[str, float]:
    # Three images, of which the middle one is in both pairs; smoothed, so that noise is not taken for motion.
    grey = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (previous.image1, fields.image1, fields.image2))
    first, middle, last = (cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32) for image in grey)
    # OpenCV scales the derivatives by 8 / (4 WINDOW) and sums their squares: 4 times the mean in all.
    slope = np.sqrt(np.maximum(cv2.cornerMinEigenVal(middle, WINDOW, ksize=3), 0)) / 2
    change = np.maximum(_rms(first - middle), _rms(middle - last))
    step = squared_length(fields.flow - previous.flow)
    static = (slope >= TEXTURE) & (change <= STILL_PX * slope) & np.isfinite(step)
    share = float(static.mean())
    measures = {"static_percent": 100 * share}
    if share >= FEWEST_STATIC:
        # For a vector: the root of the variances of both components, each half of its mean squared difference.
        measures["flicker_px"] = float(np.sqrt(step[static].mean() / 2))
    return measures


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(cv2.blur(np.square(values), (WINDOW, WINDOW)))
