# SPDX-License-Identifier: Apache-2.0
"""Does this frame continue the stream of the last?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deq_flow_ros.streaming.scene_cut import Thumbnail


@dataclass(frozen=True)
class Seen:
    """What of a frame says whether it continues a stream.

    :ivar size: (H, W).
    """

    size: tuple[int, int]
    stamp_ns: int
    thumbnail: Thumbnail

    @classmethod
    def of(cls, image: np.ndarray, stamp_ns: int) -> Seen:
        """From a frame (H, W, 3) uint8 RGB."""
        return cls((image.shape[0], image.shape[1]), stamp_ns, Thumbnail.of(image))

    def break_after(self, previous: Seen, max_gap_ms: float) -> str | None:
        """Why this frame does not continue the stream of the previous one; None if it does."""
        if self.size != previous.size:
            (h0, w0), (h1, w1) = previous.size, self.size
            return f"size changed from {w0}x{h0} to {w1}x{h1}"
        elapsed_ms = (self.stamp_ns - previous.stamp_ns) / 1e6
        if elapsed_ms < 0:
            return f"time went back by {-elapsed_ms:.1f} ms"
        if elapsed_ms > max_gap_ms:
            return f"gap of {elapsed_ms:.0f} ms, longer than {max_gap_ms:.0f} ms"
        if self.thumbnail.flat:
            return "flat image: nothing to match"
        if previous.thumbnail.flat:
            return "flat image before: nothing to match"
        if self.thumbnail.is_cut_from(previous.thumbnail):
            return "scene cut"
        return None
