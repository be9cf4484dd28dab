# SPDX-License-Identifier: Apache-2.0
"""What a process that computes flow asks of the C library below it; for commands to call, not on import."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let malloc reuse image-sized blocks.

    By default glibc maps and unmaps each one, and the page faults of a 720p image cost more than its transport. Does
    nothing where the C library has no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
