# SPDX-License-Identifier: Apache-2.0
"""Random scenes for the procedural generator: what moves, how, and what it looks like. Numbers only; `rendering` draws them.

A scene is a background and 0 to `max_layers` layers on top of it. Every layer lives in canonical coordinates c, which are the pixel
coordinates of frame 0, and moves by phi_t(c) = H_t (c + e_t(c)): a homography and, for some, an elastic field of a few plane waves whose
Lipschitz constant is bounded, so that phi_t has an inverse and a fixed-point iteration finds it.
"""
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .textures import TEXTURE_SIZE

MAX_LIPSCHITZ = 0.25  # of the elastic field: its inversion gains a factor of 4 per iteration
WAVES = 3


class Shape(IntEnum):
    """Outline of a layer; the numbers in `Layer.shape_parameters` mean what the functions in `rendering` say."""

    EVERYTHING = 0
    BLOB = 1
    POLYGON = 2
    BARS = 3


@dataclass
class Layer:
    """One textured surface. Arrays are float64; T is the number of frames."""

    homographies: np.ndarray  # (T, 3, 3), frame 0 px -> frame t px, identity for t = 0
    waves: np.ndarray  # (WAVES, 5): amplitude x, y (px), wave vector x, y (rad/px), phase
    wave_gains: np.ndarray  # (T,) in 0..1, 0 for t = 0: e_t = gain_t * sum of waves; all 0: a rigid layer
    shape: Shape
    shape_parameters: np.ndarray  # (24,)
    box: np.ndarray  # (2, 2): smallest and largest canonical x, y of the outline, infinite if it has no bounds
    texture: int  # index into the bank
    halvings: int  # how many times the texture is halved before use
    texture_map: np.ndarray  # (2, 3), canonical px -> px of the texture at full size
    colour: np.ndarray  # (3, 4): linear map of the texture's RGB, and offset

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
    photographs: int  # texture indices below this are photographs
    procedurals: int  # and the ones after them procedural
    procedural_share: float


def draw_scene(rng: np.random.Generator, settings: SceneSettings) -> list[Layer]:
    """Draw one scene; layers are ordered from the far to the near, the background first."""
    kind = rng.random()
    if kind < settings.static_share:
        return _planar_scene(rng, settings, static=True)
    if kind < settings.static_share + 0.55 * (1 - settings.static_share):
        return _planar_scene(rng, settings)
    return _ego_motion_scene(rng, settings)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


# ---------------------------------------------------------------- motion


def _schedule(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Progress of a motion at each frame, (T,): 0, 1, about 2 (+- 0.3), ...: near-constant velocity."""
    steps = np.concatenate([[0.0, 1.0], 1 + rng.uniform(-0.3, 0.3, max(0, frames - 2))])
    return np.cumsum(steps)[:frames]


def apply_homography(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map (N, 2) points."""
    mapped = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ homography.T
    return mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-3)


def _mean_displacement(homography: np.ndarray, points: np.ndarray) -> float:
    return float(np.linalg.norm(apply_homography(homography, points) - points, axis=1).mean())


def _grid(centre: np.ndarray, half_size: np.ndarray | float) -> np.ndarray:
    """A 5 x 5 grid of points, (25, 2), over centre +- half_size."""
    line = np.linspace(-1, 1, 5)
    return centre + np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2) * half_size


def _planar_motion(rng: np.random.Generator, frames: int, centre: np.ndarray, radius: float, magnitude: float) -> np.ndarray:
    """Homographies (T, 3, 3) of a plane that shifts, turns, zooms and tilts about `centre`; mean displacement over +-`radius` is
    `magnitude` px from frame 0 to frame 1."""
    direction = rng.uniform(0, 2 * np.pi)
    shift = np.array([np.cos(direction), np.sin(direction)]) * rng.choice([1.0, 1.0, 0.3])
    # Small things may move far, but not spin or swell as far: that would be a blur, not a motion.
    reach = min(magnitude, 0.3 * radius) / magnitude / radius
    turn = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    zoom = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    tilt = rng.normal(0, 0.15, 2) * reach / radius * (rng.random() < 0.5)
    along, around = _schedule(rng, frames), _schedule(rng, frames)
    bend = rng.uniform(-0.2, 0.2) * (rng.random() < 0.5)  # rad per frame: the path is an arc

    to_centre, back = np.eye(3), np.eye(3)
    to_centre[:2, 2], back[:2, 2] = -centre, centre

    def at(progress: float, turned: float, scale: float) -> np.ndarray:
        angle, factor = scale * turned * turn, np.exp(scale * turned * zoom)
        cos, sin = factor * np.cos(angle), factor * np.sin(angle)
        arc = bend * max(progress - 1, 0)
        move = scale * progress * np.array(
            [np.cos(arc) * shift[0] - np.sin(arc) * shift[1], np.sin(arc) * shift[0] + np.cos(arc) * shift[1]]
        )
        similarity = np.array([[cos, -sin, move[0]], [sin, cos, move[1]], [0, 0, 1]])
        perspective = np.eye(3)
        perspective[2, :2] = np.clip(scale * turned * tilt, -0.15 / radius, 0.15 / radius)
        return back @ similarity @ perspective @ to_centre

    points, scale = _grid(centre, radius), magnitude
    for _ in range(2):  # the displacement is nearly linear in the scale
        scale *= magnitude / max(_mean_displacement(at(1, 1, scale), points), 1e-6)
    return np.stack([at(p, q, scale) for p, q in zip(along, around)])


def _elastic(rng: np.random.Generator, frames: int, radius: float, magnitude: float) -> tuple[np.ndarray, np.ndarray]:
    """Plane waves (WAVES, 5) and gains (T,) of an elastic field of at most `magnitude` px, with Lipschitz constant < MAX_LIPSCHITZ."""
    lengths = np.maximum(rng.uniform(0.7, 2.5, WAVES) * radius, 24.0)
    directions, headings = rng.uniform(0, 2 * np.pi, (2, WAVES))
    vectors = 2 * np.pi / lengths[:, None] * np.stack([np.cos(directions), np.sin(directions)], axis=1)
    amplitudes = rng.uniform(0.3, 1, WAVES)[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    sizes = np.linalg.norm(amplitudes, axis=1)
    steepness = float((sizes * np.linalg.norm(vectors, axis=1)).sum())
    amplitudes *= min(rng.uniform(0.2, 1) * MAX_LIPSCHITZ / steepness, magnitude / sizes.sum())
    waves = np.concatenate([amplitudes, vectors, rng.uniform(0, 2 * np.pi, (WAVES, 1))], axis=1)
    gains = _schedule(rng, frames)
    return waves, gains / gains[-1]


# ---------------------------------------------------------------- appearance


def _texture(rng: np.random.Generator, settings: SceneSettings, centre: np.ndarray) -> dict[str, object]:
    """Choose a texture, its placement and its colours, as keyword arguments of `Layer`."""
    procedural = settings.photographs == 0 or rng.random() < settings.procedural_share
    index = settings.photographs + rng.integers(settings.procedurals) if procedural else rng.integers(settings.photographs)
    # A step of at most 1.1 texel per frame px keeps bilinear sampling free of aliasing; coarser use goes through halving.
    halvings = int(rng.choice([0, 1], p=[0.65, 0.35]))
    step = _log_uniform(rng, 0.5, 1.1) * 2**halvings
    angle = rng.uniform(0, 2 * np.pi) if procedural or rng.random() < 0.2 else rng.normal(0, 0.1)
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) * np.array([[rng.choice([-1, 1])], [1]])
    height, width = TEXTURE_SIZE
    target = rng.uniform(0.2, 0.8, 2) * (width, height)
    texture_map = np.concatenate([linear, (target - linear @ centre)[:, None]], axis=1)

    saturation = rng.uniform(0.2, 1.3)
    luma = np.array([0.299, 0.587, 0.114])
    gains = np.exp(rng.normal(0, 0.12, 3))
    contrast = _log_uniform(rng, 0.05, 0.4) if rng.random() < 0.12 else rng.uniform(0.6, 1.3)
    linear = contrast * gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * luma)
    middle = rng.uniform(85, 165) if contrast > 0.5 else rng.uniform(30, 225)
    offset = middle - contrast * 118 * gains  # 118: the mean of natural photographs
    return {
        "texture": int(index), "halvings": halvings, "texture_map": texture_map,
        "colour": np.concatenate([linear, offset[:, None]], axis=1),
    }  # fmt: skip


@dataclass
class _Outline:
    """What `Layer` calls shape, shape_parameters and box."""

    shape: Shape
    parameters: np.ndarray
    box: np.ndarray


_UNBOUNDED = np.array([[-np.inf, -np.inf], [np.inf, np.inf]])
_EVERYTHING = _Outline(Shape.EVERYTHING, np.zeros(24), _UNBOUNDED)


def _polygon(planes: np.ndarray, box: np.ndarray = _UNBOUNDED) -> _Outline:
    """The intersection of at most 8 half-planes (N, 3): inside where a x + b y + c <= 0."""
    parameters = np.tile([0.0, 0.0, -1e6], 8)  # the unused ones hold everywhere
    planes = planes / np.linalg.norm(planes[:, :2], axis=1, keepdims=True)  # so that this is the distance in px
    parameters[: planes.size] = planes.reshape(-1)
    return _Outline(Shape.POLYGON, parameters, box)


def _object_outline(rng: np.random.Generator, settings: SceneSettings, centre: np.ndarray, radius: float) -> _Outline:
    """A random outline of about `radius` px around `centre`."""
    kind = rng.choice(["blob", "polygon", "bars"], p=[0.46, 0.36, 0.18])
    angle, aspect = rng.uniform(0, np.pi), _log_uniform(rng, 0.35, 1)
    if kind == "polygon":
        corners = int(rng.integers(3, 8))
        angles = angle + 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
        circle = np.stack([np.cos(angles), aspect * np.sin(angles)], axis=1)  # points on an ellipse: their polygon is convex
        turn = rng.uniform(0, np.pi)
        points = centre + 1.3 * radius * circle @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        edges = np.roll(points, -1, axis=0) - points
        normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1)
        planes = np.concatenate([normals, -(normals * points).sum(1, keepdims=True)], axis=1)
        return _polygon(planes, np.stack([points.min(0), points.max(0)]))
    parameters = np.zeros(24)
    if kind == "blob":
        decay = np.array([1, 1, 0.8, 0.8, 0.5, 0.5, 0.3, 0.3])
        harmonics = rng.normal(0, 0.13, 8) * decay * (rng.random() < 0.6)
        hole = rng.uniform(0.25, 0.6) * (rng.random() < 0.15)
        longest = radius / np.sqrt(aspect)
        parameters[:14] = [*centre, angle, longest, radius * np.sqrt(aspect), hole, *harmonics]
        reach = longest * (1 + np.hypot(harmonics[::2], harmonics[1::2]).sum())
        return _Outline(Shape.BLOB, parameters, np.stack([centre - reach, centre + reach]))
    # Bars: one pole, a fence, or a grid, 1 to 4 px thick (in proportion in frames wider than 400 px).
    thickness = _log_uniform(rng, 1, 4) * max(1.0, settings.width / 400)
    single, crossing = rng.choice([(True, False), (False, False), (False, True)], p=[0.5, 0.3, 0.2])
    period = 1e5 if single else _log_uniform(rng, 3, 8) * thickness
    length, breadth = 2 * radius, radius
    parameters[:8] = [*centre, angle, breadth, length, period, thickness / 2, crossing]
    reach = np.hypot(length, breadth)
    return _Outline(Shape.BARS, parameters, np.stack([centre - reach, centre + reach]))


def _layer_count(rng: np.random.Generator, settings: SceneSettings) -> int:
    """0 to max_layers, about 3 on average: few things are the rule, many the exception."""
    return min(int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8], p=[0.06, 0.14, 0.18, 0.2, 0.16, 0.1, 0.07, 0.05, 0.04])), settings.max_layers)


def _radius(rng: np.random.Generator, settings: SceneSettings) -> float:
    """Half the size of an object: its size is log-uniform from 7 % to 70 % of the frame."""
    return 0.5 * _log_uniform(rng, 0.07, 0.7) * float(np.sqrt(settings.height * settings.width))


# ---------------------------------------------------------------- scenes


def _still(settings: SceneSettings) -> np.ndarray:
    return np.tile(np.eye(3), (settings.frames, 1, 1))


def _finish(
    rng: np.random.Generator, settings: SceneSettings, homographies: np.ndarray, outline: _Outline,
    centre: np.ndarray, radius: float, elastic_px: float,
) -> Layer:  # fmt: skip
    """Complete a layer with elastic motion (none for elastic_px = 0) and texture."""
    if elastic_px > 0:
        waves, gains = _elastic(rng, settings.frames, radius, elastic_px)
    else:
        waves, gains = np.zeros((WAVES, 5)), np.zeros(settings.frames)
    texture = _texture(rng, settings, centre)
    return Layer(homographies, waves, gains, outline.shape, outline.parameters, outline.box, **texture)  # type: ignore[arg-type]


def _object(rng: np.random.Generator, settings: SceneSettings, homographies: np.ndarray, centre: np.ndarray, radius: float,
            elastic_px: float) -> Layer:
    """An object that moves by `homographies`, placed so that it passes `centre` half-way through the clip, not at its start: else
    fast objects would be gone from most of the later frames."""
    travelled = apply_homography(homographies[-1], centre[None])[0] - centre
    start = centre - rng.uniform(0, 1) * travelled
    outline = _object_outline(rng, settings, start, radius)
    return _finish(rng, settings, homographies, outline, start, radius, elastic_px)


def _background(rng: np.random.Generator, settings: SceneSettings, homographies: np.ndarray, elastic_px: float) -> Layer:
    middle = np.array([settings.width, settings.height]) / 2
    return _finish(rng, settings, homographies, _EVERYTHING, middle, settings.width / 3, elastic_px)


def _planar_scene(rng: np.random.Generator, settings: SceneSettings, static: bool = False) -> list[Layer]:
    """Everything moves in the image plane: background, and layers with motions of their own, half of them carried by the background's."""
    size = np.array([settings.width, settings.height])
    low, high = settings.min_displacement_px, settings.max_displacement_px
    magnitude = _log_uniform(rng, low, high)
    still_background = static or rng.random() < 0.2

    def elastic_px(of: float, share: float) -> float:
        return 0.0 if static or rng.random() > share else of * rng.uniform(0.2, 1)

    if still_background:
        background = _still(settings)
    else:
        background = _planar_motion(rng, settings.frames, size / 2, settings.width / 2, magnitude)
    layers = [_background(rng, settings, background, 0.0 if still_background else elastic_px(magnitude, 0.3))]
    count = _layer_count(rng, settings)
    if still_background and not static:  # something has to move
        count = max(count, min(1, settings.max_layers))
    for _ in range(count):
        centre, radius = rng.uniform(0, 1, 2) * size, _radius(rng, settings)
        carried = rng.random() < 0.5 and not still_background
        own = _log_uniform(rng, low, min(magnitude, high / 2) + low) if carried else _log_uniform(rng, low, high)
        if static or rng.random() < 0.06:  # also: dirt on the lens, a bonnet, a caption
            homographies = _still(settings)
        else:
            homographies = _planar_motion(rng, settings.frames, centre, radius, own)
            if carried:
                homographies = background @ homographies
        layers.append(_object(rng, settings, homographies, centre, radius, elastic_px(own, 0.25)))
    return layers


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix of a rotation vector in rad (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@dataclass
class _Plane:
    """A plane normal . X = distance in the first camera's frame (unit of length: the camera's height over the ground)."""

    normal: np.ndarray
    distance: float
    points: np.ndarray  # (N, 2) pixels on it, for the scale of the motion
    centre: np.ndarray
    radius: float
    outline: _Outline | None = None  # None: an object's, drawn later


def _ego_motion_scene(rng: np.random.Generator, settings: SceneSettings) -> list[Layer]:
    """A camera moves past planes: a far background, often a ground and a wall as on a road, and upright boards at various depths."""
    size = np.array([settings.width, settings.height])
    focal = rng.uniform(0.6, 1.3) * settings.width
    intrinsics = np.array([[focal, 0, size[0] * rng.uniform(0.4, 0.6)], [0, focal, size[1] * rng.uniform(0.4, 0.6)], [0, 0, 1]])
    rays = np.linalg.inv(intrinsics)
    horizon = size[1] * rng.uniform(0.2, 0.6)
    far = _log_uniform(rng, 12, 200)
    planes = [_Plane(np.array([0, 0, 1.0]), far, _grid(size / 2, size / 2), size / 2, settings.width / 3, _EVERYTHING)]
    ground_normal = np.array([rng.normal(0, 0.05), 1, (intrinsics[1, 2] - horizon) / focal])
    has_ground = rng.random() < 0.7
    if has_ground:
        inside = ground_normal @ rays - np.array([0, 0, 1 / min(far, 30)])  # nearer than the background
        middle = np.array([size[0] / 2, (horizon + size[1]) / 2])
        points = _grid(middle, (size[0] / 2, (size[1] - horizon) / 3))
        planes.append(_Plane(ground_normal, 1.0, points, middle, settings.width / 3, _polygon(-inside[None])))
    if rng.random() < 0.35:
        side = rng.choice([-1.0, 1.0])
        normal, distance = np.array([side, 0, rng.uniform(-0.1, 0.1)]), rng.uniform(1.2, 5)
        bounds = [normal @ rays - np.array([0, 0, distance / min(far, rng.uniform(8, 30))])]
        if has_ground:  # it stands on the ground: ground_normal . X < 1
            bounds.append(normal @ rays / distance - ground_normal @ rays)
        if rng.random() < 0.5:  # and ends at some height
            bounds.append(normal @ rays * rng.uniform(0.5, 4) / distance + np.array([0, 1, 0]) @ rays)
        middle = np.array([size[0] * (0.5 + 0.4 * side), horizon])
        planes.append(_Plane(normal, distance, _grid(middle, size / 10), middle, settings.width / 4, _polygon(-np.array(bounds))))
    boards = []
    for _ in range(min(_layer_count(rng, settings), settings.max_layers + 1 - len(planes))):
        radius, depth = _radius(rng, settings), _log_uniform(rng, 1.5, 0.8 * far)
        centre = rng.uniform(0, 1, 2) * size
        if has_ground and rng.random() < 0.6:  # stands on the ground
            centre[1] = horizon + focal / depth - rng.uniform(0.6, 1) * radius
        normal = np.array([*rng.uniform(-0.3, 0.3, 2), 1])
        distance = float(normal @ rays @ [*centre, 1]) * depth
        boards.append((depth, _Plane(normal, distance, _grid(centre, radius / 2), centre, radius)))
    planes += [plane for _, plane in sorted(boards, key=lambda board: -board[0])]

    magnitude = _log_uniform(rng, settings.min_displacement_px, settings.max_displacement_px)
    heading = rng.choice(["forward", "lateral", "any"], p=[0.5, 0.25, 0.25])
    spread = {"forward": (0.12, 0.06, 1), "lateral": (1, 0.3, 0.1), "any": (1, 1, 1)}[heading]
    translation = rng.normal(0, 1, 3) * spread
    translation[2] = -abs(translation[2]) - 0.3 if heading == "forward" else translation[2]  # points come nearer
    rotation = rng.normal(0, 1, 3) * (1, 1, 0.5) * rng.choice([0.0, 0.01, 0.1])
    shifts, turns = _schedule(rng, settings.frames), _schedule(rng, settings.frames)
    nearest = min([depth for depth, _ in boards] + [focal / (size[1] - horizon) if has_ground else far])
    # The camera may not come near to or pass through a plane, nor may things pass faster than half a frame width per frame: beyond
    # that textures are mere smears.
    approach = max(abs(float(plane.normal @ translation)) / abs(plane.distance) for plane in planes) * shifts[-1]
    passing = float(np.linalg.norm(translation[:2])) * focal / (0.5 * settings.width * nearest)
    closing = max(-translation[2], 0) * shifts[-1] / (0.6 * nearest)
    farthest = 1 / max(approach / 0.5, passing, closing, 1e-6)

    def at(shift: float, turn: float, scale: float) -> list[np.ndarray]:
        """Homographies of all planes."""
        turned = _rotation(turn * min(scale, 3.0) * rotation)
        moved = shift * min(scale, farthest) * translation
        return [intrinsics @ (turned + np.outer(moved, plane.normal) / plane.distance) @ rays for plane in planes]

    scale = 0.1
    for _ in range(5):
        typical = np.median([_mean_displacement(h, plane.points) for h, plane in zip(at(1, 1, scale), planes)])
        scale *= float(np.clip(magnitude / max(typical, 1e-6), 0.1, 10)) ** 0.8
    motions = np.stack([at(p, q, scale) for p, q in zip(shifts, turns)], axis=1)  # (planes, T, 3, 3)
    layers = []
    for plane, homographies in zip(planes, motions):
        if plane.outline is not None:
            layers.append(_finish(rng, settings, homographies, plane.outline, plane.centre, plane.radius, 0.0))
            continue
        elastic_px = 0.0
        if rng.random() < 0.3:  # moves by itself as well
            own = _log_uniform(rng, settings.min_displacement_px, settings.max_displacement_px / 2)
            homographies = homographies @ _planar_motion(rng, settings.frames, plane.centre, plane.radius, own)
            elastic_px = own * 0.5 * (rng.random() < 0.4)
        layers.append(_object(rng, settings, homographies, plane.centre, plane.radius, elastic_px))
    return layers
