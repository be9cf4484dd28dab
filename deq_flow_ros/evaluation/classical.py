# SPDX-License-Identifier: Apache-2.0
"""OpenCV's classical methods, to compare with; images are (H, W, 3) uint8 RGB, flow is (H, W, 2) float32 px."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(image 1, image 2) -> flow on the pixels of image 1."""


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def farneback(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """Farneback's method (2003) with the settings of OpenCV's own examples."""
    return cv2.calcOpticalFlowFarneback(
        _grey(image1),
        _grey(image2),
        None,
        pyr_scale=0.5,
        levels=5,
        winsize=15,
        iterations=3,
        poly_n=5,
        poly_sigma=1.2,
        flags=0,
    )


def dense_inverse_search(preset: int = cv2.DISOPTICAL_FLOW_PRESET_MEDIUM) -> FlowFunction:
    """DIS flow (Kroeger et al., 2016) with one of OpenCV's presets."""
    method = cv2.DISOpticalFlow.create(preset)
    return lambda image1, image2: method.calc(_grey(image1), _grey(image2), None)
