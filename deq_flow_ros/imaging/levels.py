# SPDX-License-Identifier: Apache-2.0
"""Which counts of a 16-bit camera are black and which are white."""

from __future__ import annotations

import math

import cv2
import numpy as np

FULL = (0, 65535)
MIN_WIDTH = 16
"""Counts. A range of fewer would stretch the camera's noise to a picture."""
_MARGIN = 0.15  # of the range of an image, on each side: so that the next images need no other one
_WASTED = 0.4  # the share of the range below which an image has lost too much contrast
_SAMPLES = 20_000
_TAILS = (0.1, 99.9)  # percent; beyond are hot and dead pixels


class Levels:
    """The counts that become 0 and 255, for the images of one stream.

    Thermal cameras, and sensors of 10 or 12 bits, fill a small part of 16 bits. Mapped as a whole, their images have a
    few grey levels or one, and no flow can be found. So the range is that of the images themselves. It is held while
    the images fit into it and use it well: a range of each image's own would follow every bright object, and each
    change of brightness between two images costs accuracy of their flow.

    :param fixed: (black, white) in counts, for a range that never changes; None to find it in the images.
    :raises ValueError: for a range that is none.
    """

    def __init__(self, fixed: tuple[int, int] | None = None) -> None:
        if fixed is not None and not 0 <= fixed[0] < fixed[1] <= FULL[1]:
            raise ValueError(f"expected a range of counts such as (0, 65535), black before white, got {fixed}")
        self._fixed = fixed
        self._held: tuple[int, int] | None = None

    def of(self, image: np.ndarray) -> tuple[int, int]:
        """Black and white, in counts, for the next image of the stream.

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
    """uint8 of uint8, as it is, or of uint16, by its levels and rounded; any shape."""
    if image.dtype == np.uint8:
        return image
    colours = image[:, :, :3] if image.ndim == 3 else image  # a fourth channel is opacity, most often all white
    black, white = levels.of(colours)
    # Both operations saturate: what is below black is 0, what is beyond white 255.
    return cv2.convertScaleAbs(cv2.subtract(image, (black,) * 4), alpha=255.0 / (white - black))
