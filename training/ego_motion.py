# SPDX-License-Identifier: Apache-2.0
"""Scenes of a camera that moves past planes, for the procedural generator."""

from __future__ import annotations

import numpy as np

from training.layers import Layer, LayerSettings, complete, object_layers
from training.motion import log_uniform, mean_displacement, planar_motion, rotation, schedule
from training.planes import Plane, open_world
from training.streets import flight_world, road_world

WORLDS = {"ego-motion": open_world, "road": road_world, "flight": flight_world}


def ego_motion_scene(rng: np.random.Generator, settings: LayerSettings, kind: str = "ego-motion") -> list[Layer]:
    """A camera moves past the planes of one of the `WORLDS`; some objects also move by themselves."""
    focal = rng.uniform(0.6, 1.3) * settings.width
    middle = rng.uniform(0.4, 0.6, 2) * (settings.width, settings.height)
    low, high = settings.min_displacement_px, settings.max_displacement_px
    if kind == "road":
        low = max(low, high / 16)  # vehicles are fast
        if rng.random() < 0.35:  # a part of a larger picture: its borders move farthest
            focal *= rng.uniform(1, 2)
            middle += rng.uniform(-0.8, 0.8, 2) * (settings.width, 0.3 * settings.height)
    intrinsics = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]])
    rays = np.linalg.inv(intrinsics)
    world = WORLDS[kind](rng, settings, rays)
    planes, translation = world.planes, world.translation

    magnitude = log_uniform(rng, low, high)
    shifts, turns = schedule(rng, settings.frames), schedule(rng, settings.frames)
    # The camera may not come near to a plane or pass through it, nor may things pass faster than half a frame width per
    # frame: beyond that textures are mere smears.
    approaches = [abs(float(plane.normal @ translation) * plane.pace / plane.distance) for plane in planes]
    approach = max(approaches) * shifts[-1]
    passing = float(np.linalg.norm(translation[:2])) * focal / (settings.width * world.nearest)
    closing = max(-translation[2], 0) * shifts[-1] / world.nearest
    farthest = 1 / max(approach / 0.35, passing / 0.5, closing / 0.6, 1e-6)

    def at(shift: float, turn: float, scale: float, of: list[Plane]) -> list[np.ndarray]:
        """Homographies of planes: K (R + t n^T / d) K^-1 (Hartley, Zisserman, Multiple View Geometry, 13.1)."""
        turned = rotation(turn * min(scale, 3.0) * world.spin)
        moved = shift * min(scale, farthest) * translation
        return [intrinsics @ (turned + np.outer(p.pace * moved, p.normal) / p.distance) @ rays for p in of]

    scale = 0.1
    for _ in range(5):
        moves = zip(at(1, 1, scale, world.leading), world.leading, strict=True)
        typical = np.median([mean_displacement(homography, plane.points) for homography, plane in moves])
        scale *= float(np.clip(magnitude / max(typical, 1e-6), 0.1, 10)) ** 0.8
    motions = np.stack([at(p, q, scale, planes) for p, q in zip(shifts, turns, strict=True)], axis=1)
    layers = []
    for plane, homographies in zip(planes, motions, strict=True):  # (T, 3, 3)
        if plane.outline is not None:
            outline = plane.outline
            layers.append(complete(rng, settings, homographies, outline, plane.centre, plane.radius, 0.0, plane.look))
            continue
        elastic_px = 0.0
        if rng.random() < plane.own_share:  # moves by itself as well
            own = log_uniform(rng, settings.min_displacement_px, settings.max_displacement_px / 2)
            homographies = homographies @ planar_motion(rng, settings.frames, plane.centre, plane.radius, own)
            elastic_px = own * 0.5 * (rng.random() < 0.4)
        layers += object_layers(rng, settings, homographies, plane.centre, plane.radius, elastic_px)
    return layers[: settings.max_layers + 1]
