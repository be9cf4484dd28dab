# SPDX-License-Identifier: Apache-2.0
"""Flow colours: the Middlebury wheel, so that pictures can be compared with those of other work."""

import numpy as np
import pytest

from deq_flow_ros.imaging.pictures import flow_to_color


def test_directions_have_the_colours_of_the_wheel() -> None:
    """Reference points of Baker et al.'s wheel: right is red, left is cyan to blue, down yellow-green, up violet."""
    flow = np.array([[[10, 0], [-10, 0], [0, 10], [0, -10], [0, 0]]], np.float32)
    right, left, down, up, still = flow_to_color(flow, 10.0)[0].astype(int)
    assert right[0] == 255 and right[1] < 40 and right[2] < 60
    assert left[0] < 10 and left[2] > 200
    assert down[1] > 200 and down[2] < 10 and down[0] > 100
    assert up[2] > 200 and up[1] < 10
    assert still.min() >= 253


def test_speed_is_saturation_and_beyond_the_range_darker() -> None:
    """Slow motion must stay pale, and what exceeds the range must not look like the edge of it."""
    flow = np.array([[[2, 0], [6, 0], [10, 0], [30, 0]]], np.float32)
    slow, middle, full, beyond = flow_to_color(flow, 10.0)[0].astype(int)
    assert slow[1] > middle[1] > full[1]
    assert beyond[0] < full[0]


def test_missing_flow_is_black_and_hurts_nobody_else() -> None:
    """NaN marks pixels without flow; neither it nor infinity may set the range of the others."""
    flow = np.zeros((4, 5, 2), np.float32)
    flow[..., 0] = 3.0
    clean = flow_to_color(flow)
    flow[0, 0] = np.nan
    flow[1, 1, 1] = np.inf
    color = flow_to_color(flow)
    assert not color[0, 0].any() and not color[1, 1].any()
    rest = np.ones((4, 5), bool)
    rest[0, 0] = rest[1, 1] = False
    assert np.array_equal(color[rest], clean[rest]) and clean.any(axis=2).all()


def test_wrong_arguments_are_named() -> None:
    """A residual handed in for a flow must not come out as colours."""
    with pytest.raises(ValueError, match=r"\(H, W, 2\), got \(4, 5\)"):
        flow_to_color(np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match="max_px above 0, got 0"):
        flow_to_color(np.zeros((4, 5, 2), np.float32), 0)
