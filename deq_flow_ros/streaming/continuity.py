# SPDX-License-Identifier: Apache-2.0
"""Does a frame continue the stream of the last, and does the motion so far lead to it?

Before anything is computed, size, stamp and a thumbnail say whether the frame shows the scene of the last. After that
the ``likeness`` does (``model/cells.py``): before a solve it says whether the carried motion is a start for it, and
behind it whether there was anything to find. ``python -m benchmarks.cuts`` measures what the bounds below miss, and
where they see a cut that is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# A cut is beyond both: motion keeps the colours, a change of light keeps the layout. Successive frames of real video
# stay far from both, and most pairs of unrelated photographs are beyond them.
MAX_HISTOGRAM_DISTANCE = 0.4
MIN_LAYOUT_CORRELATION = 0.6
# Standard deviation in grey levels, of 255, below which there is nothing but rounding: a correlation is undefined then.
MIN_CONTRAST = 1.0
# At its own flow a pair of one scene has 0.5 and more; across a cut 0.15, images of noise alone 0.3 at most.
MIN_MATCH = 0.35
"""Below, the likeness of a solved pair says that its images do not match, so its motion says nothing of the next."""
# A start that leads to cells less than half as alike as those of the last pair. Across a cut it is a fifth and less;
# without one only where the motion has changed by many pixels at once, and a cold start is better.
MIN_OF_LAST = 0.5
# A start that leads to cells that are clearly less alike than no motion at all does: the motion has ended, or turned.
MIN_OF_STILL = 0.85

FLAT = "flat image"
LEFT_OUT = "left out"
"""How every reason ends why a frame takes no part in its stream."""
FAR_NS = 24 * 3600 * 10**9
"""No pause of a stream is so long: a stamp further ahead than this is garbage, or the clock was set."""
SAME_STAMP = f"the same stamp as the frame before: {LEFT_OUT}"
UNMATCHED = "the two images before do not match"
UNEXPLAINED = "the motion so far does not explain this frame"


@dataclass(frozen=True)
class Seen:
    """What of a frame says whether it continues a stream."""

    size: tuple[int, int]  # (H, W)
    stamp_ns: int
    histogram: np.ndarray  # 8x8x8 colours of a thumbnail, sum 1
    layout: np.ndarray  # grey values (24, 32)
    flat: bool  # whether the frame, at its full resolution, is of one colour: black, saturated, covered

    @classmethod
    def of(cls, frame: np.ndarray, stamp_ns: int) -> Seen:
        """From a frame (H, W, 3) uint8 RGB."""
        small = cv2.resize(frame, (64, 48), interpolation=cv2.INTER_AREA)
        histogram = cv2.calcHist([small], [0, 1, 2], None, [8, 8, 8], [0, 256] * 3)
        layout = cv2.resize(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), (32, 24), interpolation=cv2.INTER_AREA)
        # Means vary less than what they are of: the whole frame is looked at only where they hardly do.
        flat = all(cv2.meanStdDev(image)[1].max() < MIN_CONTRAST for image in (small, frame))
        return cls((frame.shape[0], frame.shape[1]), stamp_ns, (histogram / histogram.sum()).ravel(), layout, flat)

    def break_after(self, previous: Seen, max_gap_ms: float) -> str | None:
        """Why this frame does not continue the stream of the previous one; None if it does."""
        if self.size != previous.size:
            (height0, width0), (height1, width1) = previous.size, self.size
            return f"size changed from {width0}x{height0} to {width1}x{height1}"
        elapsed_ms = (self.stamp_ns - previous.stamp_ns) / 1e6
        if elapsed_ms < 0:
            return f"time went back by {-elapsed_ms:.1f} ms"
        if elapsed_ms > max_gap_ms:
            return f"gap of {elapsed_ms:.0f} ms, longer than {max_gap_ms:.0f} ms"
        if self.flat or previous.flat:
            return f"{FLAT}{'' if self.flat else ' before'}: nothing to match"
        return "scene cut" if self.is_cut_from(previous) else None

    def is_cut_from(self, previous: Seen) -> bool:
        """Whether colours and layout both differ too much for one continuous view.

        The middle of the last frame is looked for all over this one, so a shift by up to a quarter of it is none. Where
        one of them has no layout, the colours alone decide.
        """
        distance = cv2.compareHist(self.histogram, previous.histogram, cv2.HISTCMP_BHATTACHARYYA)
        return distance > MAX_HISTOGRAM_DISTANCE and self._likest_layout(previous) < MIN_LAYOUT_CORRELATION

    def _likest_layout(self, previous: Seen) -> float:
        """The highest correlation of a part of this layout with the middle of the last; 0 where none is defined."""
        part = previous.layout[6:18, 8:24]
        found = cv2.matchTemplate(self.layout, part, cv2.TM_CCOEFF_NORMED)
        defined = sliding_window_view(self.layout, part.shape).std((2, 3)) >= MIN_CONTRAST
        return float(found[defined].max()) if part.std() >= MIN_CONTRAST and defined.any() else 0.0


def why_anew(last_ns: int, stamp_ns: int) -> str | None:
    """Why a stream starts anew with a frame that ``StampOrder`` took; None if it fits to the last frame taken.

    An estimator that is reset for this reason does not find the same fault once more.
    """
    ahead_ns = stamp_ns - last_ns
    if ahead_ns < 0:
        return f"time went back by {-ahead_ns / 1e6:.1f} ms"
    return f"time went on by {ahead_ns / 1e9:.1f} s" if ahead_ns > FAR_NS else None


class StampOrder:
    """Finds frames that do not fit into the order of the stamps, so that one of them does not end a stream.

    A message that was sent twice, a late one, or one with a stamp of zero or from a far future is left out. Where a
    second one follows it, the clock was set, and the stream starts anew there.

    :ivar anew: ``why_anew`` of the last frame that was taken.
    """

    def __init__(self) -> None:
        self.anew: str | None = None
        self._last_ns: int | None = None
        self._odd_ns: int | None = None
        self._period_ns = 0

    def why_out(self, stamp_ns: int, furthest_ns: int = FAR_NS) -> str | None:
        """Why the next frame is to be left out; None if it is to be taken.

        :param furthest_ns: a frame that is further ahead of the last one, and of three times the last step, is early.
        """
        last_ns, odd_ns, self._odd_ns = self._last_ns, self._odd_ns, None
        if stamp_ns == last_ns:
            return SAME_STAMP
        if last_ns is not None:
            furthest_ns = max(furthest_ns, 3 * self._period_ns)
            follows = odd_ns is not None and stamp_ns > odd_ns and (stamp_ns > last_ns) == (odd_ns > last_ns)
            if odd_ns is not None and odd_ns < last_ns:  # one without a stamp and one that is late are no clock
                follows = follows and stamp_ns - odd_ns <= furthest_ns
            early = stamp_ns - last_ns > furthest_ns
            if not follows and (early or stamp_ns < last_ns):
                self._odd_ns = stamp_ns
                if stamp_ns == 0:
                    return f"without a stamp: {LEFT_OUT}"
                ahead_ns = stamp_ns - last_ns
                apart = f"{ahead_ns / 1e9:.1f} s later" if early else f"{-ahead_ns / 1e6:.1f} ms earlier"
                return f"stamped {apart} than the frame before: {LEFT_OUT}"
            self._period_ns = stamp_ns - (odd_ns if follows and odd_ns is not None else last_ns)
            self.anew = why_anew(last_ns, stamp_ns)
        self._last_ns = stamp_ns
        return None


def look(
    image: np.ndarray, stamp_ns: int, order: StampOrder, previous: Seen | None, max_gap_ms: float
) -> tuple[Seen | None, str | None]:
    """What is seen of the next frame (None: it is to be left out), and why it does not continue the stream, if so."""
    if (reason := order.why_out(stamp_ns)) is not None:
        return None, reason
    seen = Seen.of(image, stamp_ns)
    return seen, None if previous is None else seen.break_after(previous, max_gap_ms)


def why_no_start(still: float, carried: float, last: float | None) -> str | None:
    """Why the carried flow is no start for a pair, which is better begun cold; None if it is one.

    :param still, carried: likeness of the pair's images at a flow of zero, and at the carried flow.
    :param last: that of the pair before at the flow that was found; None where it is not known.
    """
    changed = last is not None and max(still, carried) < MIN_OF_LAST * last
    # Where neither leads to anything alike, their ratio is that of two accidents.
    worse_than_still = still > MIN_MATCH and carried < MIN_OF_STILL * still
    return UNEXPLAINED if changed or worse_than_still else None
