# SPDX-License-Identifier: Apache-2.0
"""The demo scene: its flow must be exact, or every error reported against it is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from deq_flow_ros.demo import SIDECAR, load_scene, render_scene_bag
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.imaging.metrics import warp
from deq_flow_ros.recordings import MediaError, open_source

SMALL = SceneSettings(width=160, height=120)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(SMALL)


@pytest.mark.parametrize(("first", "second"), [(20, 21), (21, 20), (130, 131), (60, 63)])
def test_flow_explains_the_pictures(scene: Scene, first: int, second: int) -> None:
    """Slow, backward, fast and over several frames: warped by its flow the other picture is this one, up to resampling.

    The same flow one pixel off must do clearly worse, which shows that the check can fail.
    """
    here, there = (scene.render(number).astype(np.float32) for number in (first, second))
    flow, visible = scene.flow(first, second)

    def error(moved: np.ndarray) -> float:
        warped, inside = warp(there, moved)
        return float(np.abs(warped - here)[visible & inside].mean())

    exact = error(flow)
    assert visible.mean() > 0.8
    assert exact < 4.5
    for offset in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        assert error(flow + np.float32(offset)) > 1.35 * exact


def test_forward_and_backward_flow_agree(scene: Scene) -> None:
    """Following the flow and coming back ends where it began, for what both pictures show."""
    forward, visible = scene.flow(125, 127)
    backward, _ = scene.flow(127, 125)
    back, inside = warp(backward, forward)
    gap = np.hypot(*np.moveaxis(forward + back, 2, 0))[visible & inside]
    assert np.median(gap) < 0.01
    assert np.mean(gap < 0.5) > 0.95, "all but the edges of things, where neighbours belong to different ones"


def test_the_drive_stands_still_and_dashes(scene: Scene) -> None:
    """The demo is to show both: a static section with moving things, and motion too large for a few iterations."""
    still = np.hypot(*np.moveaxis(scene.flow(70, 71)[0], 2, 0))
    assert np.median(still) < 1e-6 and still.max() > 1.0
    fast = np.hypot(*np.moveaxis(scene.flow(130, 131)[0], 2, 0))
    assert np.median(fast) > 2.5 and np.nanmax(fast) > 10.0


def test_hidden_pixels_are_marked(scene: Scene) -> None:
    """Occlusion follows from geometry: where hidden, the other picture must show something nearer or nothing at all."""
    _, visible = scene.flow(130, 131)
    same, all_visible = scene.flow(70, 70)
    assert 0.02 < np.mean(~visible) < 0.2
    assert np.abs(same).max() < 1e-6 and all_visible.mean() > 0.999


def test_bag_is_rendered_once_and_reproducibly(tmp_path: Path) -> None:
    """Later runs of the demo must not pay for it again, and a bag of other settings must not be taken for it."""
    settings = SceneSettings(width=64, height=48, frames=3)
    bag = tmp_path / "scene"
    render_scene_bag(bag, settings)
    rendered_ns = bag.stat().st_mtime_ns
    frames = list(open_source(bag).frames())
    assert len(frames) == 3 and load_scene(bag) == settings
    assert [frame.stamp_ns for frame in frames] == [settings.stamp_ns(number) for number in range(3)]
    assert np.array_equal(frames[2].data.reshape(48, 64, 3)[:, :, ::-1], Scene(settings).render(2))
    render_scene_bag(bag, settings)
    assert bag.stat().st_mtime_ns == rendered_ns, "nothing rendered anew"
    assert [path.name for path in tmp_path.iterdir()] == ["scene"], "nothing left behind"
    sidecar = bag / SIDECAR
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "version": 0}))
    with pytest.raises(MediaError, match="expected a scene of version 1, got 0"):
        load_scene(bag)
    render_scene_bag(bag, settings)
    assert load_scene(bag) == settings
