# SPDX-License-Identifier: Apache-2.0
"""Worlds of planes that a camera moves through, for the procedural generator.

Coordinates are those of the first camera: x to the right, y down, z forward. ``rays`` (3, 3) maps homogeneous pixels to
viewing rays with z = 1; a plane n . X = d is seen at depth d / (n . ray), so that all bounds between planes are
half-planes of the image. A list of planes goes from the far to the near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.rendering import Outline, bars, everywhere, object_outline, polygon, rectangle
from training.settings import Dice
from training.textures import OBJECT, ROAD, SKY, THIN, USUAL, Look

AHEAD = np.array([0.0, 0.0, 1.0])
SKY_DISTANCE = 1e4  # so that it moves by the camera's rotation alone


@dataclass(frozen=True)
class Plane:
    """A plane normal . X = distance in the first camera's frame. Unit: the camera's height over the ground."""

    normal: np.ndarray  # (3,)
    distance: float
    centre: np.ndarray  # (2,) px
    radius: float  # px
    outline: Outline | None = None  # None: an object's, drawn later
    look: Look = USUAL
    pace: float = 1.0  # of the camera's own motion, what is seen of it: below 1 for what drives ahead, 2 for oncoming
    own_share: float = 0.3  # how often an object moves by itself as well
    extent: npt.ArrayLike | None = None  # px about the centre, over which its motion is measured; None: radius / 2


@dataclass(frozen=True)
class World:
    """Planes and how the camera may move among them."""

    planes: list[Plane]
    nearest: float  # the smallest depth in view
    leading: list[Plane]  # whose motion is as long as the clip's typical displacement
    translation: np.ndarray  # (3,)
    spin: np.ndarray  # (3,) rotation vector


def open_world(rng: Dice, rays: np.ndarray) -> World:
    """A far background, often a ground and a wall as along a road, and upright boards; motion in any direction."""
    size = np.array([rng.settings.width, rng.settings.height])
    room = rng.settings.max_layers + 1
    focal = 1 / rays[0, 0]
    far = rng.log_uniform(12, 200)
    background = Plane(AHEAD, far, size / 2, size[0] / 3, everywhere, extent=size / 2)
    planes, nearest = [background], far
    horizon = size[1] * rng.uniform(0.2, 0.6)
    ground = np.array([rng.normal(0, 0.05), 1, -rays[1, 1] * horizon - rays[1, 2]])
    has_ground = rng.random() < 0.7
    if has_ground:
        nearest = focal / (size[1] - horizon)
        inside = ground @ rays - np.array([0, 0, 1 / min(far, 30)])  # nearer than the background
        middle = np.array([size[0] / 2, (horizon + size[1]) / 2])
        extent = (size[0] / 2, (size[1] - horizon) / 3)
        planes.append(Plane(ground, 1.0, middle, size[0] / 3, polygon(inside), extent=extent))
    if rng.random() < 0.35:
        side, distance = rng.sign(), rng.uniform(1.2, 5)
        normal = np.array([side, 0, rng.uniform(-0.1, 0.1)])
        bounds = [normal @ rays - np.array([0, 0, distance / min(far, rng.uniform(8, 30))])]
        if has_ground:  # it stands on the ground: ground . X < 1
            bounds.append(normal @ rays / distance - ground @ rays)
        if rng.random() < 0.5:  # and ends at some height
            bounds.append(normal @ rays * rng.uniform(0.5, 4) / distance + rays[1])
        middle = np.array([size[0] * (0.5 + 0.4 * side), horizon])
        outline = polygon(*bounds)
        planes.append(Plane(normal, distance, middle, size[0] / 4, outline, extent=size / 10))
    boards = []
    for _ in range(min(rng.layer_count(), room - len(planes))):
        radius, depth = rng.object_radius(), rng.log_uniform(1.5, 0.8 * far)
        centre = rng.uniform(0, 1, 2) * size
        if has_ground and rng.random() < 0.6:  # stands on the ground
            depth = max(depth, focal / (size[1] - horizon))
            centre[1] = horizon + focal / depth - rng.uniform(0.6, 1) * radius
        normal = np.array([*rng.uniform(-0.3, 0.3, 2), 1])
        distance = float(normal @ rays @ [*centre, 1]) * depth
        boards.append((depth, Plane(normal, distance, centre, radius)))
        nearest = min(nearest, depth)
    boards.sort(key=lambda board: -board[0])
    planes = (planes + [plane for _, plane in boards])[:room]
    heading = rng.pick({"forward": 0.5, "lateral": 0.25, "any": 0.25})
    spread = {"forward": (0.12, 0.06, 1), "lateral": (1, 0.3, 0.1), "any": (1, 1, 1)}[heading]
    translation = rng.normal(0, 1, 3) * spread
    if heading == "forward":
        translation[2] = -abs(translation[2]) - 0.3  # points come nearer
    spin = rng.normal(0, 1, 3) * (1, 1, 0.5) * rng.pick({0.0: 0.34, 0.01: 0.33, 0.1: 0.33})
    return World(planes, nearest, planes, translation, spin)


def road_world(rng: Dice, rays: np.ndarray) -> World:
    """A street: plain sky, a skyline, the ground, walls along it, poles and vehicles; the camera drives forward."""
    size = np.array([rng.settings.width, rng.settings.height], dtype=float)
    room = rng.settings.max_layers + 1
    horizon = size[1] * rng.uniform(0.25, 0.6)
    ground = np.array([rng.normal(0, 0.03), 1, -rays[1, 1] * horizon - rays[1, 2]])
    on_ground = ground @ rays  # of a pixel: 1 / depth of the ground there
    nearest = 1 / max(float((on_ground @ [[0, size[0]], [size[1], size[1]], [1, 1]]).max()), 1e-3)
    far = rng.log_uniform(25, 120)
    sky = SKY if rng.random() < 0.8 else USUAL
    planes = [Plane(AHEAD, SKY_DISTANCE, size / 2, size[0] / 3, everywhere, sky)]
    top = horizon - size[1] * rng.log_uniform(0.03, 0.3)
    skyline = polygon(np.array([rng.normal(0, 0.1), 1, -top]))
    middle = np.array([size[0] / 2, (horizon + size[1]) / 2])
    extent, near = (size[0] / 2, (size[1] - horizon) / 3), polygon(on_ground - np.array([0, 0, 1 / far]))
    road = Plane(ground, 1.0, middle, size[0] / 3, near, ROAD, extent=extent)
    planes += [Plane(AHEAD, far, size / 2, size[0] / 3, skyline), road]
    for side in (-1.0, 1.0):
        planes += _street_side(rng, size, rays, on_ground, side, far)
    planes = planes[: max(1, min(len(planes), room - 2))]

    boards: list[tuple[float, list[Plane]]] = []
    for _ in range(max(2, rng.layer_count())):
        depth = rng.log_uniform(1.2 * nearest, max(20, 3 * nearest))
        kind = rng.pick({"pole": 0.5, "vehicle": 0.3, "thing": 0.2})
        column = rng.uniform(0.02, 0.98) * size[0]
        foot = np.array([column, -(on_ground[0] * column + on_ground[2] - 1 / depth) / on_ground[1]])
        unit = 1 / rays[0, 0] / depth  # px
        if kind == "pole":
            boards.append((depth, _pole(rng, foot, unit, depth)))
            continue
        pace, radius = 1.0, unit * rng.log_uniform(0.2, 0.8)
        if kind == "vehicle":
            pace, radius = rng.choice([0.0, 0.3, 1.0, 1.7]), unit * rng.uniform(0.4, 0.9)
        radius = min(radius, 0.35 * size[0])
        centre = foot - np.array([0, rng.uniform(0.6, 0.9) * radius])
        share = 0.5 * (kind == "thing")
        boards.append((depth, [Plane(AHEAD, depth, centre, radius, None, OBJECT, pace, share)]))
    boards.sort(key=lambda board: -board[0])
    planes += [plane for _, group in boards for plane in group]

    drift = rng.normal(0, 0.04)
    translation = np.array([drift, (ground[2] - ground[0] * drift) / ground[1], -1.0])  # along the ground
    spin = rng.normal(0, 1, 3) * (0.3, 1, 0.2) * rng.pick({0.0: 0.15, 0.03: 0.45, 0.15: 0.4})
    return World(planes[:room], nearest, [road], translation, spin)


def _street_side(
    rng: Dice, size: np.ndarray, rays: np.ndarray, on_ground: np.ndarray, side: float, far: float
) -> list[Plane]:
    """Walls, buildings, hedges and parked cars along one side of a street, from the far to the near."""
    planes, count = [], rng.pick({0: 0.2, 1: 0.5, 2: 0.3})
    for i, behind in enumerate((far * rng.uniform(0.5, 1), rng.log_uniform(3, 10))[:count]):
        begin = behind * rng.uniform(0.2, 0.8) if i < count - 1 or rng.random() < 0.4 else 0.0
        away = rng.log_uniform(1.2, 6)
        top = rng.uniform(*rng.pick({(-9, -1): 0.6, (-0.5, 0.7): 0.2, (-0.1, 0.3): 0.2}))  # a building, a hedge, a car
        normal = np.array([side, 0, rng.normal(0, 0.02)])
        inverse = normal @ rays / away  # of a pixel: 1 / depth of the wall there
        inside = [inverse - np.array([0, 0, 1 / behind]), inverse - on_ground, rays[1] - top * inverse]
        if begin > 0.5:
            inside.append(np.array([0, 0, 1 / begin]) - inverse)
        middle, look = size * (0.5 + 0.4 * side, 0.5), OBJECT if rng.random() < 0.5 else USUAL
        planes.append(Plane(normal, away, middle, size[0] / 4, polygon(*inside), look))
        if begin > 2 and rng.random() < 0.5:
            depth = np.array([0, 0, 1 / begin])
            front = [normal @ rays - away * depth, depth - on_ground, rays[1] - top * depth]
            planes.append(Plane(AHEAD, begin, middle, size[0] / 4, polygon(*front), look))
    return planes


def _pole(rng: Dice, foot: np.ndarray, unit: float, depth: float) -> list[Plane]:
    """A pole, or several at one depth, that stands at ``foot`` (px); some carry a sign or an arm. ``unit`` is in px."""
    half_height = min(0.5 * unit * rng.log_uniform(1, 5), 2 * rng.settings.height)
    lean, thickness = rng.normal(0, 0.03), rng.thin_px()
    up = np.array([np.sin(lean), -np.cos(lean)])
    centre = foot + half_height * up
    outline = rectangle(centre, lean, (thickness / 2, half_height))
    if rng.random() >= 0.8:  # a fence, a railing
        half = np.array([unit * rng.uniform(0.5, 3), min(half_height, unit * rng.uniform(0.3, 0.7))])
        centre = foot + half[1] * up
        outline = bars(centre, lean, half, thickness * rng.log_uniform(4, 16), thickness, rng.random() < 0.2)
    planes = [Plane(AHEAD, depth, centre, half_height, outline, THIN)]
    if rng.random() < 0.35:
        radius, place = unit * rng.uniform(0.12, 0.3), foot + 2 * half_height * up
        if rng.random() < 0.6:
            outline = object_outline(rng, place, radius)
        else:
            length = unit * rng.uniform(0.4, 1.5)
            place = place + rng.sign() * np.array([length, 0])
            outline = rectangle(place, lean, (length, thickness / 2))
        planes.append(Plane(AHEAD, depth, place, radius, outline, THIN))
    return planes


def flight_world(rng: Dice, rays: np.ndarray) -> World:
    """Land from above, straight down or to the horizon: roofs, trees, vehicles, wires. Unit: the camera's height."""
    size = np.array([rng.settings.width, rng.settings.height], dtype=float)
    room = rng.settings.max_layers + 1
    planes: list[Plane] = []
    if rng.random() < 0.4:  # straight down
        normal = np.array([*rng.normal(0, 0.15, 2), 1])
    else:
        horizon = size[1] * rng.pick({rng.uniform(-2, -0.1): 0.65, rng.uniform(0, 0.25): 0.35})
        normal = np.array([rng.normal(0, 0.1), 1, -rays[1, 1] * horizon - rays[1, 2]])
    normal /= np.linalg.norm(normal)
    on_ground = normal @ rays
    corners = np.array([[0, 0, 1], [size[0], 0, 1], [0, size[1], 1], [*size, 1]]).T
    nearest = 1 / float((on_ground @ corners).max())
    outline: Outline = everywhere
    if (on_ground @ corners).min() < 0.02:
        planes.append(Plane(AHEAD, SKY_DISTANCE, size / 2, size[0] / 3, everywhere, SKY))
        outline = polygon(on_ground - np.array([0, 0, 0.02]))
    land = Plane(normal, 1.0, size * (0.5, 0.65), size[0] / 3, outline, extent=size * (0.45, 0.3))
    planes.append(land)
    things: list[Plane] = []
    for _ in range(max(1, rng.layer_count())):
        kind = rng.pick({"roof": 0.35, "tree": 0.25, "vehicle": 0.2, "wire": 0.2})
        height = {"roof": rng.log_uniform(0.02, 0.4), "tree": rng.log_uniform(0.02, 0.25), "vehicle": 0.005,
                  "wire": rng.uniform(0.1, 0.5)}[kind]  # fmt: skip
        centre = rng.uniform(0, 1, 2) * size
        scale = float(on_ground @ [*centre, 1]) / rays[0, 0]  # px that one unit measures there
        if scale * rays[0, 0] < 0.03:  # beyond the horizon
            continue
        radius = float(np.clip(scale * rng.log_uniform(0.04, 0.3), 4, 0.3 * size[0]))
        look, shape = {"roof": OBJECT, "wire": THIN}.get(kind, USUAL), None
        if kind == "roof":
            half = radius * np.array([1, rng.log_uniform(0.3, 1)])
            shape = rectangle(centre, rng.uniform(0, np.pi), half)
        elif kind == "wire":
            thickness = rng.thin_px() / 1.5
            half = np.array([thickness * rng.log_uniform(0.6, 12), 2 * size[0]])
            shape = bars(centre, rng.uniform(0, np.pi), half, thickness * rng.log_uniform(3, 10), thickness)
        own_share = 0.7 * (kind == "vehicle")
        things.append(Plane(normal, 1 - height, centre, radius, shape, look, own_share=own_share))
    things.sort(key=lambda thing: -thing.distance)
    nearest *= min([thing.distance for thing in things], default=1)
    along, climb = rng.normal(0, 1, 3), rng.normal(0, 0.3)  # mostly at one height
    translation = along - (along @ normal) * normal + climb * normal
    spin = rng.normal(0, 1, 3) * rng.pick({0.0: 0.2, 0.1: 0.4, 0.4: 0.4})
    return World((planes + things)[:room], nearest, [land], translation, spin)
