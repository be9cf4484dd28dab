# SPDX-License-Identifier: Apache-2.0
"""Worlds of planes that a camera moves through, for the procedural generator; `streets` has more of them.

Coordinates are those of the first camera: x to the right, y down, z forward. `rays` (3, 3) maps homogeneous pixels to
viewing rays with z = 1; a plane n . X = d is seen at depth d / (n . ray), so that all bounds between planes are
half-planes of the image. A list of planes goes from the far to the near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.appearance import EVERYTHING, USUAL, Look, Outline, polygon
from training.layers import LayerSettings, layer_count, object_radius
from training.motion import grid, log_uniform, pick, sign


@dataclass(frozen=True)
class Plane:
    """A plane normal . X = distance in the first camera's frame. Unit: the camera's height over the ground."""

    normal: np.ndarray  # (3,)
    distance: float
    points: np.ndarray  # (N, 2) px on it, by which the scale of the motion is set
    centre: np.ndarray  # (2,) px
    radius: float  # px
    outline: Outline | None = None  # None: an object's, drawn later
    look: Look = USUAL
    pace: float = 1.0  # of the camera's own motion, what is seen of it: below 1 for what drives ahead, 2 for oncoming
    own_share: float = 0.3  # how often an object moves by itself as well


@dataclass(frozen=True)
class World:
    """Planes and how the camera may move among them."""

    planes: list[Plane]
    nearest: float  # the smallest depth in view
    leading: list[Plane]  # whose motion is as long as the clip's typical displacement
    translation: np.ndarray  # (3,)
    spin: np.ndarray  # (3,) rotation vector


def open_world(rng: np.random.Generator, settings: LayerSettings, rays: np.ndarray) -> World:
    """A far background, often a ground and a wall as along a road, and upright boards; motion in any direction."""
    size = np.array([settings.width, settings.height])
    focal = 1 / rays[0, 0]
    far = log_uniform(rng, 12, 200)
    background = Plane(np.array([0, 0, 1.0]), far, grid(size / 2, size / 2), size / 2, settings.width / 3, EVERYTHING)
    planes, nearest = [background], far
    horizon = size[1] * rng.uniform(0.2, 0.6)
    ground = np.array([rng.normal(0, 0.05), 1, -rays[1, 1] * horizon - rays[1, 2]])
    has_ground = rng.random() < 0.7
    if has_ground:
        nearest = focal / (size[1] - horizon)
        inside = ground @ rays - np.array([0, 0, 1 / min(far, 30)])  # nearer than the background
        middle = np.array([size[0] / 2, (horizon + size[1]) / 2])
        points = grid(middle, (size[0] / 2, (size[1] - horizon) / 3))
        planes.append(Plane(ground, 1.0, points, middle, settings.width / 3, polygon(-inside[None])))
    if rng.random() < 0.35:
        side, distance = sign(rng), rng.uniform(1.2, 5)
        normal = np.array([side, 0, rng.uniform(-0.1, 0.1)])
        bounds = [normal @ rays - np.array([0, 0, distance / min(far, rng.uniform(8, 30))])]
        if has_ground:  # it stands on the ground: ground . X < 1
            bounds.append(normal @ rays / distance - ground @ rays)
        if rng.random() < 0.5:  # and ends at some height
            bounds.append(normal @ rays * rng.uniform(0.5, 4) / distance + rays[1])
        middle = np.array([size[0] * (0.5 + 0.4 * side), horizon])
        outline = polygon(-np.array(bounds))
        planes.append(Plane(normal, distance, grid(middle, size / 10), middle, settings.width / 4, outline))
    boards = []
    for _ in range(min(layer_count(rng, settings), settings.max_layers + 1 - len(planes))):
        radius, depth = object_radius(rng, settings), log_uniform(rng, 1.5, 0.8 * far)
        centre = rng.uniform(0, 1, 2) * size
        if has_ground and rng.random() < 0.6:  # stands on the ground
            depth = max(depth, focal / (size[1] - horizon))
            centre[1] = horizon + focal / depth - rng.uniform(0.6, 1) * radius
        normal = np.array([*rng.uniform(-0.3, 0.3, 2), 1])
        distance = float(normal @ rays @ [*centre, 1]) * depth
        boards.append((depth, Plane(normal, distance, grid(centre, radius / 2), centre, radius)))
        nearest = min(nearest, depth)
    boards.sort(key=lambda board: -board[0])
    planes = (planes + [plane for _, plane in boards])[: settings.max_layers + 1]
    heading = pick(rng, {"forward": 0.5, "lateral": 0.25, "any": 0.25})
    spread = {"forward": (0.12, 0.06, 1), "lateral": (1, 0.3, 0.1), "any": (1, 1, 1)}[heading]
    translation = rng.normal(0, 1, 3) * spread
    if heading == "forward":
        translation[2] = -abs(translation[2]) - 0.3  # points come nearer
    spin = rng.normal(0, 1, 3) * (1, 1, 0.5) * pick(rng, {0.0: 0.34, 0.01: 0.33, 0.1: 0.33})
    return World(planes, nearest, planes, translation, spin)
