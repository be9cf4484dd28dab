# SPDX-License-Identifier: Apache-2.0
"""Every encoding a camera may send becomes the same RGB picture, a message that contradicts itself is named, and 16-bit
cameras that fill a small part of their range are seen, and steadily.
"""

import cv2
import numpy as np
import pytest
from encoded_pictures import BAYER_SITES, HEIGHT, WIDTH, encode, padded, picture

from deq_flow_ros.imaging.encodings import (
    ENCODINGS,
    FULL,
    MIN_WIDTH,
    EncodingError,
    Levels,
    eight_bits,
    to_rgb,
)

TOLERANCES = {  # steps of 255, from colours that neighbours share
    **dict.fromkeys(("nv12", "nv21"), 10),
    **dict.fromkeys(("uyvy", "yuv422", "yuyv", "yuv422_yuy2", "nv24"), 6),
    **dict.fromkeys((f"bayer_{pattern}" for pattern in BAYER_SITES), 3),
}


def test_every_encoding_that_cameras_send_is_read() -> None:
    """The names of `sensor_msgs/image_encodings.hpp` that carry a picture, old names included."""
    names = {f"{kind}{bits}" for kind in ("rgb", "rgba", "bgr", "bgra", "mono") for bits in (8, 16)}
    names |= {f"bayer_{pattern}{bits}" for pattern in BAYER_SITES for bits in (8, 16)}
    assert names | {"yuv422", "uyvy", "yuv422_yuy2", "yuyv", "nv12", "nv21", "nv24"} <= set(ENCODINGS)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_each_encoding_gives_the_same_picture(encoding: str, padding: int) -> None:
    """Channel order, Bayer phase, chroma order and row padding are easily mixed up; odd padding misaligns 16 bits."""
    samples = encode(picture(), encoding)
    for big in (False, True) if samples.dtype == np.uint16 else (False,):
        data, step = padded(samples.astype(">u2" if big else samples.dtype), encoding, padding)
        rgb = to_rgb(data, HEIGHT, WIDTH, step, encoding, big, Levels(FULL))
        assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.dtype == np.uint8 and rgb.flags.c_contiguous
        expected = picture()
        if encoding in ("mono8", "mono16", "8UC1", "16UC1"):
            expected = np.repeat(expected[:, :, 1:2], 3, axis=2)
        error = np.abs(rgb.astype(int) - expected)[2:-2, 2:-2]  # demosaicing extrapolates at the border
        assert error.max() <= TOLERANCES.get(encoding.removesuffix("16").removesuffix("8"), 0)


@pytest.mark.parametrize("encoding", ["uyvy", "yuyv", "nv12", "nv21", "nv24"])
def test_the_colour_transform_is_bt601(encoding: str) -> None:
    """On samples of any value, out of gamut too: ITU-R BT.601 in studio range, to 2 steps of 255 (fixed point)."""
    samples = np.random.default_rng(0).integers(0, 256, encode(picture(), encoding).shape, np.uint8)
    if encoding.startswith("nv"):
        luma, chroma = samples[:HEIGHT], samples[HEIGHT:].reshape(HEIGHT if encoding == "nv24" else HEIGHT // 2, -1, 2)
    else:
        luma, chroma = samples[:, :, 1], samples[:, :, 0].reshape(HEIGHT, -1, 2)
        if encoding == "yuyv":
            luma, chroma = samples[:, :, 0], samples[:, :, 1].reshape(HEIGHT, -1, 2)
    chroma = chroma.repeat(HEIGHT // chroma.shape[0], axis=0).repeat(WIDTH // chroma.shape[1], axis=1)
    u, v = (chroma[:, :, i].astype(float) - 128 for i in ((1, 0) if encoding == "nv21" else (0, 1)))
    y = 1.164 * np.maximum(luma.astype(float) - 16, 0)
    expected = np.stack([y + 1.596 * v, y - 0.813 * v - 0.391 * u, y + 2.018 * u], axis=2).clip(0, 255)
    data, step = padded(samples, encoding, 0)
    assert np.abs(to_rgb(data, HEIGHT, WIDTH, step, encoding) - expected).max() <= 2


def test_the_full_range_of_sixteen_bits_can_be_asked_for() -> None:
    """White must stay white and the scaling be cv_bridge's (rounded 255/65535), for those who calibrated with it."""
    values = np.array([[0, 128, 129, 32768, 65535, 65280]], np.uint16)
    rgb = to_rgb(values.view(np.uint8).reshape(-1), 1, 6, 12, "mono16", levels=Levels(FULL))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 128, 255, 254]


def test_unpadded_rgb_is_not_copied() -> None:
    """The common case must cost nothing per frame."""
    data = np.zeros(HEIGHT * WIDTH * 3, np.uint8)
    assert np.shares_memory(to_rgb(data, HEIGHT, WIDTH, WIDTH * 3, "rgb8"), data)


@pytest.mark.parametrize(
    ("size", "height", "width", "step", "encoding", "words"),
    [
        (300, 10, 10, 30, "rgb9", ["rgb8", "'rgb9'"]),
        (300, 10, 10, 30, "", ["unknown encoding", "''"]),
        (0, 0, 10, 30, "rgb8", ["above 0", "height 0"]),
        (0, 10, 0, 0, "rgb8", ["above 0", "width 0"]),
        (290, 10, 10, 29, "rgb8", ["at least 30", "got 29"]),
        (299, 10, 10, 30, "rgb8", ["= 300 bytes", "got 299"]),
        (301, 10, 10, 30, "rgb8", ["= 300 bytes", "got 301"]),
        (180, 10, 9, 18, "yuv422", ["even width", "got 9"]),
        (135, 9, 10, 10, "nv12", ["even height", "got 9"]),
        (100, 10, 10, 10, "nv21", ["x 3/2 for the planes = 150 bytes", "got 100"]),
        (200, 10, 10, 10, "nv24", ["x 3 for the planes = 300 bytes", "got 200"]),
    ],
)
def test_contradictions_are_named(
    size: int, height: int, width: int, step: int, encoding: str, words: list[str]
) -> None:
    """A driver bug must be readable off the message: what was expected and what came."""
    with pytest.raises(EncodingError) as error:
        to_rgb(np.zeros(size, np.uint8), height, width, step, encoding)
    assert all(word in str(error.value) for word in words)


def test_colours_that_are_called_mono8_are_refused() -> None:
    """A row of three times as many bytes as pixels would be read to its first third, as if it were padded."""
    rows = np.arange(20 * 96, dtype=np.uint8)
    with pytest.raises(EncodingError, match="rows of 96 bytes, 3 times as many as 32 pixels of mono8 have"):
        to_rgb(rows, 20, 32, 96, "mono8")
    blank = np.pad(rows.reshape(60, 32)[:20], ((0, 0), (0, 64)))
    assert to_rgb(blank.reshape(-1), 20, 32, 96, "mono8").shape == (20, 32, 3), "padding to 96 bytes"


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_the_smallest_images_convert(size: tuple[int, int]) -> None:
    """No encoding may crash OpenCV on one pixel or one pair; what cannot be is refused by name."""
    for encoding in ENCODINGS:
        data, step = padded(encode(picture()[: size[0] + size[0] % 2, : size[1] + size[1] % 2], encoding), encoding, 0)
        if encoding == "nv24" or encoding[0] not in "uyn":
            rows = 3 * size[0] if encoding == "nv24" else size[0]
            data = data[: rows * step]
        elif size[1] % 2 or (encoding.startswith("nv") and size[0] % 2):
            with pytest.raises(EncodingError, match="expected an even"):
                to_rgb(data, *size, step, encoding)
            continue
        else:
            data = data[: step * size[0] * 3 // 2] if encoding.startswith("nv") else data[: step * size[0]]
        assert to_rgb(data, *size, step, encoding).shape == (*size, 3)


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
