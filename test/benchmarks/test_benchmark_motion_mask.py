# SPDX-License-Identifier: Apache-2.0
"""The benchmark of `motion_mask`: what truly moves, what is counted, and what sparse points stand for."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from benchmarks import motion_mask
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
