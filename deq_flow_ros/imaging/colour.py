# SPDX-License-Identifier: Apache-2.0
"""Flow as colour: the hue is the direction, the saturation the length.

The colour wheel of Baker et al., "A Database and Evaluation Methodology for Optical Flow", 2011: 55 hues, spaced so
that the eye tells neighbours apart (15 red-yellow, 6 yellow-green, 4 green-cyan, 11 cyan-blue, 13 blue-magenta, 6
magenta-red).
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

TABLE_RADIUS = 255
"""The number of steps from no motion to the largest motion in the table of colours."""


def flow_to_color(flow: np.ndarray, max_px: float | None = None) -> np.ndarray:
    """Draw flow as colour, (H, W, 3) uint8 RGB. White is no motion, black is no flow (NaN or infinite).

    :param flow: (H, W, 2) px.
    :param max_px: the length with full saturation; longer vectors are darker. None takes the longest finite vector of
        this field, but at least 1 px, so that noise around zero stays pale.
    :raises ValueError: for another shape, or a ``max_px`` that is not above 0.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"expected flow of shape (H, W, 2), got {flow.shape}")
    if max_px is not None and not max_px > 0:
        raise ValueError(f"expected max_px above 0, got {max_px}")
    flow = np.ascontiguousarray(flow, np.float32)
    if flow.size == 0:
        return np.zeros((*flow.shape[:2], 3), np.uint8)
    u, v = cv2.split(flow)
    speed = cv2.magnitude(u, v)
    finite = np.isfinite(speed)
    if max_px is None:
        max_px = max(1.0, float(speed.max(initial=0.0, where=finite)))
    scale = np.float32(TABLE_RADIUS / max_px)
    # Vectors beyond max_px would leave the disc. They are pulled back to its rim, which has darker colours.
    pull = scale * np.minimum(1.0, (TABLE_RADIUS + 2.0) / np.maximum(speed * scale, 1e-6)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        columns = np.where(finite, u * pull, 0).astype(np.int32)
        rows = np.where(finite, v * pull, 0).astype(np.int32)
    side = 2 * TABLE_RADIUS + 5
    index = (rows + (TABLE_RADIUS + 2)) * side + columns + (TABLE_RADIUS + 2)
    color = color_table().take(index.ravel(), axis=0).reshape(*flow.shape[:2], 3)
    if not finite.all():
        color[~finite] = 0
    return color


def _wheel() -> np.ndarray:
    """The colours of the wheel, (55, 3) float32 RGB 0..1. Between two pure hues, one channel goes up or down."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], np.float32)
    counts = (15, 6, 4, 11, 13, 6)
    segments = [
        begin + (end - begin) * (np.arange(count, dtype=np.float32) / count)[:, None]
        for begin, end, count in zip(corners[:-1], corners[1:], counts, strict=True)
    ]
    return np.concatenate(segments)


@cache
def color_table() -> np.ndarray:
    """The colours of all vectors, ((2 r + 5)^2, 3) uint8 RGB.

    The steps are 1 / r of the largest vector. A rim of two steps is for longer vectors.
    """
    wheel = _wheel()
    steps = np.arange(-TABLE_RADIUS - 2, TABLE_RADIUS + 3, dtype=np.float32) / TABLE_RADIUS
    v, u = np.meshgrid(steps, steps, indexing="ij")
    radius = np.hypot(u, v)
    position = (np.arctan2(-v, -u) / np.pi + 1.0) / 2.0 * (len(wheel) - 1)
    lower = np.floor(position).astype(int)
    fraction = (position - lower)[..., None]
    hue = (1 - fraction) * wheel[lower % len(wheel)] + fraction * wheel[(lower + 1) % len(wheel)]
    inside = (radius <= 1.0)[..., None]
    color = np.where(inside, 1.0 - radius[..., None] * (1.0 - hue), hue * 0.75)
    return np.ascontiguousarray(np.floor(255.0 * color).astype(np.uint8).reshape(-1, 3))
