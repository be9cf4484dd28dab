# SPDX-License-Identifier: Apache-2.0
"""Which counts of a 16-bit camera are black and which are white."""

from __future__ import annotations

import math

import cv2
import numpy as np

FULL = (0, 65535)
MIN_WIDTH = 16
"""The narrowest range, in counts. A narrower one would turn the noise of the camera into a picture."""
_MARGIN = 0.15  # of the range of an image, added on each side, so that the next images fit as well
_WASTED = 0.4  # an image that uses less of the range than this has lost too much contrast
_SAMPLES = 20_000
_TAILS = (0.1, 99.9)  # percent; hot and dead pixels lie beyond


class Levels:
    """The counts that become 0 and 255 in the images of one stream.

    Thermal cameras and sensors of 10 or 12 bits use a small part of the 16 bits. If all 16 bits were mapped to 8, their
    images would have only a few grey levels, and no flow could be found. The range is therefore taken from the images.
    It is kept as long as the images fit into it and use it well. A new range for each image would follow every bright
    object, and each change of brightness between two images makes their flow less accurate.

    :param fixed: (black, white) in counts, for a range that never changes; None to take it from the images.
    :raises ValueError: for an invalid range.
    """

    def __init__(self, fixed: tuple[int, int] | None = None) -> None:
        if fixed is not None and not 0 <= fixed[0] < fixed[1] <= FULL[1]:
            raise ValueError(f"expected a range of counts such as (0, 65535), black before white, got {fixed}")
        self._fixed = fixed
        self._held: tuple[int, int] | None = None

    def of(self, image: np.ndarray) -> tuple[int, int]:
        """The counts of black and white for the next image of the stream.

        :param image: uint16, any shape.
        """
        if self._fixed is not None:
            return self._fixed
        step = max(1, math.isqrt(image.size // _SAMPLES))
        low, high = np.percentile(image[::step, ::step], _TAILS)
        if self._held is not None:
            black, white = self._held
            if black <= low and high <= white and high - low >= _WASTED * (white - black):
                return self._held
        margin = max(_MARGIN * (high - low), (MIN_WIDTH - (high - low)) / 2)
        self._held = max(0, math.floor(low - margin)), min(FULL[1], math.ceil(high + margin))
        return self._held


def eight_bits(image: np.ndarray, levels: Levels) -> np.ndarray:
    """Convert an image of any shape to uint8: uint8 stays as it is, uint16 is mapped by its levels and rounded."""
    if image.dtype == np.uint8:
        return image
    colours = image[:, :, :3] if image.ndim == 3 else image  # a fourth channel is opacity, usually all white
    black, white = levels.of(colours)
    # Both operations saturate: counts below black become 0, counts above white become 255.
    return cv2.convertScaleAbs(cv2.subtract(image, (black,) * 4), alpha=255.0 / (white - black))
