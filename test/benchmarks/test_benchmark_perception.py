# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the nodes that use the flow: what is true, what is counted, and that they run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import motion_mask, point_tracks, time_to_contact
from benchmarks.motion_mask import REACH, counts, figures_of, sparse, truth
from deq_flow_ros.demo.scene import Scene, SceneSettings


def test_what_moves_is_counted_and_what_is_small_or_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the camera stands still, exact flow is not zero where a body moves, and there alone."""
    scene = Scene(SceneSettings(width=160, height=120))
    numbers, ignored = truth(scene, 75, 72)
    moving = np.hypot(*np.moveaxis(scene.flow(75, 72)[0], 2, 0)) > 1e-3
    assert set(np.unique(numbers)) == {0, 1, 2, 4, 5}, "ball, pendulum, truck and cube; the cart is gone by then"
    assert (((numbers > 0) | ignored) >= moving).all() and ((numbers > 0) & ~moving).mean() < 1e-3
    monkeypatch.setattr(motion_mask, "LEAST_AREA", 0.03)
    few, left_out = truth(scene, 75, 72)
    assert set(np.unique(few)) == {0, 5} and left_out[numbers == 1].all()
    mask = numbers == 1
    mask[0, :10] = True  # ten wrong pixels
    row = figures_of(counts(mask, numbers, ignored))
    ball, every = int((numbers == 1).sum()), int((numbers > 0).sum())
    assert row["precision"] == pytest.approx(ball / (ball + 10)) and row["recall"] == pytest.approx(ball / every)
    assert row["IoU"] == pytest.approx(ball / (every + 10)) and row["recall ball"] == 1.0 and row["recall cube"] == 0.0


def test_a_tracked_point_stands_for_the_pixels_around_it() -> None:
    """Texture in the left half alone: there are no points on the right, so nothing is known there."""
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8), (0, 0), 1.5)
    texture[:, 64:] = 128
    flow, _ = sparse(texture, np.roll(texture, 2, axis=1))
    assert np.nanmedian(flow[20:70, 20:50], axis=(0, 1)) == pytest.approx([2.0, 0.0], abs=0.1)
    assert np.isnan(flow[:, 64 + REACH + 5 :]).all()


def test_points_are_followed_by_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: docs/point_tracks.md quotes its tables and shows its picture. A wrong sign would lose each point."""
    monkeypatch.setattr(point_tracks, "SceneSettings", partial(SceneSettings, width=160, height=120, frames=12))
    monkeypatch.setattr(point_tracks, "STEPS", 2)
    for number in range(7):
        image = np.roll(cv2.resize(Scene().render(20), (160, 120)), 2 * number, axis=1)
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    command = ["--threads", "1", "--sequence", str(tmp_path), "--json", str(out), "--plot", str(picture)]
    assert point_tracks.main(command) == 0
    figures = json.loads(out.read_text())
    for group in ("corners of the drive", "grid of the drive", tmp_path.name):
        methods = {row["method"]: row for row in figures[group]}
        assert list(methods) == ["point_tracks", "KLT", "KLT, 11 px"]
        for row in methods.values():
            assert row["survive"] > 0.5 and row["median_px"] < 1
    for row in figures["corners of the drive"]:
        assert row["survive_of_visible"] > 0.8 and 0.5 < row["ceiling"] <= 1 and row["equal"]["mean 3"] > 0.5
    assert cv2.imread(str(picture)) is not None


def test_times_are_held_against_the_true_ones(tmp_path: Path) -> None:
    """Why: docs/time_to_contact.md quotes its table and shows its picture."""
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    assert time_to_contact.main(["--frames", "12", "--threads", "1", "--json", str(out), "--plot", str(picture)]) == 0
    bands = {row["band"]: row for row in json.loads(out.read_text())["bands"]}
    parts = (bands[name]["regions"] for name in ("1 to 2 s", "2 to 3 s", "3 to 5 s"))
    whole = bands["1 to 5 s"]
    assert whole["regions"] == sum(parts) > bands["1 to 5 s, alike"]["regions"] > 0
    assert whole["median_error"] < 0.3 and whole["known"] > 0.2, whole
    assert cv2.imread(str(picture)) is not None


def test_masks_are_held_against_the_true_ones(tmp_path: Path) -> None:
    """Why: docs/motion_mask.md quotes its table and shows its picture."""
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    assert motion_mask.main(["--frames", "12", "--threads", "1", "--json", str(out), "--plot", str(picture)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert set(figures) == {"nano", "DIS medium", "KLT points"}
    for row in figures.values():
        assert 0 < row["IoU"] <= min(row["precision"], row["recall"]) <= 1, row
    assert cv2.imread(str(picture)) is not None
