# SPDX-License-Identifier: Apache-2.0
"""Conversion of ROS image encodings (``sensor_msgs/image_encodings.hpp``) to RGB arrays, with numpy and OpenCV only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np

from deq_flow_ros.imaging.levels import Levels, eight_bits
from deq_flow_ros.spelling import did_you_mean


class EncodingError(ValueError):
    """An image contradicts itself or its encoding is unknown; the message says what was expected and what was got."""


@dataclass(frozen=True)
class _Layout:
    """How the bytes of an encoding become RGB.

    :ivar convert: takes the image as ``_samples`` returns it: (H, W) or (H, W, C), uint8 or native uint16, with rows
        that need not be adjacent.
    :ivar even_width: whether pairs of columns share their colour, so that the width must be even.
    :ivar even_height: the same for rows and the height.
    :ivar rows: rows of ``step`` bytes per row of the image; more than 1 if there are several planes.
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
    """A conversion that reduces to 8 bits first, so that there is half as much to reorder."""

    def convert(image: np.ndarray, levels: Levels) -> np.ndarray:
        eight = image if image.dtype == np.uint8 else eight_bits(image, levels)
        return eight if code is None else cv2.cvtColor(eight, code)

    return convert


def _bayer(code: int) -> Callable[[np.ndarray, Levels], np.ndarray]:
    """A conversion that demosaics with all bits, because demosaicing interpolates."""
    return lambda image, levels: eight_bits(cv2.cvtColor(image, code), levels)


# ITU-R BT.601 in studio range, from (Y, U, V, 1) to (R, G, B), as OpenCV uses it for the other encodings.
_BT601 = np.array([[1.164, 0, 1.596], [1.164, -0.391, -0.813], [1.164, 2.018, 0]])
_BT601 = np.column_stack([_BT601, _BT601 @ (-16, -128, -128)])


def _nv24(planes: np.ndarray, levels: Levels) -> np.ndarray:
    """RGB of (3 H, W): H rows of luma, then for each row of the image W interleaved pairs of U and V in two rows."""
    height, width = planes.shape[0] // 3, planes.shape[1]
    chroma = np.lib.stride_tricks.as_strided(
        planes[height:], (height, width, 2), (2 * planes.strides[0], 2, 1), writeable=False
    )
    # OpenCV has no conversion for colour at full resolution.
    return cv2.transform(cv2.merge([np.maximum(planes[:height], 16), chroma]), _BT601)


# ROS names a Bayer pattern by the first two rows, OpenCV by the second row from its second pixel on.
_BAYER_CODES = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}
_UYVY = _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_UYVY), even_width=True)
_YUYV = _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_YUYV), even_width=True)


def _packed(depth: int) -> dict[str, _Layout]:
    """The encodings of whole pixels with ``depth`` bytes per channel."""
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
        # These names do not define colours. They are read in OpenCV's order, because OpenCV usually writes them.
        f"{bits}UC1": grey,
        f"{bits}UC3": bgr,
        f"{bits}UC4": bgra,
        **{f"bayer_{pattern}{bits}": _Layout(1, depth, _bayer(code)) for pattern, code in _BAYER_CODES.items()},
    }


_LAYOUTS: dict[str, _Layout] = {
    **_packed(1),
    **_packed(2),
    # Colour at half the width (4:2:2), ITU-R BT.601 in studio range, as in V4L2.
    "uyvy": _UYVY,
    "yuv422": _UYVY,  # the older name
    "yuyv": _YUYV,
    "yuv422_yuy2": _YUYV,  # the older name
    # A plane of luma, then one of interleaved chroma (V4L2: "pixfmt-yuv-planar") at half (4:2:0) or full size.
    "nv12": _Layout(1, 1, _colour(cv2.COLOR_YUV2RGB_NV12), even_width=True, even_height=True, rows=Fraction(3, 2)),
    "nv21": _Layout(1, 1, _colour(cv2.COLOR_YUV2RGB_NV21), even_width=True, even_height=True, rows=Fraction(3, 2)),
    "nv24": _Layout(1, 1, _nv24, rows=Fraction(3)),
}

ENCODINGS: tuple[str, ...] = tuple(sorted(_LAYOUTS))
"""All encodings that ``to_rgb`` reads."""


def check_layout(size: int, height: int, width: int, step: int, encoding: str) -> None:
    """Check that ``size`` bytes are an image of ``height`` x ``width`` pixels of ``encoding``.

    :param step: length of a row in bytes; if there are planes, of a row of the luma.
    :raises EncodingError: if they are not.
    """
    layout = _LAYOUTS.get(encoding)
    if layout is None:
        hint = did_you_mean(encoding, ENCODINGS)
        raise EncodingError(f"unknown encoding {encoding!r}{hint}: expected one of {', '.join(ENCODINGS)}")
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
    """Whether rows are longer than their pixels, in a layout that ``check_layout`` accepts."""
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
    """Convert an image in the layout of ``sensor_msgs/Image`` to RGB.

    :param data: (N,) uint8.
    :param step: length of a row in bytes, padding included.
    :param is_bigendian: byte order of channels with 16 bits.
    :param levels: maps 16 bits to 8 for the stream that the image belongs to; None for a single image.
    :returns: (H, W, 3) uint8, contiguous. Unpadded rgb8 is a view of ``data``, everything else a new array.
    :raises EncodingError: for an unknown encoding, or an image that contradicts itself.
    """
    check_layout(data.size, height, width, step, encoding)
    layout = _LAYOUTS[encoding]
    samples = _samples(data, layout, height, width, step, is_bigendian)
    return np.ascontiguousarray(layout.convert(samples, levels or Levels()))


def _samples(data: np.ndarray, layout: _Layout, height: int, width: int, step: int, is_bigendian: bool) -> np.ndarray:
    """The samples in native byte order, as a view if possible."""
    dtype = ("u1", ">u2" if is_bigendian else "<u2")[layout.bytes_per_channel - 1]
    shape: tuple[int, ...] = (int(height * layout.rows), width)
    strides: tuple[int, ...] = (step, layout.pixel_bytes)
    if layout.channels > 1:
        shape, strides = (*shape, layout.channels), (*strides, layout.bytes_per_channel)
    image: np.ndarray = np.ndarray(shape, dtype, buffer=np.ascontiguousarray(data), strides=strides)
    return image if layout.bytes_per_channel == 1 else np.require(image, np.uint16, ["ALIGNED"])
