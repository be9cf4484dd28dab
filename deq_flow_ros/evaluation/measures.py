# SPDX-License-Identifier: Apache-2.0
"""How good the flow of one pair is: by the images alone, by the pair before, and by true flow where there is any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from deq_flow_ros.media.metrics import endpoint_error, photometric_map, warp

if TYPE_CHECKING:
    from deq_flow_ros.evaluation.results import PairFields

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


@dataclass(frozen=True)
class Measure:
    """What a measure is called, its unit, what it says in one sentence, and where it is from."""

    title: str
    unit: str
    definition: str
    reference: str


_SUNDARAM = "Sundaram et al., Dense point trajectories by GPU-accelerated large displacement optical flow, ECCV 2010"
_BAKER = "Baker et al., A database and evaluation methodology for optical flow, IJCV 2011"

MEASURES = {
    "photometric": Measure(
        "photometric error", "grey levels",
        "Mean absolute difference between an image and the other one warped onto it by the flow, over the pixels that "
        "the flow keeps inside of the image, each weighted by how far nothing else lands where it lands (else it is "
        "probably occluded).",
        f"{_BAKER} (warping); Xu et al., Motion detail preserving optical flow estimation, TPAMI 2012 (the weight)",
    ),
    "photometric_still": Measure(
        "the same without warping", "grey levels",
        "Mean absolute difference of the two images as they are, over the same pixels with the same weights: what zero "
        "flow would give.",
        "as above",
    ),
    "consistency_px": Measure(
        "forward-backward error", "px",
        "Median length of the way there and back, the flow at a pixel plus the opposite flow where it leads, over the "
        "pixels that it keeps inside of the image.",
        _SUNDARAM,
    ),
    "inconsistent_percent": Measure(
        "inconsistent pixels", "%",
        "Share of these pixels whose squared way there and back exceeds 0.01 of the squared lengths of the two flows "
        "plus 0.5 px²: occluded there, or wrong.",
        f"{_SUNDARAM} (the criterion)",
    ),
    "flicker_px": Measure(
        "flicker of static regions", "px",
        "Standard deviation over time of the flow where nothing moves, from the differences between successive fields "
        f"(root of half their mean square), over the pixels whose {WINDOW}x{WINDOW} surroundings have texture in every "
        f"direction and change in neither pair by more than a motion of {STILL_PX:g} px would change them.",
        "von Neumann et al., The mean square successive difference, Ann. Math. Statist. 1941 (estimator); "
        "Shi, Tomasi, Good features to track, CVPR 1994 (texture)",
    ),
    "static_percent": Measure(
        "static regions", "%",
        f"Share of the pixels that the flicker is measured on; below {100 * FEWEST_STATIC:g} % it is not.",
        "this project",
    ),
    "epe_px": Measure(
        "endpoint error", "px",
        "Mean length of the difference between flow and true flow, over the pixels where both are known.",
        f"{_BAKER}, section 4.1",
    ),
    "epe_visible_px": Measure(
        "endpoint error, visible", "px",
        "Mean endpoint error over the pixels that are visible in both images; only where it is known which these are.",
        f"{_BAKER}, section 4.1",
    ),
    "epe_still_px": Measure(
        "endpoint error of zero flow", "px",
        "Mean length of the true flow, over the same pixels as the error that it is held against.",
        f"{_BAKER}, section 4.1",
    ),
    "fl_percent": Measure(
        "Fl", "%",
        "Share of the pixels with true flow whose endpoint error is above 3 px and above 5 % of the true length.",
        "Menze, Geiger, Object scene flow for autonomous vehicles, CVPR 2015",
    ),
}  # fmt: skip
"""Every measure, by its name in `frames.csv` and `metrics.json`; of those of the flow, less is better."""


def measure(fields: PairFields, previous: PairFields | None = None) -> dict[str, float]:
    """The measures of one pair that can be had; of the others there is no entry.

    :param previous: the pair before in the same stream (its later image is this one's earlier one); None: no flicker.
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


def visible_weight(flow: np.ndarray) -> np.ndarray:
    """(H, W) float32 in 0..1: how far each pixel of flow (H, W, 2) px has for itself the place where it lands.

    0 where it leaves the image, where the flow is not known, and where it shares its place with another one: one of
    them covers the other, and which one is not known.
    """
    height, width = flow.shape[:2]
    x = np.arange(width, dtype=np.float32) + flow[:, :, 0]
    y = np.arange(height, dtype=np.float32)[:, None] + flow[:, :, 1]
    with np.errstate(invalid="ignore"):
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    x, y = np.where(inside, x, np.float32(0)), np.where(inside, y, np.float32(0))
    left, above = np.floor(x), np.floor(y)
    one = inside.astype(np.float32)
    right, down = (x - left) * one, (y - above) * one
    both = right * (y - above)
    # Each pixel lands on four, shared bilinearly. One column and row more, so that the last ones have neighbours too.
    stride = width + 1
    corner = (above.astype(np.intp) * stride + left.astype(np.intp)).ravel()
    landed = np.zeros((height + 1) * stride)
    for offset, share in (
        (0, one - right - down + both), (1, right - both), (stride, down - both), (stride + 1, both),
    ):  # fmt: skip
        landed[offset:] += np.bincount(corner, share.ravel(), landed.size)[: landed.size - offset]
    count = landed.reshape(height + 1, stride)[:height, :width].astype(np.float32)
    there = cv2.remap(count, x, y, cv2.INTER_LINEAR)
    return np.where(inside, 1 - np.clip(there - 1, 0, 1), np.float32(0))


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    return float(np.nansum(values * weight)) / total if total > 0 else float("nan")


def consistency(flow: np.ndarray, backward: np.ndarray) -> dict[str, float]:
    """The measures of flow (H, W, 2) px together with the flow in the other direction, which lives on the pixels of the
    other image; empty where nothing stays inside of it.
    """
    back, inside = warp(backward, flow)
    there_and_back = _squared_length(flow + back)[inside]
    known = np.isfinite(there_and_back)
    if not known.any():
        return {}
    allowed = 0.01 * (_squared_length(flow) + _squared_length(back))[inside] + 0.5
    with np.errstate(invalid="ignore"):
        wrong = (there_and_back > allowed) & known
    return {
        "consistency_px": float(np.sqrt(np.median(there_and_back[known]))),
        "inconsistent_percent": 100 * float(wrong.sum() / known.sum()),
    }


def _flicker(fields: PairFields, previous: PairFields) -> dict[str, float]:
    # Three images, the middle one of which is in both pairs.
    first, middle, last = (_smooth(image) for image in (previous.image1, fields.image1, fields.image2))
    # OpenCV sums squares over the window, of derivatives that it scales by 8 / (4 WINDOW): together 4 times the mean.
    slope = np.sqrt(np.maximum(cv2.cornerMinEigenVal(middle, WINDOW, ksize=3), 0)) / 2
    change = np.maximum(_rms(first - middle), _rms(middle - last))
    step = _squared_length(fields.flow - previous.flow)
    static = (slope >= TEXTURE) & (change <= STILL_PX * slope) & np.isfinite(step)
    share = float(static.mean())
    measures = {"static_percent": 100 * share}
    if share >= FEWEST_STATIC:
        # Of a vector: the root of both components' variances, half of the mean squared difference each.
        measures["flicker_px"] = float(np.sqrt(step[static].mean() / 2))
    return measures


def _squared_length(vectors: np.ndarray) -> np.ndarray:
    """(H, W); numpy's sum over an axis of two takes five times as long."""
    return np.square(vectors[:, :, 0]) + np.square(vectors[:, :, 1])


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
    error = np.hypot(*np.moveaxis(flow - truth, 2, 0))
    known = np.isfinite(error)
    if known.any():
        with np.errstate(invalid="ignore"):
            wrong = (error > 3) & (error > 0.05 * np.hypot(*np.moveaxis(truth, 2, 0)))
        measures["fl_percent"] = 100 * float(wrong.sum() / known.sum())
    return measures
