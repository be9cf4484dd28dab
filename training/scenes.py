# SPDX-License-Identifier: Apache-2.0
"""Random scenes for the procedural generator: what there is and how it moves. Numbers only; `rendering` draws them.

A scene is a background and up to `max_layers` layers on top of it. Every layer lives in canonical coordinates c, which
are the pixel coordinates of frame 0, and moves by phi_t(c) = H_t (c + e_t(c)): a homography and, for some, an elastic
field of a few plane waves with a Lipschitz constant well below 1, so that phi_t has an inverse and a fixed-point
iteration finds it.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from .appearance import EVERYTHING, Outline, Texture, draw_texture, object_outline, polygon
from .motion import (
    WAVES,
    apply_homography,
    elastic,
    grid,
    log_uniform,
    mean_displacement,
    pick,
    planar_motion,
    rotation,
    schedule,
    sign,
)

Kind = Literal["static", "particles", "fine", "planar", "ego-motion"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FINE_RANGE_PX = (0.05, 1.0)  # of the typical displacement in clips with motion below a pixel
PLAIN_SHARE = 0.3  # of objects with little contrast: furniture, walls, car bodies


@dataclass(frozen=True)
class Layer:
    """One textured surface. T is the number of frames."""

    homographies: np.ndarray  # (T, 3, 3), frame 0 px -> frame t px, identity for t = 0
    waves: np.ndarray  # (WAVES, 5): amplitude x, y (px), wave vector x, y (rad/px), phase
    wave_gains: np.ndarray  # (T,) in 0..1, 0 for t = 0: e_t = gain_t * sum of waves; all 0: a rigid layer
    outline: Outline
    texture: Texture

    @property
    def elastic(self) -> bool:
        return bool(self.wave_gains.any())


@dataclass(frozen=True)
class SceneSettings:
    """What `draw_scene` needs to know; see `ProceduralGenerator` for the meaning of each."""

    height: int
    width: int
    frames: int
    max_layers: int
    min_displacement_px: float
    max_displacement_px: float
    static_share: float
    particle_share: float
    fine_share: float
    photographs: int  # textures with indices below this are photographs
    patterns: int  # and the ones after them procedural
    pattern_share: float


def draw_kind(rng: np.random.Generator, settings: SceneSettings) -> Kind:
    """Draw what kind of clip one is; all but "particles" are scenes."""
    shares: dict[Kind, float] = {
        "static": settings.static_share, "particles": settings.particle_share, "fine": settings.fine_share
    }  # fmt: skip
    rest = 1 - sum(shares.values())
    kind: Kind = pick(rng, {**shares, "planar": 0.55 * rest, "ego-motion": 0.45 * rest})
    return kind


def draw_scene(rng: np.random.Generator, settings: SceneSettings, kind: Kind) -> list[Layer]:
    """Draw a scene of a kind; layers are ordered from the far to the near, the background first.

    :raises ValueError: for "particles", which has no layers; see `particles`.
    """
    if kind == "particles":
        raise ValueError("clips of particles have no layers; draw_particles draws them")
    if kind == "fine":
        low, high = FINE_RANGE_PX
        settings = replace(
            settings, min_displacement_px=min(low, settings.min_displacement_px),
            max_displacement_px=min(high, settings.max_displacement_px),
        )  # fmt: skip
        kind = pick(rng, {"planar": 0.55, "ego-motion": 0.45})
    if kind == "ego-motion":
        return _ego_motion_scene(rng, settings)
    return _planar_scene(rng, settings, static=kind == "static")


def _layer_count(rng: np.random.Generator, settings: SceneSettings) -> int:
    """0 to max_layers, about 3 on average: few things are the rule, many the exception."""
    weights = {0: 0.06, 1: 0.14, 2: 0.18, 3: 0.2, 4: 0.16, 5: 0.1, 6: 0.07, 7: 0.05, 8: 0.04}
    return min(pick(rng, weights), settings.max_layers)


def _radius(rng: np.random.Generator, settings: SceneSettings) -> float:
    """Half the size of an object: its size is log-uniform from 7 % to 70 % of the frame."""
    return 0.5 * log_uniform(rng, 0.07, 0.7) * float(np.sqrt(settings.height * settings.width))


def _still(settings: SceneSettings) -> np.ndarray:
    return np.tile(np.eye(3), (settings.frames, 1, 1))


def _finish(
    rng: np.random.Generator, settings: SceneSettings, homographies: np.ndarray, outline: Outline,
    centre: np.ndarray, radius: float, elastic_px: float, plain_share: float = 0.12,
) -> Layer:  # fmt: skip
    """Complete a layer with elastic motion (none for elastic_px = 0) and texture."""
    if elastic_px > 0:
        waves, gains = elastic(rng, settings.frames, radius, elastic_px)
    else:
        waves, gains = np.zeros((WAVES, 5)), np.zeros(settings.frames)
    texture = draw_texture(rng, settings.photographs, settings.patterns, settings.pattern_share, centre, plain_share)
    return Layer(homographies, waves, gains, outline, texture)


def _object(
    rng: np.random.Generator, settings: SceneSettings, homographies: np.ndarray, centre: np.ndarray, radius: float,
    elastic_px: float,
) -> list[Layer]:  # fmt: skip
    """An object that moves by `homographies` and passes `centre` at some time during the clip.

    If it always started there, fast objects would be gone from most of the later frames. Some rigid ones have several
    parts, outlines and textures of their own with one motion, as a chair has a seat and legs.
    """
    travelled = apply_homography(homographies[-1], centre[None])[0] - centre
    start = centre - rng.uniform(0, 1) * travelled
    outline = object_outline(rng, settings.width, start, radius)
    layers = [_finish(rng, settings, homographies, outline, start, radius, elastic_px, PLAIN_SHARE)]
    if elastic_px == 0 and rng.random() < 0.3:
        for _ in range(int(rng.integers(1, 4))):
            place, size = start + rng.normal(0, 0.6, 2) * radius, radius * log_uniform(rng, 0.3, 1)
            outline = object_outline(rng, settings.width, place, size)
            layers.append(_finish(rng, settings, homographies, outline, place, size, 0.0, PLAIN_SHARE))
    return layers


def _planar_scene(rng: np.random.Generator, settings: SceneSettings, static: bool = False) -> list[Layer]:
    """Everything moves in the image plane: a background, and objects with motions of their own.

    Half of the objects are carried along by the background's motion.
    """
    size = np.array([settings.width, settings.height])
    low, high = settings.min_displacement_px, settings.max_displacement_px
    magnitude = log_uniform(rng, low, high)
    still_background = static or rng.random() < 0.2

    def elastic_px(of: float, share: float) -> float:
        return 0.0 if static or rng.random() > share else of * rng.uniform(0.2, 1)

    if still_background:
        background = _still(settings)
    else:
        background = planar_motion(rng, settings.frames, size / 2, settings.width / 2, magnitude)
    bend_px = 0.0 if still_background else elastic_px(magnitude, 0.3)
    layers = [_finish(rng, settings, background, EVERYTHING, size / 2, settings.width / 3, bend_px)]
    count = _layer_count(rng, settings)
    if still_background and not static:  # something has to move
        count = max(count, min(1, settings.max_layers))
    for _ in range(count):
        centre, radius = rng.uniform(0, 1, 2) * size, _radius(rng, settings)
        carried = rng.random() < 0.5 and not still_background
        own = log_uniform(rng, low, min(magnitude, high / 2) + low) if carried else log_uniform(rng, low, high)
        if static or rng.random() < 0.06:  # also: dirt on the lens, a bonnet, a caption
            homographies = _still(settings)
        else:
            homographies = planar_motion(rng, settings.frames, centre, radius, own)
            if carried:
                homographies = background @ homographies
        layers += _object(rng, settings, homographies, centre, radius, elastic_px(own, 0.25))
    return layers[: settings.max_layers + 1]


@dataclass(frozen=True)
class _Plane:
    """A plane normal . X = distance in the first camera's frame. Unit: the camera's height over the ground."""

    normal: np.ndarray  # (3,)
    distance: float
    points: np.ndarray  # (N, 2) px on it, by which the scale of the motion is set
    centre: np.ndarray  # (2,) px
    radius: float  # px
    outline: Outline | None = None  # None: an object's, drawn later


def _planes(rng: np.random.Generator, settings: SceneSettings, rays: np.ndarray) -> tuple[list[_Plane], float]:
    """A far background, often a ground and a wall as along a road, and upright boards; from the far to the near.

    `rays` (3, 3) maps homogeneous pixels to viewing rays with Z = 1. Also returns the smallest depth in view.
    """
    size = np.array([settings.width, settings.height])
    focal = 1 / rays[0, 0]
    far = log_uniform(rng, 12, 200)
    background = _Plane(np.array([0, 0, 1.0]), far, grid(size / 2, size / 2), size / 2, settings.width / 3, EVERYTHING)
    planes, nearest = [background], far
    # A plane n . X = d is seen at depth d / (n . ray): all bounds below are half-planes of the image.
    horizon = size[1] * rng.uniform(0.2, 0.6)
    ground = np.array([rng.normal(0, 0.05), 1, -rays[1, 1] * horizon - rays[1, 2]])
    has_ground = rng.random() < 0.7
    if has_ground:
        nearest = focal / (size[1] - horizon)
        inside = ground @ rays - np.array([0, 0, 1 / min(far, 30)])  # nearer than the background
        middle = np.array([size[0] / 2, (horizon + size[1]) / 2])
        points = grid(middle, (size[0] / 2, (size[1] - horizon) / 3))
        planes.append(_Plane(ground, 1.0, points, middle, settings.width / 3, polygon(-inside[None])))
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
        planes.append(_Plane(normal, distance, grid(middle, size / 10), middle, settings.width / 4, outline))
    boards = []
    for _ in range(min(_layer_count(rng, settings), settings.max_layers + 1 - len(planes))):
        radius, depth = _radius(rng, settings), log_uniform(rng, 1.5, 0.8 * far)
        centre = rng.uniform(0, 1, 2) * size
        if has_ground and rng.random() < 0.6:  # stands on the ground
            depth = max(depth, focal / (size[1] - horizon))
            centre[1] = horizon + focal / depth - rng.uniform(0.6, 1) * radius
        normal = np.array([*rng.uniform(-0.3, 0.3, 2), 1])
        distance = float(normal @ rays @ [*centre, 1]) * depth
        boards.append((depth, _Plane(normal, distance, grid(centre, radius / 2), centre, radius)))
        nearest = min(nearest, depth)
    boards.sort(key=lambda board: -board[0])
    return (planes + [plane for _, plane in boards])[: settings.max_layers + 1], nearest


def _ego_motion_scene(rng: np.random.Generator, settings: SceneSettings) -> list[Layer]:
    """A camera moves past planes: forward as on a road, sideways, or any way; some objects also move by themselves."""
    focal = rng.uniform(0.6, 1.3) * settings.width
    middle = rng.uniform(0.4, 0.6, 2) * (settings.width, settings.height)
    intrinsics = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]])
    rays = np.linalg.inv(intrinsics)
    planes, nearest = _planes(rng, settings, rays)

    magnitude = log_uniform(rng, settings.min_displacement_px, settings.max_displacement_px)
    heading = pick(rng, {"forward": 0.5, "lateral": 0.25, "any": 0.25})
    spread = {"forward": (0.12, 0.06, 1), "lateral": (1, 0.3, 0.1), "any": (1, 1, 1)}[heading]
    translation = rng.normal(0, 1, 3) * spread
    if heading == "forward":
        translation[2] = -abs(translation[2]) - 0.3  # points come nearer
    spin = rng.normal(0, 1, 3) * (1, 1, 0.5) * pick(rng, {0.0: 0.34, 0.01: 0.33, 0.1: 0.33})
    shifts, turns = schedule(rng, settings.frames), schedule(rng, settings.frames)
    # The camera may not come near to a plane or pass through it, nor may things pass faster than half a frame width per
    # frame: beyond that textures are mere smears.
    approach = max(abs(float(plane.normal @ translation)) / abs(plane.distance) for plane in planes) * shifts[-1]
    passing = float(np.linalg.norm(translation[:2])) * focal / (settings.width * nearest)
    closing = max(-translation[2], 0) * shifts[-1] / nearest
    farthest = 1 / max(approach / 0.35, passing / 0.5, closing / 0.6, 1e-6)

    def at(shift: float, turn: float, scale: float) -> list[np.ndarray]:
        """Homographies of all planes: K (R + t n^T / d) K^-1 (Hartley, Zisserman, Multiple View Geometry, 13.1)."""
        turned = rotation(turn * min(scale, 3.0) * spin)
        moved = shift * min(scale, farthest) * translation
        return [intrinsics @ (turned + np.outer(moved, plane.normal) / plane.distance) @ rays for plane in planes]

    scale = 0.1
    for _ in range(5):
        moves = zip(at(1, 1, scale), planes, strict=True)
        typical = np.median([mean_displacement(homography, plane.points) for homography, plane in moves])
        scale *= float(np.clip(magnitude / max(typical, 1e-6), 0.1, 10)) ** 0.8
    motions = np.stack([at(p, q, scale) for p, q in zip(shifts, turns, strict=True)], axis=1)  # (planes, T, 3, 3)
    layers = []
    for plane, homographies in zip(planes, motions, strict=True):
        if plane.outline is not None:
            layers.append(_finish(rng, settings, homographies, plane.outline, plane.centre, plane.radius, 0.0))
            continue
        elastic_px = 0.0
        if rng.random() < 0.3:  # moves by itself as well
            own = log_uniform(rng, settings.min_displacement_px, settings.max_displacement_px / 2)
            homographies = homographies @ planar_motion(rng, settings.frames, plane.centre, plane.radius, own)
            elastic_px = own * 0.5 * (rng.random() < 0.4)
        layers += _object(rng, settings, homographies, plane.centre, plane.radius, elastic_px)
    return layers[: settings.max_layers + 1]
