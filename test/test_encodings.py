# SPDX-License-Identifier: Apache-2.0
"""Every encoding a camera may send becomes the same RGB picture, and a message that contradicts itself is named."""

import cv2
import numpy as np
import pytest

from deq_flow_ros.media.encodings import ENCODINGS, EncodingError, to_rgb

HEIGHT, WIDTH = 24, 32
BAYER_SITES = {  # colour channel at (row parity, column parity)
    "rggb": ((0, 1), (1, 2)),
    "bggr": ((2, 1), (1, 0)),
    "gbrg": ((1, 2), (0, 1)),
    "grbg": ((1, 0), (2, 1)),
}


def picture() -> np.ndarray:
    """RGB whose channels differ, smooth enough for colour subsampling and demosaicing to reproduce it closely."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([60 + 4 * rows, 40 + 5 * columns, 200 - 3 * rows - columns], axis=2).astype(np.uint8)


def encode(rgb: np.ndarray, encoding: str) -> np.ndarray:
    """The picture as (H, W[, C]) samples of `encoding`, written by the definition of the encoding."""
    grey = rgb[:, :, 1]
    if encoding in ("mono8", "8UC1"):
        return grey
    if encoding in ("mono16", "16UC1"):
        return grey.astype(np.uint16) * 257
    if encoding.startswith("bayer"):
        pattern = BAYER_SITES[encoding[6:10]]
        mosaic = np.empty((HEIGHT, WIDTH), np.uint8)
        for row in (0, 1):
            for column in (0, 1):
                mosaic[row::2, column::2] = rgb[row::2, column::2, pattern[row][column]]
        return mosaic if encoding.endswith("8") else mosaic.astype(np.uint16) * 257
    if encoding in ("uyvy", "yuv422", "yuyv", "yuv422_yuy2"):  # ITU-R BT.601, studio range
        red, green, blue = (rgb[:, :, i].astype(float) for i in range(3))
        luma = 16 + 0.257 * red + 0.504 * green + 0.098 * blue
        u = (128 - 0.148 * red - 0.291 * green + 0.439 * blue)[:, ::2]
        v = (128 + 0.439 * red - 0.368 * green - 0.071 * blue)[:, ::2]
        chroma = np.stack([u, v], axis=2).reshape(HEIGHT, WIDTH)
        pair = [chroma, luma] if encoding in ("uyvy", "yuv422") else [luma, chroma]
        return np.stack(pair, axis=2).round().astype(np.uint8)
    samples = rgb if encoding.startswith("rgb") else rgb[:, :, ::-1]
    alpha = np.full((HEIGHT, WIDTH, 1), 77, np.uint8)
    return np.concatenate([samples, alpha], axis=2) if "a" in encoding or encoding == "8UC4" else samples


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_each_encoding_gives_the_same_picture(encoding: str, padding: int) -> None:
    """Channel order, Bayer phase, chroma order and row padding are easily mixed up; odd padding misaligns 16 bits."""
    samples = encode(picture(), encoding)
    for big in (False, True) if samples.dtype == np.uint16 else (False,):
        rows = np.ascontiguousarray(samples.astype(">u2" if big else samples.dtype)).reshape(HEIGHT, -1).view(np.uint8)
        data = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
        rgb = to_rgb(data.reshape(-1), HEIGHT, WIDTH, data.shape[1], encoding, big)
        assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.dtype == np.uint8 and rgb.flags.c_contiguous
        expected = picture()
        if encoding in ("mono8", "mono16", "8UC1", "16UC1"):
            expected = np.repeat(expected[:, :, 1:2], 3, axis=2)
        error = np.abs(rgb.astype(int) - expected)[2:-2, 2:-2]  # demosaicing extrapolates at the border
        tolerance = 6 if encoding.startswith("y") or encoding == "uyvy" else 3 if encoding.startswith("bayer") else 0
        assert error.max() <= tolerance


def test_sixteen_bits_use_the_full_range() -> None:
    """White must stay white and the scaling must be cv_bridge's (rounded 255/65535), or the two converters disagree."""
    values = np.array([[0, 128, 129, 32768, 65535, 65280]], np.uint16)
    rgb = to_rgb(values.view(np.uint8).reshape(-1), 1, 6, 12, "mono16")
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
    ],
)
def test_contradictions_are_named(
    size: int, height: int, width: int, step: int, encoding: str, words: list[str]
) -> None:
    """A driver bug must be readable off the message: what was expected and what came."""
    with pytest.raises(EncodingError) as error:
        to_rgb(np.zeros(size, np.uint8), height, width, step, encoding)
    assert all(word in str(error.value) for word in words)


def test_the_smallest_images_convert() -> None:
    """No encoding may crash OpenCV on one pixel or one pair."""
    for encoding in ENCODINGS:
        samples = encode(picture(), encoding)[:2, :2]
        data = np.ascontiguousarray(samples).reshape(-1).view(np.uint8)
        try:
            assert to_rgb(data, 2, 2, data.size // 2, encoding).shape == (2, 2, 3)
        except cv2.error as error:
            pytest.fail(f"{encoding}: {error}")
