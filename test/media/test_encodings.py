# SPDX-License-Identifier: Apache-2.0
"""Every encoding a camera may send becomes the same RGB picture, and a message that contradicts itself is named."""

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
TOLERANCES = {  # steps of 255, from colours that neighbours share
    **dict.fromkeys(("nv12", "nv21"), 10),
    **dict.fromkeys(("uyvy", "yuv422", "yuyv", "yuv422_yuy2", "nv24"), 6),
    **dict.fromkeys((f"bayer_{pattern}" for pattern in BAYER_SITES), 3),
}


def picture() -> np.ndarray:
    """RGB whose channels differ, smooth enough for colour subsampling and demosaicing to reproduce it closely."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([60 + 4 * rows, 40 + 5 * columns, 200 - 3 * rows - columns], axis=2).astype(np.uint8)


def chroma_of(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Luma, U and V (H, W) of a picture: ITU-R BT.601, studio range."""
    red, green, blue = (rgb[:, :, i].astype(float) for i in range(3))
    luma = 16 + 0.257 * red + 0.504 * green + 0.098 * blue
    return luma, 128 - 0.148 * red - 0.291 * green + 0.439 * blue, 128 + 0.439 * red - 0.368 * green - 0.071 * blue


def encode(rgb: np.ndarray, encoding: str) -> np.ndarray:
    """The picture as (rows, samples per row[, C]) of `encoding`, written by the definition of the encoding."""
    if encoding.endswith("16") or encoding.startswith("16UC"):
        eight = encoding.replace("16UC", "8UC") if encoding.startswith("16UC") else f"{encoding[:-2]}8"
        return encode(rgb, eight).astype(np.uint16) * 257 + 100  # rounds to the same; its two bytes differ
    height, width = rgb.shape[:2]
    if encoding in ("mono8", "8UC1"):
        return rgb[:, :, 1]
    if encoding.startswith("bayer"):
        pattern = BAYER_SITES[encoding[6:10]]
        mosaic = np.empty((height, width), np.uint8)
        for row in (0, 1):
            for column in (0, 1):
                mosaic[row::2, column::2] = rgb[row::2, column::2, pattern[row][column]]
        return mosaic
    if encoding[0] in "uyn":
        luma, u, v = (plane.round().astype(np.uint8) for plane in chroma_of(rgb))
        if encoding.startswith("nv"):
            every = 1 if encoding == "nv24" else 2
            first, second = (v, u) if encoding == "nv21" else (u, v)
            chroma = np.stack([first[::every, ::every], second[::every, ::every]], axis=2)
            return np.concatenate([luma, chroma.reshape(-1, width)])
        chroma = np.stack([u[:, ::2], v[:, ::2]], axis=2).reshape(height, width)
        return np.stack([chroma, luma] if encoding in ("uyvy", "yuv422") else [luma, chroma], axis=2)
    samples = rgb if encoding.startswith("rgb") else rgb[:, :, ::-1]
    alpha = np.full((height, width, 1), 77, np.uint8)
    return np.concatenate([samples, alpha], axis=2) if "a" in encoding or encoding == "8UC4" else samples


def padded(samples: np.ndarray, encoding: str, padding: int) -> tuple[np.ndarray, int]:
    """Bytes of an image and its step, with `padding` bytes after each row, twice as many after a chroma row of nv24."""
    rows = np.ascontiguousarray(samples).reshape(samples.shape[0], -1).view(np.uint8)
    step = rows.shape[1] + padding
    if encoding != "nv24":
        return np.pad(rows, ((0, 0), (0, padding)), constant_values=255).reshape(-1), step
    luma, chroma = rows[: len(rows) // 3], rows[len(rows) // 3 :].reshape(len(rows) // 3, -1)
    planes = [np.pad(luma, ((0, 0), (0, padding))), np.pad(chroma, ((0, 0), (0, 2 * padding)))]
    return np.concatenate([plane.reshape(-1) for plane in planes]), step


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
        rgb = to_rgb(data, HEIGHT, WIDTH, step, encoding, big)
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
