# SPDX-License-Identifier: Apache-2.0
"""Does this frame show another scene than the last?"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

# Both must be beyond their bound: motion keeps the colours, a change of light keeps the layout. Chosen so that
# successive frames of real video stay far from both, and most pairs of unrelated photographs are beyond them.
MAX_HISTOGRAM_DISTANCE = 0.4
MIN_LAYOUT_CORRELATION = 0.6


@dataclass(frozen=True)
class Thumbnail:
    """A frame in small: what its colours are, and where.

    :ivar histogram: 8x8x8 colour histogram, sum 1.
    :ivar layout: grey values (24, 32).
    """

    histogram: np.ndarray
    layout: np.ndarray

    @classmethod
    def of(cls, frame: np.ndarray) -> Thumbnail:
        """From a frame (H, W, 3) uint8 RGB."""
        small = cv2.resize(frame, (64, 48), interpolation=cv2.INTER_AREA)
        histogram = cv2.calcHist([small], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3)
        layout = cv2.resize(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), (32, 24), interpolation=cv2.INTER_AREA)
        return cls((histogram / histogram.sum()).ravel(), layout)

    def is_cut_from(self, previous: Thumbnail) -> bool:
        """Whether colours and layout both differ too much for one continuous view.

        The middle of the last frame is looked for all over this one, so a shift by up to a quarter of it is none.
        """
        distance = cv2.compareHist(self.histogram, previous.histogram, cv2.HISTCMP_BHATTACHARYYA)
        if distance <= MAX_HISTOGRAM_DISTANCE:
            return False
        found = cv2.matchTemplate(self.layout, previous.layout[6:18, 8:24], cv2.TM_CCOEFF_NORMED)
        return float(np.nan_to_num(found).max()) < MIN_LAYOUT_CORRELATION
