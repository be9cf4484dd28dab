# SPDX-License-Identifier: Apache-2.0
"""Textures that the procedural generator paints with: photographs from a folder, and patterns made by program."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from training.settings import Dice

TEXTURE_SIZE = (320, 480)  # height, width in px
PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

PATTERN_SHARE = 0.25  # of procedural textures where there are photographs, too
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
MEAN_LEVEL = 118  # of natural photographs

_COORDINATES = np.mgrid[0 : TEXTURE_SIZE[0], 0 : TEXTURE_SIZE[1]].astype(np.float32)  # y, x

logger = logging.getLogger(__name__)


def load_photographs(folder: str | Path, limit: int = 2000) -> torch.Tensor:
    """Read the photographs in ``folder`` and below it into one (N, 3, 320, 480) uint8 RGB tensor.

    Of more than ``limit`` pictures, which take 0.9 GB, an even selection is taken, and a warning says so.

    :raises FileNotFoundError: if the folder is missing.
    :raises ValueError: if no picture in it can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"texture folder {str(folder)!r} does not exist; without one, textures are procedural")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOGRAPH_SUFFIXES)
    if len(paths) > limit:
        logger.warning("texture folder %s holds %d pictures; using an even selection of %d", folder, len(paths), limit)
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    photographs, unreadable = [], []
    for path in paths:
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if picture is None:
            unreadable.append(path.name)
        else:
            photographs.append(_fit(picture)[:, :, ::-1])
    if not photographs:
        found = f"none of its {len(paths)} picture files can be read" if paths else "it holds no picture files"
        raise ValueError(f"texture folder {str(folder)!r}: {found}; expected {', '.join(PHOTOGRAPH_SUFFIXES)}")
    if unreadable:
        logger.warning("texture folder %s: skipped %d unreadable, first %s", folder, len(unreadable), unreadable[0])
    return torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2).contiguous()


def procedural_textures(count: int, seed: int = 0) -> torch.Tensor:
    """Make ``count`` patterns as one (count, 3, 320, 480) uint8 RGB tensor, a pure function of (count, seed).

    Dead leaves have statistics close to those of natural images (Lee, Mumford, Huang, IJCV 2001).
    """
    makers = (_dead_leaves, _noise_texture, _repeated_pattern, _dead_leaves, _noise_texture, _near_flat)
    rng = np.random.default_rng([seed, 0x7E7])
    pictures = [np.clip(makers[i % len(makers)](rng), 0, 255).astype(np.uint8) for i in range(count)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def halve(textures: torch.Tensor) -> torch.Tensor:
    """Halve (N, 3, H, W) uint8 textures in both directions by averaging 2 x 2 pixels."""
    return torch.cat([F.avg_pool2d(part.float(), 2).round_().byte() for part in textures.split(32)])


def _fit(picture: np.ndarray) -> np.ndarray:
    """Scale an (H, W, 3) picture until it covers the texture size, and crop its middle; portraits are turned first."""
    height, width = TEXTURE_SIZE
    if picture.shape[0] > picture.shape[1]:
        picture = cv2.rotate(picture, cv2.ROTATE_90_COUNTERCLOCKWISE)
    scale = max(height / picture.shape[0], width / picture.shape[1])
    size = (max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale)))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,), mostly muted, as in photographs."""
    return np.clip(rng.uniform(20, 235) + rng.normal(0, 35, 3), 0, 255)


def _noise(rng: np.random.Generator, coarsest: int, octaves: int, roughness: float, channels: int = 1) -> np.ndarray:
    """Multi-octave noise (H, W, channels) of unit standard deviation; the first has ``coarsest`` cells across."""
    height, width = TEXTURE_SIZE
    field = np.zeros((height, width, channels), np.float32)
    for octave in range(octaves):
        if (cells := coarsest * 2**octave) > width:
            break
        grid = rng.standard_normal((max(2, cells * height // width), cells, channels)).astype(np.float32)
        finer = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        field += roughness**octave * finer.reshape(field.shape)
    return (field - field.mean()) / (field.std() + 1e-6)


def _noise_texture(rng: np.random.Generator) -> np.ndarray:
    field = _noise(rng, int(rng.integers(3, 12)), int(rng.integers(4, 8)), rng.uniform(0.5, 0.95))
    tint = _noise(rng, int(rng.integers(2, 6)), 3, 0.5, channels=3)
    if rng.random() < 0.3:  # ridges, as in marble or bark
        field = 2 * np.abs(field) - 1
    return _colour(rng) + rng.uniform(20, 60) * field + rng.uniform(0, 25) * tint


def _near_flat(rng: np.random.Generator) -> np.ndarray:
    (ys, xs), (height, width) = _COORDINATES, TEXTURE_SIZE
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * (xs / width - 0.5) + np.sin(angle) * (ys / height - 0.5))[:, :, None]
    return _colour(rng) + ramp * rng.normal(0, 50, 3) + rng.uniform(0.5, 5) * _noise(rng, 24, 5, 0.9)


def _dead_leaves(rng: np.random.Generator) -> np.ndarray:
    height, width = TEXTURE_SIZE
    picture = np.full((height, width, 3), _colour(rng), np.uint8)
    smallest = rng.uniform(2, 6)
    for _ in range(int(rng.integers(250, 700))):
        radius = smallest / np.sqrt(rng.uniform((smallest / 120) ** 2, 1))  # density ~ r^-3
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        aspect, angle = rng.uniform(0.3, 1), rng.uniform(0, 180)
        colour = tuple(int(c) for c in _colour(rng))
        if rng.random() < 0.5:
            axes = (max(1, int(radius)), max(1, int(radius * aspect)))
            cv2.ellipse(picture, (int(x), int(y)), axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
        else:
            corners = cv2.boxPoints(((x, y), (2 * radius, 2 * radius * aspect), angle))
            cv2.fillConvexPoly(picture, np.round(corners).astype(np.int32), colour, cv2.LINE_AA)
    return picture + _noise(rng, 40, 4, 0.9) * rng.uniform(0, 14)


def _repeated_pattern(rng: np.random.Generator) -> np.ndarray:
    ys, xs = _COORDINATES
    period_x, period_y = np.exp(rng.uniform(np.log(10), np.log(60), 2))
    kind = rng.integers(4)
    sharpness = min(period_x, period_y) / np.pi  # edges about one pixel wide
    if kind == 0:
        wave = np.sin(2 * np.pi * xs / period_x) * np.sin(2 * np.pi * ys / period_y)
    elif kind == 1:
        wave = np.sin(2 * np.pi * xs / period_x) + rng.uniform(-0.7, 0.7)
    elif kind == 2:
        wave = np.cos(2 * np.pi * xs / period_x) + np.cos(2 * np.pi * ys / period_x) - rng.uniform(0.2, 1.4)
    else:  # bricks: every second row is shifted by half a brick
        shift = np.floor(ys / period_y) % 2 * 0.5
        upright = np.abs(np.sin(np.pi * (xs / (2 * period_y) + shift)))
        wave = np.minimum(upright, np.abs(np.sin(np.pi * ys / period_y))) - 0.15
    mix = np.clip(0.5 + 0.5 * sharpness * wave, 0, 1)[:, :, None]
    flaws = rng.choice([0.0, 3.0, 12.0]) * _noise(rng, 12, 5, 0.8)  # perfect repetition exists, but most has some dirt
    return _colour(rng) * mix + _colour(rng) * (1 - mix) + flaws


@dataclass(frozen=True)
class Look:
    """How often a kind of surface is plain, and what it then looks like."""

    plain_share: float = 0.12
    contrast: tuple[float, float] = (0.05, 0.4)  # of plain ones, beside that of photographs
    level: tuple[float, float] = (30, 225)  # their mean grey level


USUAL = Look()
OBJECT = Look(0.3)  # furniture, walls, car bodies
SKY = Look(1.0, (0.01, 0.15), (130, 252))
ROAD = Look(0.6, (0.12, 0.5), (60, 170))
THIN = Look(0.7, (0.05, 0.3), (10, 240))  # poles, wires


@dataclass(frozen=True)
class Texture:
    """What a layer is painted with."""

    index: int  # in the bank
    halvings: int  # how many times it is halved in size before use
    placement: np.ndarray  # (2, 3), canonical px -> px of the texture before it is halved
    colour: np.ndarray  # (3, 4): linear map of the texture's RGB, and offset


def draw_texture(rng: Dice, centre: np.ndarray, look: Look = USUAL) -> Texture:
    """Choose a photograph, or with probability ``PATTERN_SHARE`` a pattern; its middle lies near ``centre`` (px)."""
    photographs, patterns = rng.settings.photographs, rng.settings.patterns
    pattern = photographs == 0 or rng.random() < PATTERN_SHARE
    index = photographs + rng.integers(patterns) if pattern else rng.integers(photographs)
    # At most 1.1 texels per frame px keep bilinear sampling free of aliasing; coarser use goes through halving.
    halvings = int(rng.random() < 0.35)
    step = rng.log_uniform(0.55, 1.1) * 2**halvings
    angle = rng.uniform(0, 2 * np.pi) if pattern or rng.random() < 0.2 else rng.normal(0, 0.1)
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) * np.array([[rng.sign()], [1]])
    height, width = TEXTURE_SIZE
    target = rng.uniform(0.2, 0.8, 2) * (width, height)
    placement = np.concatenate([linear, (target - linear @ centre)[:, None]], axis=1)

    saturation = rng.uniform(0.2, 1.3)
    gains = np.exp(rng.normal(0, 0.12, 3))
    plain = rng.random() < look.plain_share
    contrast = rng.log_uniform(*look.contrast) if plain else rng.uniform(0.6, 1.3)
    linear = contrast * gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    middle = rng.uniform(*look.level) if plain else rng.uniform(85, 165)
    offset = middle - contrast * MEAN_LEVEL * gains
    colour = np.concatenate([linear, offset[:, None]], axis=1)
    return Texture(int(index), halvings, placement, colour)
