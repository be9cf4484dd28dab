# SPDX-License-Identifier: Apache-2.0
"""Outlines of the procedural generator's layers as signed distances.

Each function takes coordinates (n, T, H, W) in canonical px and 24 parameters (n, 1, 1, 1), and returns the distance in
canonical px, negative inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.appearance import Shape


def _local(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates about the centre p[0], p[1], turned by p[2]."""
    cos, sin = torch.cos(p[2]), torch.sin(p[2])
    across, down = x - p[0], y - p[1]
    return cos * across + sin * down, cos * down - sin * across


def _blob(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """An ellipse with radii p[3], p[4], its radius modulated by 4 harmonics p[6:14]; p[5]: relative radius of a hole.

    The distance is exact to first order for ellipses.
    """
    u, v = _local(x, y, p)
    u, v = u / p[3], v / p[4]
    radius = (u * u + v * v).sqrt_().clamp_min_(1e-4)
    cos, sin = u / radius, v / radius
    stretch = radius / torch.hypot(u / p[3], v / p[4]).clamp_min_(1e-9)
    outline = torch.ones_like(radius)
    re, im = cos, sin
    for k in range(4):  # cos and sin of 2, 3, 4, 5 times the angle
        re, im = re * cos - im * sin, re * sin + im * cos
        outline = outline + p[6 + 2 * k] * re + p[7 + 2 * k] * im
    return torch.maximum(radius - outline, p[5] * outline - radius) * stretch


def _polygon(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """The intersection of 8 half-planes p[3 i] x + p[3 i + 1] y + p[3 i + 2] <= 0."""
    distance = p[0] * x + p[1] * y + p[2]
    for i in range(3, 24, 3):
        distance = torch.maximum(distance, p[i] * x + p[i + 1] * y + p[i + 2])
    return distance


def _bars(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bars in a box of half extents p[3], p[4]; period p[5], half thickness p[6]; p[7] = 1: crossing bars as well.

    p[8], in periods, is how far the first bar lies from the middle.
    """
    u, v = _local(x, y, p)
    distance = (torch.remainder(u / p[5] - p[8] + 0.5, 1) - 0.5).abs() * p[5]
    crossing = (torch.remainder(v / p[5] + 0.5, 1) - 0.5).abs() * p[5]
    distance = torch.where(p[7] > 0, torch.minimum(distance, crossing), distance) - p[6]
    return torch.maximum(distance, torch.maximum(u.abs() - p[3], v.abs() - p[4]))


SIGNED_DISTANCES = {Shape.BLOB: _blob, Shape.POLYGON: _polygon, Shape.BARS: _bars}
