# SPDX-License-Identifier: Apache-2.0
"""16-bit cameras that fill a small part of their range are seen, and steadily."""

import cv2
import numpy as np
import pytest

from deq_flow_ros.imaging.encodings import FULL, MIN_WIDTH, Levels, eight_bits


def thermal(low: int, high: int, shift: int = 0) -> np.ndarray:
    """(120, 160) uint16 of a smooth pattern between two counts, moved to the right."""
    picture = cv2.GaussianBlur(np.random.default_rng(0).random((120, 160)), (0, 0), 3)
    picture = np.roll((picture - picture.min()) / np.ptp(picture), shift, axis=1)
    return (low + picture * (high - low)).astype(np.uint16)


@pytest.mark.parametrize(("low", "high"), [(7750, 7850), (64, 300), (200, 900), (0, 65535), (65000, 65535)])
def test_a_camera_that_uses_few_counts_fills_the_grey_levels(low: int, high: int) -> None:
    """Mapped as a whole, a room at 7750 to 7850 counts is one grey level, and its flow exactly zero."""
    seen = eight_bits(thermal(low, high), Levels())
    assert seen.dtype == np.uint8
    assert np.ptp(seen) > 150
    assert np.mean((seen == 0) | (seen == 255)) < 0.01  # nothing of weight is cut off


def test_the_range_is_held_while_images_fit() -> None:
    """A range of each image's own would change the brightness of every pixel with each bright object."""
    levels = Levels()
    first = levels.of(thermal(7400, 8200))
    for shift, (low, high) in enumerate(((7400, 8200), (7390, 8250), (7450, 8150), (7500, 8000))):
        assert levels.of(thermal(low, high, shift)) == first
    assert levels.of(thermal(7400, 9000)) != first  # would be cut off
    assert levels.of(thermal(7400, 7500))[1] < 7600  # next to nothing of the range would be used


def test_noise_alone_is_not_stretched_to_a_picture() -> None:
    """A covered lens has a few counts of noise; as a picture full of contrast it would have flow."""
    covered = np.random.default_rng(0).integers(7800, 7803, (120, 160)).astype(np.uint16)
    black, white = Levels().of(covered)
    assert white - black >= MIN_WIDTH
    assert np.ptp(eight_bits(covered, Levels())) < 60


def test_hot_pixels_do_not_count() -> None:
    """One of them would take all contrast from the others."""
    image = thermal(7750, 7850)
    image[3, 5], image[100, 20] = FULL
    assert np.ptp(eight_bits(image, Levels())[10:90, 30:]) > 100


def test_opacity_does_not_count() -> None:
    """It is white everywhere in most images that have it, and would make the range of a dark camera the full one."""
    colours = np.stack([thermal(200, 900, shift) for shift in range(3)], axis=2)
    seen = eight_bits(np.dstack([colours, np.full(colours.shape[:2], FULL[1], np.uint16)]), Levels())
    np.testing.assert_array_equal(seen[:, :, :3], eight_bits(colours, Levels()))


@pytest.mark.parametrize("wrong", [(100, 100), (200, 100), (-1, 5), (0, 65536)])
def test_a_range_that_is_none_is_named(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="black before white"):
        Levels(wrong)
