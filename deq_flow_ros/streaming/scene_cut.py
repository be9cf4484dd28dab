# SPDX-License-Identifier: Apache-2.0
"""Does this frame show another scene than the last?"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

# Both must be beyond their bound: motion alone moves content about and keeps the histogram, a change of light alone
# shifts the histogram and keeps the layout.
MAX_HISTOGRAM_DISTANCE = 0.45
MIN_LAYOUT_CORRELATION = 0.3


@dataclass(frozen=True)
class Thumbnail:
    """A frame in small: what its colours are, and where.

    :ivar histogram: 8x8x8 colour histogram, sum 1.
    :ivar layout: grey values on a 16x12 grid, mean 0 and standard deviation 1 (all 0 for a plain image).
    """

    histogram: np.ndarray
    layout: np.ndarray

    @classmethod
    def of(cls, frame: np.ndarray) -> Thumbnail:
        """From a frame (H, W, 3) uint8."""
        small = cv2.resize(frame, (64, 48), interpolation=cv2.INTER_AREA)
        histogram = cv2.calcHist([small], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3)
        grey = cv2.resize(small, (16, 12), interpolation=cv2.INTER_AREA).mean(2)
        deviation = grey.std()
        layout = (grey - grey.mean()) / deviation if deviation > 1 else np.zeros_like(grey)
        return cls((histogram / histogram.sum()).ravel().astype(np.float32), layout)

    def is_cut_from(self, previous: Thumbnail) -> bool:
        """Whether colours and layout both differ too much for one continuous view."""
        distance = cv2.compareHist(self.histogram, previous.histogram, cv2.HISTCMP_BHATTACHARYYA)
        return distance > MAX_HISTOGRAM_DISTANCE and float((self.layout * previous.layout).mean()) < MIN_LAYOUT_CORRELATION
