# SPDX-License-Identifier: Apache-2.0
"""What the procedural generator's scenes are made of: layers, and objects of one or several layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from training.appearance import OBJECT, USUAL, Look, Outline, Texture, bars, draw_texture, object_outline, rectangle
from training.motion import WAVES, apply_homography, elastic, log_uniform, pick

FURNITURE_SHARE = 0.1  # of objects that do not bend


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
class LayerSettings:
    """What ``draw_scene`` needs to know; see ``ProceduralGenerator`` for the meaning of each."""

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


def layer_count(rng: np.random.Generator, settings: LayerSettings) -> int:
    """0 to max_layers, about 3 on average: few things are the rule, many the exception."""
    weights = {0: 0.06, 1: 0.14, 2: 0.18, 3: 0.2, 4: 0.16, 5: 0.1, 6: 0.07, 7: 0.05, 8: 0.04}
    return min(pick(rng, weights), settings.max_layers)


def object_radius(rng: np.random.Generator, settings: LayerSettings) -> float:
    """Half the size of an object: its size is log-uniform from 7 % to 70 % of the frame."""
    return 0.5 * log_uniform(rng, 0.07, 0.7) * float(np.sqrt(settings.height * settings.width))


def still(settings: LayerSettings) -> np.ndarray:
    """Homographies (frames, 3, 3) that move nothing."""
    return np.tile(np.eye(3), (settings.frames, 1, 1))


def complete(
    rng: np.random.Generator, settings: LayerSettings, homographies: np.ndarray, outline: Outline,
    centre: np.ndarray, radius: float, elastic_px: float, look: Look = USUAL,
) -> Layer:  # fmt: skip
    """Complete a layer with elastic motion (none for elastic_px = 0) and texture."""
    if elastic_px > 0:
        waves, gains = elastic(rng, settings.frames, radius, elastic_px)
    else:
        waves, gains = np.zeros((WAVES, 5)), np.zeros(settings.frames)
    texture = draw_texture(rng, settings.photographs, settings.patterns, settings.pattern_share, centre, look)
    return Layer(homographies, waves, gains, outline, texture)


def object_layers(
    rng: np.random.Generator, settings: LayerSettings, homographies: np.ndarray, centre: np.ndarray, radius: float,
    elastic_px: float,
) -> list[Layer]:  # fmt: skip
    """An object that moves by ``homographies`` and passes ``centre`` at some time during the clip.

    If it always started there, fast objects would be gone from most of the later frames. Some rigid ones have several
    parts, outlines and textures of their own with one motion, as a chair has a seat and legs.
    """
    travelled = apply_homography(homographies[-1], centre[None])[0] - centre
    start = centre - rng.uniform(0, 1) * travelled
    if elastic_px == 0 and rng.random() < FURNITURE_SHARE:
        return _furniture(rng, settings, homographies, start, radius)
    outline = object_outline(rng, settings.width, start, radius)
    layers = [complete(rng, settings, homographies, outline, start, radius, elastic_px, OBJECT)]
    if elastic_px == 0 and rng.random() < 0.3:
        for _ in range(int(rng.integers(1, 4))):
            place, size = start + rng.normal(0, 0.6, 2) * radius, radius * log_uniform(rng, 0.3, 1)
            outline = object_outline(rng, settings.width, place, size)
            layers.append(complete(rng, settings, homographies, outline, place, size, 0.0, OBJECT))
    return layers


def _furniture(
    rng: np.random.Generator, settings: LayerSettings, homographies: np.ndarray, centre: np.ndarray, radius: float
) -> list[Layer]:
    """A large plain body on thin legs, often with a back of slats, as chairs and tables have."""
    radius = max(radius, 0.1 * float(np.sqrt(settings.height * settings.width)))
    angle = rng.normal(0, 0.2)
    down = np.array([-np.sin(angle), np.cos(angle)])
    body = np.array([rng.uniform(0.5, 1), log_uniform(rng, 0.12, 0.6)]) * radius
    look = Look(0.85, (0.02, 0.25), OBJECT.level)
    first = complete(rng, settings, homographies, rectangle(centre, body, angle), centre, radius, 0.0, look)
    layers = [first]
    for direction in (1, -1) if rng.random() < 0.6 else (1,):
        count = int(rng.integers(2, 5))
        thickness = log_uniform(rng, 1, 5) * max(1.0, settings.width / 400)
        half = np.array([0.9 * body[0], radius * rng.uniform(0.3, 0.7)])
        place = centre + direction * (body[1] + half[1]) * down
        outline = bars(
            place, angle, half + np.array([thickness, 0]), 2 * half[0] / (count - 1), thickness,
            crossing=direction < 0 and rng.random() < 0.3, offset=0.5 * (count % 2 == 0),
        )  # fmt: skip
        other = complete(rng, settings, homographies, outline, place, radius, 0.0, look)
        layers.append(replace(other, texture=first.texture) if rng.random() < 0.6 else other)
    return layers
