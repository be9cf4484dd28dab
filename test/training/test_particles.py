# SPDX-License-Identifier: Apache-2.0
"""Particle images of the procedural generator: the particles do what the flow says, at every pixel and frame."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from training.generator import ProceduralGenerator
from training.particles import (
    MAX_GRADIENT,
    PARTICLE_RANGE_PX,
    FlowField,
    ParticleScene,
    draw_field,
    draw_particles,
    render_particles,
)
from training.settings import Dice, SceneSettings

HEIGHT, WIDTH = 88, 120


def draw(seed: int, frames: int = 3) -> ParticleScene:
    return draw_particles(Dice(SceneSettings(HEIGHT, WIDTH, 48.0, frames=frames), seed))


def uniform(u: float, v: float, frames: int) -> FlowField:
    none = np.zeros
    return FlowField(
        np.array([u, v]), none((2, 2)), none(2), none((0, 4)), none((0, 5)), none(8), np.ones(frames - 1), none(2)
    )


def test_particles_move_by_the_flow_of_their_frame() -> None:
    """Why: flow at the pixels and motion of the particles come from one field; through all frames they must agree."""
    for seed in range(12):
        scene = draw(seed, frames=4)
        flow = render_particles(scene, HEIGHT, WIDTH, 200.0).flow[0].numpy()
        for frame in range(3):
            here, there = scene.positions[frame], scene.positions[frame + 1]
            x, y = here.T
            inside = (x > 1) & (x < WIDTH - 2) & (y > 1) & (y < HEIGHT - 2)
            seen = [cv2.remap(part, *here.astype(np.float32)[:, None].T, cv2.INTER_LINEAR)[0] for part in flow[frame]]
            off = np.hypot(*(there - here - np.stack(seen, 1)).T)[inside]
            moved = off < 3  # the others left the laser sheet and came in elsewhere
            assert moved.mean() > 0.5
            assert np.quantile(off[moved], 0.9) < 0.02  # bilinear between pixels
            assert scene.field.gains[frame] > 0


def test_the_next_frame_looked_up_along_the_flow_is_this_one() -> None:
    """Why: the same promise on the pictures. Half a pixel off must fail the check, else it is worth nothing."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    right, wrong = [], []
    for seed in range(40):
        clip = render_particles(draw(seed), HEIGHT, WIDTH, 200.0)
        images, flow, visible = clip.images[0, :, 0].numpy(), clip.flow[0].numpy(), ~clip.occluded[0].numpy()
        for pair in range(2):
            for errors, offset in ((right, 0.0), (wrong, 0.5)):
                maps = x + flow[pair, 0] + offset, y + flow[pair, 1]
                warped = cv2.remap(images[pair + 1], *maps, cv2.INTER_CUBIC)
                errors.append(np.corrcoef(warped[visible[pair]], images[pair][visible[pair]])[0, 1])
    # Some clips lose many particles from frame to frame, as thin laser sheets do; no clip is right by chance.
    assert np.quantile(right, 0.4) > 0.97
    assert min(right) > 0.6
    assert (np.array(right) > np.array(wrong)).all()


def test_a_known_flow_moves_the_picture_exactly() -> None:
    """Spots are integrated over the pixels, so a shift of whole pixels repeats the picture to rounding."""
    places = np.random.default_rng(0).uniform(0, 80, (200, 2))
    scene = ParticleScene(
        uniform(5, -3, 2), np.stack([places, places + np.array([5, -3])]), np.full((2, 200), 90.0), np.full(200, 0.7),
        np.zeros(6),
    )  # fmt: skip
    clip = render_particles(scene, HEIGHT, WIDTH, 50.0)
    first, second = clip.images[0, :, 0]
    torch.testing.assert_close(second[:-3, 5:], first[3:, :-5], atol=1e-3, rtol=0)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[:3] = expected[:, -5:] = True  # what flows out of the frame, and nothing else, is occluded
    assert torch.equal(clip.occluded[0, 0], expected)
    torch.testing.assert_close(clip.flow[0, 0, 0], torch.full((HEIGHT, WIDTH), 5.0))
    assert not render_particles(scene, HEIGHT, WIDTH, 5.5).valid.any()  # 5.8 px are beyond this limit
    # One spot alone: its brightness at the middle and its mass are those of the Gaussian.
    spot = ParticleScene(
        uniform(0, 0, 2), np.full((2, 1, 2), 40.0), np.full((2, 1), 100.0), np.full(1, 1.2), np.zeros(6)
    )
    image = render_particles(spot, HEIGHT, WIDTH, 50.0).images[0, 0, 0]
    assert image[40, 40] == pytest.approx(100, rel=0.06)
    assert float(image.sum()) == pytest.approx(100 * 2 * np.pi * 1.2**2, rel=0.01)


def test_fields_are_smooth_and_fill_the_range() -> None:
    """Why: a flow that folds has no answer, and slow flow must not vanish beside fast."""
    y, x = (torch.from_numpy(a).float() for a in np.mgrid[0:HEIGHT, 0:WIDTH])
    means = []
    for seed in range(120):
        rng = Dice(SceneSettings(HEIGHT, WIDTH, 48.0, frames=2), seed)
        low, high = PARTICLE_RANGE_PX
        wanted = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        u, v = draw_field(rng, wanted)(x, y, 0)
        steepest = max(float(part.diff(dim=dim).abs().max()) for part in (u, v) for dim in (0, 1))
        assert steepest < 1.35 * MAX_GRADIENT
        means.append(float(torch.hypot(u, v).mean()))
        assert means[-1] < 1.1 * wanted
    assert np.mean(np.array(means) < 1) > 0.25
    assert np.mean(np.array(means) > 4) > 0.15


def test_pictures_are_grey_dark_and_full_of_particles() -> None:
    """Why: they have to resemble what a PIV camera sees: a dark picture whose every part has particles, all frames."""
    generator = ProceduralGenerator(HEIGHT, WIDTH, patterns=1, static_share=0, fine_share=0, particle_share=1, frames=4)
    clip = generator.clips(range(12))
    assert clip.images.shape == (12, 4, 3, HEIGHT, WIDTH) and clip.flow.shape == (12, 3, 2, HEIGHT, WIDTH)
    assert (clip.images.amax(2) - clip.images.amin(2)).mean() < 4
    assert clip.images.flatten(1).median(1).values.max() < 80
    # No border runs empty where the fluid streams in, and frames are as full as each other.
    light = clip.images.mean(2)
    borders = torch.stack([light[..., :12].mean((-1, -2)), light[..., -12:].mean((-1, -2))], -1)
    assert (borders > 0.15 * light.mean((-1, -2)).unsqueeze(-1)).all()
    assert (light.std((-1, -2)) > 4).all()
