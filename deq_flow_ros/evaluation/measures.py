# SPDX-License-Identifier: Apache-2.0
"""How good the flow of one pair is: by the images alone, by the pair before, and by true flow where there is any."""

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
"""Side in px of the surroundings of a pixel that tell whether it stands still."""
TEXTURE = 3.0
"""Grey levels per px, RMS over the window of an image smoothed by a Gaussian of 1 px, in the direction where it is
least: with less, some motion could not be seen.
"""
STILL_PX = 0.25
"""A pixel whose window changes less than a motion by so many px would change it stands still."""
FEWEST_STATIC = 0.005
"""Share of the pixels; with fewer static ones, nothing is said of the flicker."""


@dataclass(frozen=True, eq=False)
class PairFields:
    """The arrays of one pair of frames: what is measured, pictured and recorded.

    :ivar image1: the earlier image, (H, W, 3) uint8 RGB; ``image2`` is the later one.
    :ivar flow: (H, W, 2) px. With the direction "forward" it lives on the pixels of ``image1`` and leads to ``image2``,
        with "backward" the other way round. NaN where it is not known.
    :ivar residual: (H, W) px, length of the solver's last update; None where there is no solver.
    :ivar truth: true flow, as ``flow``; None without any.
    :ivar visible: (H, W) bool, where the true flow leads to something visible; None where that is not known.
    :ivar backward: flow in the other direction, on the pixels of the other image; None where it was not computed.
    :ivar uncertainty: (H, W) px, expected endpoint error; None where the weights have no head for it.
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
        """The image on whose pixels the flow lives."""
        return self.image1 if self.direction == "forward" else self.image2

    @property
    def there(self) -> np.ndarray:
        """The image that the flow leads to."""
        return self.image2 if self.direction == "forward" else self.image1


@dataclass(frozen=True)
class Measure:
    """What a measure is called, its unit, what it says in one sentence, and where it is from."""

    title: str
    unit: str
    definition: str
    reference: str


_TABLE = yaml.safe_load(Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8"))
MEASURES = {name: Measure(**values) for name, values in _TABLE.items()}
"""Every measure, by its name in ``frames.csv`` and ``metrics.json``. Of those of the flow, less is better."""


def measure(fields: PairFields, previous: PairFields | None = None) -> dict[str, float]:
    """The measures that are known of one pair, by the names of ``MEASURES``.

    :param previous: the pair before in the same stream; without it there is no flicker.
    """
    weight = visible_weight(fields.flow)
    difference, still = photometric_map(fields.here, fields.there, fields.flow)
    measures = {"photometric": _mean(difference, weight), "photometric_still": _mean(still, weight)}
    if fields.backward is not None:
        measures |= consistency(fields.flow, fields.backward)
    if previous is not None and previous.flow.shape == fields.flow.shape:
        measures |= _flicker(fields, previous)
    if fields.truth is not None:
        measures |= _error(fields.flow, fields.truth, fields.visible)
    return {name: value for name, value in measures.items() if np.isfinite(value)}


def consistency(flow: np.ndarray, backward: np.ndarray) -> dict[str, float]:
    """The measures of a flow (H, W, 2) px together with the flow in the other direction."""
    found = forward_backward(flow, backward)
    return {} if found is None else {"consistency_px": found[0], "inconsistent_percent": 100 * found[1]}


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    return float(np.nansum(values * weight)) / total if total > 0 else float("nan")


def _flicker(fields: PairFields, previous: PairFields) -> dict[str, float]:
    # Three images, the middle one of which is in both pairs.
    first, middle, last = (_smooth(image) for image in (previous.image1, fields.image1, fields.image2))
    # OpenCV sums squares over the window, of derivatives that it scales by 8 / (4 WINDOW): together 4 times the mean.
    slope = np.sqrt(np.maximum(cv2.cornerMinEigenVal(middle, WINDOW, ksize=3), 0)) / 2
    change = np.maximum(_rms(first - middle), _rms(middle - last))
    step = squared_length(fields.flow - previous.flow)
    static = (slope >= TEXTURE) & (change <= STILL_PX * slope) & np.isfinite(step)
    share = float(static.mean())
    measures = {"static_percent": 100 * share}
    if share >= FEWEST_STATIC:
        # Of a vector: the root of both components' variances, half of the mean squared difference each.
        measures["flicker_px"] = float(np.sqrt(step[static].mean() / 2))
    return measures


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(cv2.blur(np.square(values), (WINDOW, WINDOW)))


def _smooth(image: np.ndarray) -> np.ndarray:
    # Sensor noise would otherwise pass for motion.
    return cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1.0).astype(np.float32)


def _error(flow: np.ndarray, truth: np.ndarray, visible: np.ndarray | None) -> dict[str, float]:
    nothing = np.where(np.isfinite(flow), np.float32(0), flow)
    measures = {"epe_px": endpoint_error(flow, truth), "epe_still_px": endpoint_error(nothing, truth, visible)}
    if visible is not None:
        measures["epe_visible_px"] = endpoint_error(flow, truth, visible)
    return {**measures, "fl_percent": 100 * outlier_share(flow, truth)}
