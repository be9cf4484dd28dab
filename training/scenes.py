# SPDX-License-Identifier: Apache-2.0
"""Random scenes for the procedural generator: what there is and how it moves. ``rendering`` draws them.

A scene is a background and up to ``max_layers`` layers on top of it. Every layer lives in canonical coordinates c,
which are the pixel coordinates of frame 0, and moves by phi_t(c) = H_t (c + e_t(c)): a homography and, for some, an
elastic field of a few plane waves with a Lipschitz constant well below 1, so that phi_t has an inverse and a
fixed-point iteration finds it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt

from training.rendering import MAX_LIPSCHITZ, Layer, Outline, bars, everywhere, object_outline, rectangle
from training.settings import Dice
from training.textures import OBJECT, USUAL, Look, draw_texture
from training.worlds import Plane, flight_world, open_world, road_world

WAVES = 3  # plane waves in an elastic field
_UNIT_GRID = np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)), axis=-1).reshape(-1, 2)
FURNITURE_SHARE = 0.1  # of objects that do not bend
WORLDS = {"ego-motion": open_world, "road": road_world, "flight": flight_world}


def grid(centre: np.ndarray, half_size: npt.ArrayLike) -> np.ndarray:
    """A 5 x 5 grid of points, (25, 2), over centre +- half_size."""
    return centre + _UNIT_GRID * np.asarray(half_size)


def apply_homography(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map (N, 2) points, which should lie in front of the camera."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-3)


def mean_displacement(homography: np.ndarray, points: np.ndarray) -> float:
    """Mean length in px by which a homography moves (N, 2) points."""
    shift = apply_homography(homography, points) - points
    return float(np.sqrt((shift * shift).sum(1)).mean())


def planar_motion(rng: Dice, centre: np.ndarray, radius: float, magnitude: float) -> np.ndarray:
    """Homographies (T, 3, 3) of a plane that shifts, turns, zooms and tilts about ``centre`` (x, y in px).

    The mean displacement over ``centre`` +- ``radius`` px from frame 0 to frame 1 is ``magnitude`` px.
    """
    direction = rng.uniform(0, 2 * np.pi)
    shift = np.array([np.cos(direction), np.sin(direction)]) * rng.pick({1.0: 0.67, 0.3: 0.33})
    # Small things may move far, but not spin or swell as far: that would be a blur, not a motion.
    reach = min(magnitude, 0.3 * radius) / magnitude / radius
    turn = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    zoom = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    tilt = rng.normal(0, 0.15, 2) * reach / radius * (rng.random() < 0.5)
    along, around = rng.schedule(), rng.schedule()
    bend = rng.uniform(-0.2, 0.2) * (rng.random() < 0.5)  # rad per frame: the path is an arc

    def at(progress: float, turned: float, scale: float) -> np.ndarray:
        angle, factor, arc = scale * turned * turn, math.exp(scale * turned * zoom), bend * max(progress - 1, 0)
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        path = scale * progress * np.array([[math.cos(arc), -math.sin(arc)], [math.sin(arc), math.cos(arc)]]) @ shift
        p, q = np.clip(scale * turned * tilt, -0.15 / radius, 0.15 / radius)
        about_centre = np.array([[cos, -sin, path[0]], [sin, cos, path[1]], [p, q, 1]])
        return back @ about_centre @ to_centre

    to_centre = np.array([[1, 0, -centre[0]], [0, 1, -centre[1]], [0, 0, 1]])
    back = np.array([[1, 0, centre[0]], [0, 1, centre[1]], [0, 0, 1]])
    points, scale = grid(centre, radius), magnitude
    for _ in range(2):  # the displacement is nearly linear in the scale
        scale *= magnitude / max(mean_displacement(at(1, 1, scale), points), 1e-6)
    return np.stack([at(p, q, scale) for p, q in zip(along, around, strict=True)])


def elastic(rng: Dice, radius: float, magnitude: float) -> tuple[np.ndarray, np.ndarray]:
    """An elastic field of at most ``magnitude`` px and with a Lipschitz constant of at most ``MAX_LIPSCHITZ``.

    :returns: plane waves (WAVES, 5): amplitude x, y (px), wave vector x, y (rad/px), phase; and gains (T,) in 0..1.
    """
    lengths = np.maximum(rng.uniform(0.7, 2.5, WAVES) * radius, 24.0)
    directions, headings = rng.uniform(0, 2 * np.pi, (2, WAVES))
    vectors = 2 * np.pi / lengths[:, None] * np.stack([np.cos(directions), np.sin(directions)], axis=1)
    amplitudes = rng.uniform(0.3, 1, WAVES)[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    sizes = np.linalg.norm(amplitudes, axis=1)
    steepness = float((sizes * np.linalg.norm(vectors, axis=1)).sum())
    amplitudes *= min(rng.uniform(0.2, 1) * MAX_LIPSCHITZ / steepness, magnitude / sizes.sum())
    waves = np.concatenate([amplitudes, vectors, rng.uniform(0, 2 * np.pi, (WAVES, 1))], axis=1)
    gains = rng.schedule()
    return waves, gains / gains[-1]


def complete(
    rng: Dice, homographies: np.ndarray, outline: Outline, centre: np.ndarray, radius: float, look: Look = USUAL,
    elastic_px: float = 0.0,
) -> Layer:  # fmt: skip
    """Complete a layer with elastic motion (none for elastic_px = 0) and texture."""
    bend = elastic(rng, radius, elastic_px) if elastic_px > 0 else None
    return Layer(homographies, outline, draw_texture(rng, centre, look), bend)


def object_layers(
    rng: Dice, homographies: np.ndarray, centre: np.ndarray, radius: float, elastic_px: float
) -> list[Layer]:
    """An object that moves by ``homographies`` past ``centre`` during the clip; some rigid ones have several parts."""
    travelled = apply_homography(homographies[-1], centre[None])[0] - centre
    start = centre - rng.uniform(0, 1) * travelled
    if elastic_px == 0 and rng.random() < FURNITURE_SHARE:
        return _furniture(rng, homographies, start, radius)
    outline = object_outline(rng, start, radius)
    layers = [complete(rng, homographies, outline, start, radius, OBJECT, elastic_px)]
    if elastic_px == 0 and rng.random() < 0.3:
        for _ in range(int(rng.integers(1, 4))):
            place, size = start + rng.normal(0, 0.6, 2) * radius, radius * rng.log_uniform(0.3, 1)
            outline = object_outline(rng, place, size)
            layers.append(complete(rng, homographies, outline, place, size, OBJECT))
    return layers


def _furniture(rng: Dice, homographies: np.ndarray, centre: np.ndarray, radius: float) -> list[Layer]:
    """A large plain body on thin legs, often with a back of slats, as chairs and tables have."""
    radius = max(radius, 0.1 * float(np.sqrt(rng.settings.height * rng.settings.width)))
    angle = rng.normal(0, 0.2)
    down = np.array([-np.sin(angle), np.cos(angle)])
    body = np.array([rng.uniform(0.5, 1), rng.log_uniform(0.12, 0.6)]) * radius
    look = Look(0.85, (0.02, 0.25), OBJECT.level)
    first = complete(rng, homographies, rectangle(centre, angle, body), centre, radius, look)
    layers = [first]
    for direction in (1, -1) if rng.random() < 0.6 else (1,):
        count, thickness = int(rng.integers(2, 5)), rng.thin_px(5)
        half = np.array([0.9 * body[0], radius * rng.uniform(0.3, 0.7)])
        place = centre + direction * (body[1] + half[1]) * down
        outline = bars(
            place, angle, half + np.array([thickness, 0]), 2 * half[0] / (count - 1), thickness,
            crossing=direction < 0 and rng.random() < 0.3, offset=0.5 * (count % 2 == 0),
        )  # fmt: skip
        other = complete(rng, homographies, outline, place, radius, look)
        layers.append(replace(other, texture=first.texture) if rng.random() < 0.6 else other)
    return layers


def ego_motion_scene(rng: Dice, kind: str = "ego-motion") -> list[Layer]:
    """A camera moves past the planes of one of the ``WORLDS``; some objects also move by themselves."""
    settings = rng.settings
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
    world = WORLDS[kind](rng, rays)
    planes, translation = world.planes, world.translation

    magnitude = rng.log_uniform(low, high)
    shifts, turns = rng.schedule(), rng.schedule()
    # The camera may not come near to a plane or pass through it, nor may things pass faster than half a frame width per
    # frame: beyond that textures are mere smears.
    approach = max(abs(float(p.normal @ translation) * p.pace / p.distance) for p in planes) * shifts[-1]
    passing = float(np.linalg.norm(translation[:2])) * focal / (settings.width * world.nearest)
    closing = max(-translation[2], 0) * shifts[-1] / world.nearest
    farthest = 1 / max(approach / 0.35, passing / 0.5, closing / 0.6, 1e-6)

    def at(shift: float, turn: float, scale: float, of: list[Plane]) -> list[np.ndarray]:
        """Homographies of planes: K (R + t n^T / d) K^-1 (Hartley, Zisserman, Multiple View Geometry, 13.1)."""
        turned = cv2.Rodrigues(turn * min(scale, 3.0) * world.spin)[0]
        moved = shift * min(scale, farthest) * translation
        return [intrinsics @ (turned + np.outer(p.pace * moved, p.normal) / p.distance) @ rays for p in of]

    points = [grid(p.centre, p.radius / 2 if p.extent is None else p.extent) for p in world.leading]
    scale = 0.1
    for _ in range(5):
        moves = zip(at(1, 1, scale, world.leading), points, strict=True)
        typical = np.median([mean_displacement(homography, there) for homography, there in moves])
        scale *= float(np.clip(magnitude / max(typical, 1e-6), 0.1, 10)) ** 0.8
    motions = np.stack([at(p, q, scale, planes) for p, q in zip(shifts, turns, strict=True)], axis=1)
    layers = []
    for plane, homographies in zip(planes, motions, strict=True):  # (T, 3, 3)
        if plane.outline is not None:
            layers.append(complete(rng, homographies, plane.outline, plane.centre, plane.radius, plane.look))
            continue
        elastic_px = 0.0
        if rng.random() < plane.own_share:  # moves by itself as well
            own = rng.log_uniform(settings.min_displacement_px, settings.max_displacement_px / 2)
            homographies = homographies @ planar_motion(rng, plane.centre, plane.radius, own)
            elastic_px = own * 0.5 * (rng.random() < 0.4)
        layers += object_layers(rng, homographies, plane.centre, plane.radius, elastic_px)
    return layers[: settings.max_layers + 1]


KINDS = ("static", "particles", "fine", "planar", "ego-motion", "road", "flight")
# Of the clips left when the shares that can be set are taken off.
MOVING_SHARES = {"planar": 0.5, "ego-motion": 0.22, "road": 0.2, "flight": 0.08}
FINE_RANGE_PX = (0.05, 1.0)  # of the typical displacement in clips with motion below a pixel


def draw_kind(rng: Dice) -> str:
    """Draw one of the ``KINDS``; all but "particles" are scenes."""
    s = rng.settings
    shares = {"static": s.static_share, "particles": s.particle_share, "fine": s.fine_share}
    rest = 1 - sum(shares.values())
    return rng.pick(shares | {kind: share * rest for kind, share in MOVING_SHARES.items()})


def draw_scene(rng: Dice, kind: str) -> list[Layer]:
    """Draw a scene of a kind but "particles"; layers are ordered from the far to the near, the background first."""
    if kind == "fine":
        low, high = FINE_RANGE_PX
        low, high = min(low, rng.settings.min_displacement_px), min(high, rng.settings.max_displacement_px)
        rng.settings = replace(rng.settings, min_displacement_px=low, max_displacement_px=high)
        kind = rng.pick({"planar": 0.55, "ego-motion": 0.45})
    return ego_motion_scene(rng, kind) if kind in WORLDS else planar_scene(rng, static=kind == "static")


def planar_scene(rng: Dice, static: bool = False) -> list[Layer]:
    """A background, half of the objects carried along by it, and objects with motions of their own, in the plane."""
    settings = rng.settings
    size = np.array([settings.width, settings.height])
    low, high = settings.min_displacement_px, settings.max_displacement_px
    magnitude = rng.log_uniform(low, high)
    still, still_background = np.tile(np.eye(3), (settings.frames, 1, 1)), static or rng.random() < 0.2

    def elastic_px(of: float, share: float) -> float:
        return 0.0 if static or rng.random() > share else of * rng.uniform(0.2, 1)

    background = still if still_background else planar_motion(rng, size / 2, settings.width / 2, magnitude)
    bend_px = 0.0 if still_background else elastic_px(magnitude, 0.3)
    layers = [complete(rng, background, everywhere, size / 2, settings.width / 3, elastic_px=bend_px)]
    count = rng.layer_count()
    if still_background and not static:  # something has to move
        count = max(count, min(1, settings.max_layers))
    for _ in range(count):
        centre, radius = rng.uniform(0, 1, 2) * size, rng.object_radius()
        carried = rng.random() < 0.5 and not still_background
        own = rng.log_uniform(low, min(magnitude, high / 2) + low) if carried else rng.log_uniform(low, high)
        if static or rng.random() < 0.06:  # also: dirt on the lens, a bonnet, a caption
            homographies = still
        else:
            homographies = planar_motion(rng, centre, radius, own)
            if carried:
                homographies = background @ homographies
        layers += object_layers(rng, homographies, centre, radius, elastic_px(own, 0.25))
    return layers[: settings.max_layers + 1]
