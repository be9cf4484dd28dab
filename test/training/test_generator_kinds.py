# SPDX-License-Identifier: Apache-2.0
"""Kinds of clips: they come in their shares, and each is what it is said to be."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generated_scenes import HEIGHT, WIDTH, banks, layer, make, shifts, warping_errors

from training import rendering
from training.flow_dataset import Clip
from training.generator import main
from training.rendering import rectangle, render
from training.scenes import KINDS, draw_scene
from training.settings import Dice


def test_kinds_come_in_their_shares_and_fine_clips_move_less_than_a_pixel() -> None:
    """Why: a share that is not kept changes what is trained without a word."""
    generator = make(static_share=0.1, particle_share=0.2, fine_share=0.3, photometric=False)
    kinds = [generator.kind(number) for number in range(1000)]
    shares = {"static": 0.1, "particles": 0.2, "fine": 0.3, "planar": 0.2, "ego-motion": 0.088, "road": 0.08}
    for kind, share in shares.items():
        assert kinds.count(kind) / 1000 == pytest.approx(share, abs=0.05), kind
    fine = generator.clips([number for number, kind in enumerate(kinds) if kind == "fine"][:12])
    lengths = fine.flow.norm(dim=2).flatten(2).median(2).values
    assert lengths.max() < 1.5
    assert 0.02 < lengths.median() < 0.6


def test_a_thin_pole_is_seen_in_the_next_frame_and_hides_what_it_comes_to_stand_before() -> None:
    """Why: a pole has background on both sides; counted as hidden for that, it would be learnt from least."""
    pole = rectangle(np.array([40.0, 36]), 0.0, (1.0, 20))
    scene = [layer(shifts((0, 0), (0, 0))), layer(shifts((0, 0), (5.4, 0)), pole)]
    clip = render(scene, banks(), HEIGHT, WIDTH, limit_px=50)
    on_pole = clip.flow[0, 0, 0] > 5
    assert on_pole[20:52].sum(1).unique().tolist() == [1] and on_pole[20:52, 40].all()
    assert not clip.occluded[0, 0][on_pole].any()
    # At 44.4 to 46.4 px it covers the centres of two pixels.
    columns = clip.occluded[0, 0, 20:52].any(0).nonzero().flatten().tolist()
    assert columns == [45, 46]


@pytest.mark.parametrize("kind", ["road", "flight"])
def test_flow_is_true_where_cameras_drive_and_fly(kind: str) -> None:
    """Why: their worlds have planes of all slopes, up to the horizon and past the camera, and vehicles of their own."""
    generator = make(photometric=False, max_displacement_px=30)
    numbers = [number for number in range(400) if generator.kind(number) == kind][:24]
    clip = generator.clips(numbers)
    errors: dict[float, list[float]] = {0.0: [], 1.0: []}
    for pair in range(2):
        occluded = clip.occluded[:, pair].float().unsqueeze(1)
        changes = clip.flow[:, pair].diff(dim=3, append=clip.flow[:, pair, :, :, -1:]).abs().amax(1, keepdim=True)
        edge = F.max_pool2d(torch.maximum(occluded, (changes > 1).float()), 5, 1, 2).squeeze(1) > 0
        inside = clip.valid[:, pair] & ~edge
        for offset, means in errors.items():
            means += warping_errors(clip, pair, inside, offset)
    right, wrong = np.array(errors[0.0]), np.array(errors[1.0])
    assert len(right) > 30
    assert np.median(right) < 0.5
    assert (right < wrong).mean() > 0.95
    if kind == "road":  # the camera drives forward: the ground at the bottom moves down, and farther than the middle
        bottom, horizon = clip.flow[:, 0, :, -6:].norm(dim=1).mean((1, 2)), clip.flow[:, 0, :, 15:40].norm(dim=1)
        assert (clip.flow[:, 0, 1, -6:].mean((1, 2)) > 0.5).float().mean() > 0.85
        assert (bottom > 2 * horizon.flatten(1).median(1).values).float().mean() > 0.6


def test_contact_sheets_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command with which users look at what training sees, here one clip of each kind."""
    folder = tmp_path / "new" / "sheets"
    assert main(["--out", str(folder), "--clips", "7", "--kind", "each", "--height", "48", "--width", "64"]) == 0
    sheet = cv2.imread(str(folder / "each_000.png"))
    assert sheet.shape == (len(KINDS) * 48, 5 * 64, 3)
    assert "each_000.png" in capsys.readouterr().out
    row = sheet[KINDS.index("particles") * 48 :][:48, : 3 * 64].astype(int)
    assert np.ptp(row, axis=2).mean() < 8 and np.median(row) < 80  # grey and dark
    assert main(["--out", str(tmp_path), "--textures", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["planar", "road", "flight"])
def test_what_is_left_out_to_save_time_is_never_in_the_picture(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a layer is drawn only where it may be; where that is too small, a wall ends in the middle of the frame."""
    generator = make(max_displacement_px=40)
    scenes = [draw_scene(Dice(generator.settings, seed), kind) for seed in range(8)]
    drawn = []
    for step in (rendering.STEP, 10**6):  # with the second, every layer is drawn everywhere
        monkeypatch.setattr(rendering, "STEP", step)
        drawn.append(Clip.join([render(scene, generator.banks, HEIGHT, WIDTH, WIDTH, shutter=0.6) for scene in scenes]))
    torch.testing.assert_close(drawn[0].flow, drawn[1].flow, atol=0, rtol=0)
    torch.testing.assert_close(drawn[0].images, drawn[1].images, atol=1e-3, rtol=0)
