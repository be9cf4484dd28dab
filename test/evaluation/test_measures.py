# SPDX-License-Identifier: Apache-2.0
"""The measures of a pair tell good flow from bad, and say nothing where they know nothing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from deq_flow_ros.evaluation.records import MEASURES, PairFields, measure
from deq_flow_ros.imaging.metrics import visible_weight

HEIGHT, WIDTH = 96, 128


def texture(seed: int = 0) -> np.ndarray:
    """(160, 192, 3) uint8 RGB with texture in every direction everywhere."""
    noise = np.random.default_rng(seed).uniform(0, 255, (160, 192, 3)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 1.5), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def view(image: np.ndarray, x: int = 0, y: int = 0) -> np.ndarray:
    return image[20 + y : 20 + y + HEIGHT, 20 + x : 20 + x + WIDTH]


def uniform(u: float, v: float = 0.0) -> np.ndarray:
    return np.tile(np.float32([u, v]), (HEIGHT, WIDTH, 1))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_warping_by_the_right_flow_explains_the_image(direction: str) -> None:
    """The one measure that any recording allows; mixing up the two images or the sign would make good flow look bad."""
    image = texture()
    first, second = view(image, 5, 3), view(image)  # the content moves by (5, 3)
    sign = 1 if direction == "forward" else -1
    right = measure(PairFields(first, second, sign * uniform(5, 3), direction=direction))
    wrong = measure(PairFields(first, second, -sign * uniform(5, 3), direction=direction))
    assert right["photometric"] < 0.01 < 20 < right["photometric_still"] < wrong["photometric"] + 20
    assert wrong["photometric"] > 20


def test_what_is_covered_does_not_count_against_the_flow() -> None:
    """No flow can explain a pixel that is not to be seen any more: the exact flow must not be charged for it."""
    background, square = view(texture(1)), texture(2)[:40, :40]
    first, second = background.copy(), background.copy()
    first[30:70, 20:60], second[30:70, 35:75] = square, square
    flow = uniform(0)
    flow[30:70, 20:60] = (15, 0)
    weight = visible_weight(flow)
    covered = np.zeros((HEIGHT, WIDTH), bool)
    covered[30:70, 60:75] = True
    assert (weight[covered] == 0).all() and weight[:25].min() == 1
    plain = cv2.absdiff(first, cv2.remap(second, *_lookup(flow), cv2.INTER_LINEAR)).mean()
    assert measure(PairFields(first, second, flow))["photometric"] < 0.02 < 1 < plain


def _lookup(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    return x + flow[..., 0], y + flow[..., 1]


def test_the_weight_counts_what_lands_where_a_pixel_lands() -> None:
    """By hand: alone 1, two on one place 0, one and a half in between, outside and unknown 0."""
    flow = np.zeros((1, 6, 2), np.float32)
    flow[0, 1] = (1, 0)  # onto the one to the right, which stays
    flow[0, 3] = (0.5, 0)  # half onto the one to the right, half where nothing else is
    flow[0, 5] = (1, 0)
    assert visible_weight(flow)[0] == pytest.approx([1, 0, 0, 1, 0.5, 0])
    flow[0, 0] = np.nan
    assert visible_weight(flow)[0, 0] == 0


def test_there_and_back() -> None:
    """Consistent flow has none of this error; of an inconsistent one it is the length of what is left over."""
    image = view(texture())

    def consistency(backward: np.ndarray) -> dict[str, float]:
        return measure(PairFields(image, image, uniform(3), backward=backward))

    assert consistency(uniform(-3))["consistency_px"] == 0 and consistency(uniform(-3))["inconsistent_percent"] == 0
    off = consistency(uniform(-3, 4))
    assert off["consistency_px"] == pytest.approx(4) and off["inconsistent_percent"] == 100
    half = uniform(-3)
    half[: HEIGHT // 2] = (-3, 2)
    assert consistency(half)["inconsistent_percent"] == pytest.approx(50)
    assert "consistency_px" not in measure(PairFields(image, image, uniform(3)))


def test_flicker_is_the_spread_of_the_flow_where_nothing_moves() -> None:
    """Known noise on the flow of a still camera comes out as it went in, whatever constant error is on top."""
    image, generator = view(texture()), np.random.default_rng(0)
    noisy = [uniform(0.3) + generator.normal(0, 0.1, (HEIGHT, WIDTH, 2)).astype(np.float32) for _ in range(2)]
    before, now = (PairFields(image, image, flow) for flow in noisy)
    measures = measure(now, before)
    assert measures["flicker_px"] == pytest.approx(0.1 * np.sqrt(2), rel=0.05), "of a vector: of both components"
    assert measures["static_percent"] > 20
    assert "flicker_px" not in measure(now)


def test_what_moves_is_no_static_region() -> None:
    """Nor are stripes that slide along themselves, whose brightness stays the same; else motion would be flicker."""
    image = texture()
    stripes = np.repeat(image[:, :1], image.shape[1], axis=1)
    for still, views in ((image, [view(image, 2 * n) for n in range(3)]), (stripes, [view(stripes)] * 3)):
        before, now = PairFields(views[0], views[1], uniform(-2)), PairFields(views[1], views[2], uniform(-2.5))
        measures = measure(now, before)
        assert measures["static_percent"] < 0.5 and "flicker_px" not in measures, still is stripes


def test_errors_against_true_flow_by_hand() -> None:
    """Unknown pixels, masks, and both conditions of Fl: 3 px and 5 % of the length."""
    image = view(texture())
    flow, truth = uniform(0), uniform(0)
    truth[0] = (100, 0)  # 1 row: 4 px off is not 5 %
    flow[0] = (104, 0)
    flow[1] = (0, 5)  # 1 row: 5 px off of nothing
    truth[2] = np.nan
    visible = np.ones((HEIGHT, WIDTH), bool)
    visible[1] = False
    measures = measure(PairFields(image, image, flow, truth=truth, visible=visible))
    rows = HEIGHT - 1
    assert measures["epe_px"] == pytest.approx(9 / rows) and measures["epe_visible_px"] == pytest.approx(4 / (rows - 1))
    assert measures["epe_still_px"] == pytest.approx(100 / (rows - 1)), "over the visible ones as well"
    assert measures["fl_percent"] == pytest.approx(100 / rows)
    assert "epe_visible_px" not in measure(PairFields(image, image, flow, truth=truth))


def test_flow_that_is_nowhere_known_has_no_measures() -> None:
    """Not zero, which would be the best there is."""
    image, nothing = view(texture()), uniform(np.nan)
    pair = PairFields(image, image, nothing, truth=uniform(1), backward=nothing)
    assert set(measure(pair, pair)) <= {"static_percent"}
    assert all(m.definition.endswith(".") and m.reference and m.unit for m in MEASURES.values())
