# SPDX-License-Identifier: Apache-2.0
"""The procedural generator: its flow and occlusion are true, its clips reproducible, its settings obeyed or refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generated_scenes import HEIGHT, WIDTH, banks, batch, draw, layer, make, sample, shifts, warping_errors

from training.flow_dataset import Clip
from training.rendering import polygon, render
from training.scenes import elastic
from training.settings import Dice
from training.textures import load_photographs


def test_warping_by_the_flow_reproduces_the_previous_frame() -> None:
    """The promise on which all training rests. One pixel off must fail the same check, else it is worth nothing."""
    generator = make(photometric=False, static_share=0)
    errors = {0.0: [], 1.0: []}
    for index in range(8):
        clip = batch(generator, index)
        for pair in range(2):
            # Bilinear sampling mixes in what lies behind an edge: leave out the pixels next to one.
            edge = F.max_pool2d(clip.occluded[:, pair].float().unsqueeze(1), 5, 1, 2).squeeze(1) > 0
            inside = clip.valid[:, pair] & ~edge
            for offset, means in errors.items():
                means += warping_errors(clip, pair, inside, offset)
    right, wrong = np.array(errors[0.0]), np.array(errors[1.0])
    assert len(right) > 80
    assert right.mean() < 1.0
    assert np.quantile(right, 0.9) < 2.5  # the sharpest patterns lose some contrast by being sampled twice
    assert wrong.mean() > 2.5
    assert (wrong > 1.5 * right).mean() > 0.95


def test_occlusion_and_flow_of_a_known_scene() -> None:
    """A square that moves 10 px to the right over a still background: flow and occlusion are known for every pixel."""
    square = polygon(*np.array([[-1.0, 0, 60.5], [1, 0, -39.5], [0, -1, 50.5], [0, 1, -29.5]]))
    scene = [layer(shifts((0, 0), (0, 0))), layer(shifts((0, 0), (10, 0)), square)]
    clip = render(scene, banks(), HEIGHT, WIDTH, limit_px=50)
    flow, occluded = torch.zeros(2, HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    flow[0, 30:51, 40:61] = 10
    occluded[30:51, 61:71] = True  # background that the square is about to cover
    torch.testing.assert_close(clip.flow[0, 0], flow, atol=1e-3, rtol=0)
    assert torch.equal(clip.occluded[0, 0], occluded)
    assert clip.valid.all()
    # With a limit below its 10 px the square's flow is invalid, and nothing else.
    assert torch.equal(render(scene, banks(), HEIGHT, WIDTH, limit_px=8).valid[0, 0], flow[0] == 0)


def test_what_leaves_the_frame_is_occluded_and_keeps_its_flow() -> None:
    """Losses that use all pixels need true flow there; losses that warp need to know."""
    clip = render([layer(shifts((0, 0), (-7, 0)))], banks(), HEIGHT, WIDTH, limit_px=50)
    assert clip.occluded[0, 0, :, :7].all()
    assert not clip.occluded[0, 0, :, 7:].any()
    assert clip.valid.all()
    torch.testing.assert_close(clip.flow[0, 0, 0], torch.full((HEIGHT, WIDTH), -7.0), atol=1e-3, rtol=0)


def test_elastic_motion_is_inverted_to_a_fiftieth_of_a_pixel() -> None:
    """From frame 1 on, flow goes through the inverse of the elastic map, which is found by iteration."""
    waves, gains = field = elastic(Dice(make().settings, 0), radius=120, magnitude=20)
    assert np.linalg.norm(waves[:, :2], axis=1).sum() > 1  # else there is nothing to invert
    homographies = shifts((0, 0), (3, 1), (6, 2))
    clip = render([layer(homographies, elastic=field)], banks(), HEIGHT, WIDTH, limit_px=50)
    two_steps = clip.flow[:, 0] + sample(clip.flow[:, 1], clip.flow[:, 0])
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    bend = sum(np.sin(w[2] * x + w[3] * y + w[4])[None] * w[:2, None, None] for w in waves)
    exact = torch.from_numpy(bend * gains[2] + np.array([6.0, 2.0])[:, None, None])
    error = (two_steps[0].double() - exact).norm(dim=0)[~clip.occluded[0, 0]]
    assert error.max() < 0.02


def test_clips_are_a_function_of_seed_and_index() -> None:
    """Training resumes to the step without stored state: the same index must give the same clip, noise included."""
    generator = make(particle_share=0.3, fine_share=0.3)
    once = batch(generator, 3)
    batch(generator, 9)
    again, fresh = batch(generator, 3), batch(make(particle_share=0.3, fine_share=0.3), 3)
    for field in fields(Clip):
        assert torch.equal(getattr(once, field.name), getattr(again, field.name))
        assert torch.equal(getattr(once, field.name), getattr(fresh, field.name))
    for other in (batch(generator, 4), batch(make(seed=1, particle_share=0.3, fine_share=0.3), 3)):
        assert not torch.equal(once.flow, other.flow)
        assert not torch.equal(once.images, other.images)
    assert not torch.equal(once.flow[0], once.flow[1])


def test_a_clip_is_the_same_in_any_company() -> None:
    """Why: workers make clips one by one, and validation other batches; all must see the clips of these numbers."""
    generator = make(particle_share=0.5)
    whole, part = batch(generator, 1), make(particle_share=0.5).clips([8, 11])
    assert {generator.kind(number) == "particles" for number in (8, 11)} == {True, False}
    for field in fields(Clip):
        assert torch.equal(getattr(whole, field.name)[[2, 5]], getattr(part, field.name))


@pytest.mark.parametrize("frames", [2, 4])
def test_shapes_types_and_ranges(frames: int) -> None:
    """What the trainer relies on, for clips longer and shorter than the usual three frames."""
    clip = batch(make(frames=frames), 0, 5)
    assert clip.images.shape == (5, frames, 3, HEIGHT, WIDTH)
    assert clip.flow.shape == (5, frames - 1, 2, HEIGHT, WIDTH)
    assert clip.occluded.shape == clip.valid.shape == (5, frames - 1, HEIGHT, WIDTH)
    assert clip.images.dtype == clip.flow.dtype == torch.float32
    assert clip.occluded.dtype == clip.valid.dtype == torch.bool
    assert clip.images.min() >= 0
    assert clip.images.max() <= 255
    assert clip.flow.isfinite().all()  # where occluded, too
    assert clip.images.flatten(1).std(1).min() > 1  # no clip is blank


def test_static_clips_have_no_flow_but_frames_that_differ() -> None:
    """Zero flow has to be learnt under noise and changing light, and in the stated share of clips."""
    clip = batch(make(static_share=1.0), 0, 8)
    assert not clip.flow.any()
    assert not clip.occluded.any()
    assert clip.valid.all()
    assert (clip.images[:, 0] - clip.images[:, 1]).abs().flatten(1).mean(1).gt(0.1).float().mean() > 0.5
    generator = make(static_share=0.3)
    scenes = [draw(generator, seed) for seed in range(300)]
    still = [all(np.allclose(part.homographies, np.eye(3)) and not part.elastic for part in scene) for scene in scenes]
    assert 0.2 < np.mean(still) < 0.42


def test_displacements_fill_the_given_range() -> None:
    """Log-uniform: slow clips must not vanish beside fast ones, and the limits must hold but for single pixels."""
    generator = make(static_share=0, photometric=False)
    clips = [batch(generator, index, 8) for index in range(8)]
    speeds = torch.cat([clip.flow.norm(dim=2).flatten(2).mean(2).flatten() for clip in clips])
    assert (speeds < 1).float().mean() > 0.15
    assert (speeds > 8).float().mean() > 0.12
    assert speeds.max() > 0.6 * WIDTH / 4
    generator = make(static_share=0, max_displacement_px=2.0, photometric=False)
    slow = [batch(generator, index) for index in range(6)]
    assert torch.cat([clip.flow.norm(dim=2).flatten() for clip in slow]).quantile(0.98) < 6


def test_photographs_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Landscape, portrait, small and large pictures become textures of one size; broken ones are skipped, and named."""
    sizes = {"a.png": (321, 481), "b.jpg": (481, 321), "c.png": (40, 60), "d.jpg": (700, 1000)}
    for name, (height, width) in sizes.items():
        cv2.imwrite(str(tmp_path / name), np.full((height, width, 3), (10, 20, 200), np.uint8))
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    photographs = load_photographs(tmp_path)
    assert "skipped 1 unreadable, first broken.jpg" in caplog.text
    (tmp_path / "broken.jpg").unlink()
    assert photographs.shape == (4, 3, 320, 480)
    assert (photographs.float().mean((0, 2, 3)) - torch.tensor([200.0, 20, 10])).abs().max() < 3  # RGB, not BGR
    assert len(load_photographs(tmp_path, limit=2)) == 2
    generator = make(textures=tmp_path)
    assert generator.settings.photographs == 4
    scenes = [draw(generator, seed) for seed in range(30)]
    assert {part.texture.index for scene in scenes for part in scene} == set(range(4 + 6))
    assert batch(generator, 0).images.isfinite().all()


def test_bad_texture_folders_are_refused_by_name(tmp_path: Path) -> None:
    """Training for hours on other textures than those asked for would be a silent loss."""
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
        make(textures=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture files"):
        make(textures=tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="none of its 1 picture files can be read"):
        make(textures=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 1}, "frames: .* greater than or equal to 2, got 1"),
        ({"min_displacement_px": 0}, "min_displacement_px: .* greater than 0, got 0"),
        ({"max_displacement_px": 0.1}, "max_displacement_px: expected above min_displacement_px"),
        ({"max_displacement_px": float("nan")}, "max_displacement_px: .* got nan"),
        ({"max_layers": 9}, "max_layers: .* less than or equal to 8, got 9"),
        ({"static_share": 1.5}, "static_share: .* less than or equal to 1, got 1.5"),
        ({"particle_share": -0.1}, "particle_share: .* greater than or equal to 0, got -0.1"),
        ({"static_share": 0.5, "fine_share": 0.6}, r"static_share \+ particle_share \+ fine_share: .* at most 1"),
        ({"layers": 3}, "unknown key 'layers'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    """Each error says which setting, what it may be and what it was."""
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_negative_number_is_refused() -> None:
    """Python would take it for an index from the end; there is no end."""
    with pytest.raises(ValueError, match="each at least 0, got"):
        make().clips([-1])


def test_an_open_shutter_smears_along_the_motion_alone() -> None:
    """Why: motion blur must follow each surface's own motion, and leave flow and what rests as they are."""
    scene = [layer(shifts((0, 0), (8, 0)))]
    sharp, smeared = (render(scene, banks(), HEIGHT, WIDTH, 50, share) for share in (0.0, 0.5))
    assert torch.equal(sharp.flow, smeared.flow) and torch.equal(sharp.occluded, smeared.occluded)
    # 8 px in one interval, open for half of it: the mean over -2 .. 2 px.
    steps = [torch.roll(sharp.images, offset, dims=4) for offset in (-2, -1, 0, 1, 2)]
    difference = smeared.images - torch.stack(steps).mean(0)
    assert difference[..., 4:-4].abs().max() < 0.5
    still = [layer(shifts((0, 0), (0, 0)))]
    pictures = [render(still, banks(), HEIGHT, WIDTH, 50, share).images for share in (0.0, 0.5)]
    assert (pictures[0] - pictures[1]).abs().max() < 0.01


def test_layers_that_never_show_change_nothing() -> None:
    """Objects may pass by outside the frame, and planes may lie behind the camera."""
    outside = layer(shifts((0, 0), (1, 0)), polygon(*np.array([[-1.0, 0, -60], [1, 0, 80], [0, -1, 50], [0, 1, -30]])))
    behind = layer(-shifts((0, 0), (5, 0)), polygon(np.array([0.0, -1, 1000])))
    background = layer(shifts((0, 0), (0, 0)))
    alone = render([background], banks(), HEIGHT, WIDTH, limit_px=50)
    with_them = render([background, outside, behind], banks(), HEIGHT, WIDTH, limit_px=50)
    assert torch.equal(alone.images, with_them.images)
    assert torch.equal(alone.flow, with_them.flow)
    assert torch.equal(alone.occluded, with_them.occluded)
