# SPDX-License-Identifier: Apache-2.0
"""Image encodings of ROS (`sensor_msgs/image_encodings.hpp`) as RGB arrays, by numpy and OpenCV alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np

from deq_flow_ros.imaging.levels import Levels, eight_bits


class EncodingError(ValueError):
    """An image contradicts itself or its encoding is unknown; the message says what was expected and what was got."""


@dataclass(frozen=True)
class _Layout:
    """How the bytes of one encoding become RGB.

    `convert` takes the image as `_samples` shapes it: (H, W) or (H, W, C), uint8 or native uint16, rows not necessarily
    adjacent. Encodings that share colour between neighbours need whole groups of them. `rows` is the number of rows of
    `step` bytes per row of the image: more than 1 where planes follow each other.
    """

    channels: int
    bytes_per_channel: int
    convert: Callable[[np.ndarray, Levels], np.ndarray]
    even_width: bool = False
    even_height: bool = False
    rows: Fraction = Fraction(1)

    @property
    def pixel_bytes(self) -> int:
        return self.channels * self.bytes_per_channel


def _colour(code: int | None) -> Callable[[np.ndarray, Levels], np.ndarray]:
    """Eight bits first: then there is half as much to reorder."""

    def convert(image: np.ndarray, levels: Levels) -> np.ndarray:
        eight = eight_bits(image, levels)
        return eight if code is None else cv2.cvtColor(eight, code)

    return convert


def _bayer(code: int) -> Callable[[np.ndarray, Levels], np.ndarray]:
    """Demosaicing interpolates, so it gets all bits."""
    return lambda image, levels: eight_bits(cv2.cvtColor(image, code), levels)


# ITU-R BT.601 in studio range: red, green and blue of Y, U, V and 1, as OpenCV's conversions of the other encodings.
_BT601 = np.array([[1.164, 0, 1.596], [1.164, -0.391, -0.813], [1.164, 2.018, 0]])
_BT601 = np.column_stack([_BT601, _BT601 @ (-16, -128, -128)])


def _nv24(planes: np.ndarray, levels: Levels) -> np.ndarray:
    """RGB of (3 H, W): luma, then per row W interleaved pairs of U and V, in the space of two rows."""
    height, width = planes.shape[0] // 3, planes.shape[1]
    chroma = np.lib.stride_tricks.as_strided(
        planes[height:], (height, width, 2), (2 * planes.strides[0], 2, 1), writeable=False
    )
    # OpenCV has no conversion for colour at full resolution.
    return cv2.transform(cv2.merge([np.maximum(planes[:height], 16), chroma]), _BT601)


# ROS names a Bayer pattern by its first two rows from the corner on, OpenCV by the second row from its second pixel on.
_BAYER_CODES = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}
_UYVY = _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_UYVY), even_width=True)
_YUYV = _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_YUYV), even_width=True)


def _packed(depth: int) -> dict[str, _Layout]:
    """Encodings of whole pixels with `depth` bytes per channel."""
    bits = 8 * depth
    grey, bgr, bgra = (
        _Layout(channels, depth, _colour(code))
        for channels, code in ((1, cv2.COLOR_GRAY2RGB), (3, cv2.COLOR_BGR2RGB), (4, cv2.COLOR_BGRA2RGB))
    )
    return {
        f"rgb{bits}": _Layout(3, depth, _colour(None)),
        f"rgba{bits}": _Layout(4, depth, _colour(cv2.COLOR_RGBA2RGB)),
        f"bgr{bits}": bgr,
        f"bgra{bits}": bgra,
        f"mono{bits}": grey,
        # Names without a colour meaning: read in OpenCV's own order, which is what fills them.
        f"{bits}UC1": grey,
        f"{bits}UC3": bgr,
        f"{bits}UC4": bgra,
        **{f"bayer_{pattern}{bits}": _Layout(1, depth, _bayer(code)) for pattern, code in _BAYER_CODES.items()},
    }


_LAYOUTS: dict[str, _Layout] = {
    **_packed(1),
    **_packed(2),
    # Colour at half the width (4:2:2), ITU-R BT.601 in studio range, as V4L2 has it.
    "uyvy": _UYVY,
    "yuv422": _UYVY,  # the older name
    "yuyv": _YUYV,
    "yuv422_yuy2": _YUYV,  # the older name
    # A plane of luma, then one of interleaved chroma (V4L2: "pixfmt-yuv-planar"), at half the size (4:2:0) or the full.
    "nv12": _Layout(1, 1, _colour(cv2.COLOR_YUV2RGB_NV12), even_width=True, even_height=True, rows=Fraction(3, 2)),
    "nv21": _Layout(1, 1, _colour(cv2.COLOR_YUV2RGB_NV21), even_width=True, even_height=True, rows=Fraction(3, 2)),
    "nv24": _Layout(1, 1, _nv24, rows=Fraction(3)),
}

ENCODINGS: tuple[str, ...] = tuple(sorted(_LAYOUTS))
"""Every encoding that `to_rgb` reads."""


def check_layout(size: int, height: int, width: int, step: int, encoding: str) -> None:
    """Raise `EncodingError` unless `size` bytes are an image of `height` x `width` pixels of `encoding`.

    `step` is the length of a row in bytes; where there are planes, of a row of the luma.
    """
    layout = _LAYOUTS.get(encoding)
    if layout is None:
        raise EncodingError(f"unknown encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if height <= 0 or width <= 0:
        raise EncodingError(f"empty image: expected a height and width above 0, got height {height}, width {width}")
    for name, value, even in (("width", width, layout.even_width), ("height", height, layout.even_height)):
        if even and value % 2:
            raise EncodingError(f"{encoding} shares colour between neighbours: expected an even {name}, got {value}")
    row = width * layout.pixel_bytes
    if step < row:
        raise EncodingError(f"rows too short: {width} pixels of {encoding} expect a step of at least {row}, got {step}")
    expected = step * int(height * layout.rows)
    if size != expected:
        planes = "" if layout.rows == 1 else f" x {layout.rows} for the planes"
        raise EncodingError(
            f"wrong amount of data: expected step {step} x height {height}{planes} = {expected} bytes, got {size}"
        )


def has_padded_rows(width: int, step: int, encoding: str) -> bool:
    """Whether rows of a layout that `check_layout` accepts are longer than their pixels."""
    return step != width * _LAYOUTS[encoding].pixel_bytes


def to_rgb(
    data: np.ndarray,
    height: int,
    width: int,
    step: int,
    encoding: str,
    is_bigendian: bool = False,
    levels: Levels | None = None,
) -> np.ndarray:
    """RGB of an image in the layout of ``sensor_msgs/Image``.

    :param data: (N,) uint8.
    :param step: length of a row in bytes, padding included.
    :param is_bigendian: matters where a channel has 16 bits.
    :param levels: of the stream that the image belongs to, which maps 16 bits to 8; None for an image by itself.
    :returns: (H, W, 3) uint8, contiguous. Unpadded rgb8 is a view of ``data``, everything else a new array.
    :raises EncodingError: for an unknown encoding, or an image that contradicts itself.
    """
    check_layout(data.size, height, width, step, encoding)
    layout = _LAYOUTS[encoding]
    samples = _samples(data, layout, height, width, step, is_bigendian)
    return np.ascontiguousarray(layout.convert(samples, levels or Levels()))


def _samples(data: np.ndarray, layout: _Layout, height: int, width: int, step: int, is_bigendian: bool) -> np.ndarray:
    """The samples in native byte order, as a view where that is possible."""
    dtype = ("u1", ">u2" if is_bigendian else "<u2")[layout.bytes_per_channel - 1]
    shape: tuple[int, ...] = (int(height * layout.rows), width)
    strides: tuple[int, ...] = (step, layout.pixel_bytes)
    if layout.channels > 1:
        shape, strides = (*shape, layout.channels), (*strides, layout.bytes_per_channel)
    image: np.ndarray = np.ndarray(shape, dtype, buffer=np.ascontiguousarray(data), strides=strides)
    return image if layout.bytes_per_channel == 1 else np.require(image, np.uint16, ["ALIGNED"])
