# SPDX-License-Identifier: Apache-2.0
"""Does this frame show another scene than the last, and does it show anything at all?"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Both must be beyond their bound: motion keeps the colours, a change of light keeps the layout. Chosen so that
# successive frames of real video stay far from both, and most pairs of unrelated photographs are beyond them.
MAX_HISTOGRAM_DISTANCE = 0.4
MIN_LAYOUT_CORRELATION = 0.6
# Standard deviation in grey levels, of 255, below which there is nothing but rounding: of such values a correlation is
# undefined (OpenCV calls it 1), and what a network makes of them means nothing.
MIN_CONTRAST = 1.0


@dataclass(frozen=True)
class Thumbnail:
    """A frame in small: what its colours are, and where.

    :ivar histogram: 8x8x8 colour histogram, sum 1.
    :ivar layout: grey values (24, 32).
    :ivar flat: whether the frame, at its full resolution, is of one colour: black, saturated, covered.
    """

    histogram: np.ndarray
    layout: np.ndarray
    flat: bool

    @classmethod
    def of(cls, frame: np.ndarray) -> Thumbnail:
        """From a frame (H, W, 3) uint8 RGB."""
        small = cv2.resize(frame, (64, 48), interpolation=cv2.INTER_AREA)
        histogram = cv2.calcHist([small], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3)
        layout = cv2.resize(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), (32, 24), interpolation=cv2.INTER_AREA)
        # Means vary less than what they are of: the whole frame is looked at only where they hardly do.
        return cls((histogram / histogram.sum()).ravel(), layout, _without_contrast(small) and _without_contrast(frame))

    def is_cut_from(self, previous: Thumbnail) -> bool:
        """Whether colours and layout both differ too much for one continuous view.

        The middle of the last frame is looked for all over this one, so a shift by up to a quarter of it is none. Where
        one of them has no layout, the colours alone decide.
        """
        distance = cv2.compareHist(self.histogram, previous.histogram, cv2.HISTCMP_BHATTACHARYYA)
        return distance > MAX_HISTOGRAM_DISTANCE and self._likest_layout(previous) < MIN_LAYOUT_CORRELATION

    def _likest_layout(self, previous: Thumbnail) -> float:
        """The highest correlation of a part of this layout with the middle of the last; 0 where none is defined."""
        part = previous.layout[6:18, 8:24]
        found = cv2.matchTemplate(self.layout, part, cv2.TM_CCOEFF_NORMED)
        defined = sliding_window_view(self.layout, part.shape).std((2, 3)) >= MIN_CONTRAST
        return float(found[defined].max()) if part.std() >= MIN_CONTRAST and defined.any() else 0.0


def _without_contrast(image: np.ndarray) -> bool:
    """Of an image (H, W, 3) uint8."""
    return bool(cv2.meanStdDev(image)[1].max() < MIN_CONTRAST)
