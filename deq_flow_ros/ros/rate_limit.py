# SPDX-License-Identifier: Apache-2.0
"""At most so many images per second."""

from __future__ import annotations

CAPACITY = 2.0
"""Room for one image more: without it, jitter would cost images of a camera whose rate lies at the limit."""


class RateLimit:
    """A token bucket."""

    def __init__(self) -> None:
        self._tokens = 1.0
        self._last_ns: int | None = None

    def passes(self, now_ns: int, rate_hz: float) -> bool:
        """Whether an image that comes now, on any clock that does not go back, may pass; a rate of 0 is no limit."""
        if not rate_hz:
            return True
        if self._last_ns is not None:
            self._tokens = min(CAPACITY, self._tokens + (now_ns - self._last_ns) * 1e-9 * rate_hz)
        self._last_ns = now_ns
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
