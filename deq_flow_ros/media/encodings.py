# SPDX-License-Identifier: Apache-2.0
"""Image encodings of ROS (`sensor_msgs/image_encodings.hpp`) as RGB arrays, by numpy and OpenCV alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np


class EncodingError(ValueError):
    """An image contradicts itself or its encoding is unknown; the message says what was expected and what was got."""


@dataclass(frozen=True)
class _Layout:
    """How the bytes of one encoding become RGB; `convert` takes (H, W) or (H, W, C), uint8 or native uint16."""

    channels: int
    bytes_per_channel: int
    convert: Callable[[np.ndarray], np.ndarray]
    even_width: bool = False

    @property
    def pixel_bytes(self) -> int:
        return self.channels * self.bytes_per_channel


def _eight_bits(image: np.ndarray) -> np.ndarray:
    # The full 16-bit range onto the full 8-bit range, rounded, as cv_bridge does; a shift by 8 would round down.
    # Cameras that fill only the lower 10 or 12 bits look dark in either.
    return image if image.dtype == np.uint8 else cv2.convertScaleAbs(image, alpha=255.0 / 65535.0)


def _colour(code: int | None) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: _eight_bits(image if code is None else cv2.cvtColor(image, code))


# ROS names a Bayer pattern by its first two rows from the corner on, OpenCV by the second row from its second pixel on.
_BAYER_CODES = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}
_UYVY = _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_UYVY), even_width=True)
_YUYV = _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_YUYV), even_width=True)
_GREY8 = _Layout(1, 1, _colour(cv2.COLOR_GRAY2RGB))
_GREY16 = _Layout(1, 2, lambda image: cv2.cvtColor(_eight_bits(image), cv2.COLOR_GRAY2RGB))
_BGR8 = _Layout(3, 1, _colour(cv2.COLOR_BGR2RGB))
_BGRA8 = _Layout(4, 1, _colour(cv2.COLOR_BGRA2RGB))

_LAYOUTS: dict[str, _Layout] = {
    "rgb8": _Layout(3, 1, _colour(None)),
    "bgr8": _BGR8,
    "rgba8": _Layout(4, 1, _colour(cv2.COLOR_RGBA2RGB)),
    "bgra8": _BGRA8,
    "mono8": _GREY8,
    "mono16": _GREY16,
    # Names without a colour meaning: read in OpenCV's own order, which is what fills them.
    "8UC1": _GREY8,
    "8UC3": _BGR8,
    "8UC4": _BGRA8,
    "16UC1": _GREY16,
    "uyvy": _UYVY,
    "yuv422": _UYVY,  # the older name
    "yuyv": _YUYV,
    "yuv422_yuy2": _YUYV,  # the older name
    **{f"bayer_{pattern}8": _Layout(1, 1, _colour(code)) for pattern, code in _BAYER_CODES.items()},
    **{f"bayer_{pattern}16": _Layout(1, 2, _colour(code)) for pattern, code in _BAYER_CODES.items()},
}

ENCODINGS: tuple[str, ...] = tuple(sorted(_LAYOUTS))
"""Every encoding that `to_rgb` reads."""


def check_layout(size: int, height: int, width: int, step: int, encoding: str) -> None:
    """Raise `EncodingError` unless `size` bytes are `height` rows of `step` bytes with `width` pixels of `encoding`."""
    layout = _LAYOUTS.get(encoding)
    if layout is None:
        raise EncodingError(f"unknown encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if height <= 0 or width <= 0:
        raise EncodingError(f"empty image: expected a height and width above 0, got height {height}, width {width}")
    if layout.even_width and width % 2:
        raise EncodingError(f"{encoding} shares colour between two pixels: expected an even width, got {width}")
    row = width * layout.pixel_bytes
    if step < row:
        raise EncodingError(f"rows too short: {width} pixels of {encoding} expect a step of at least {row}, got {step}")
    if size != step * height:
        expected = f"expected step {step} x height {height} = {step * height} bytes"
        raise EncodingError(f"wrong amount of data: {expected}, got {size}")


def has_padded_rows(width: int, step: int, encoding: str) -> bool:
    """Whether rows of a layout that `check_layout` accepts are longer than their pixels."""
    return step != width * _LAYOUTS[encoding].pixel_bytes


def to_rgb(
    data: np.ndarray, height: int, width: int, step: int, encoding: str, is_bigendian: bool = False
) -> np.ndarray:
    """(H, W, 3) uint8 RGB, contiguous, of an image in the layout of `sensor_msgs/Image`.

    `data` is (height * step,) uint8; `step` is the length of a row in bytes, padding included; `is_bigendian` matters
    where a channel has 16 bits. Unpadded rgb8 is a view of `data`, everything else a copy. Raises `EncodingError`.
    """
    check_layout(data.size, height, width, step, encoding)
    layout = _LAYOUTS[encoding]
    dtype = ("u1", ">u2" if is_bigendian else "<u2")[layout.bytes_per_channel - 1]
    shape: tuple[int, ...] = (height, width)
    strides: tuple[int, ...] = (step, layout.pixel_bytes)
    if layout.channels > 1:
        shape, strides = (*shape, layout.channels), (*strides, layout.bytes_per_channel)
    image: np.ndarray = np.ndarray(shape, dtype, buffer=np.ascontiguousarray(data), strides=strides)
    if layout.bytes_per_channel == 2:
        image = image.astype(np.uint16)  # native byte order, aligned
    return np.ascontiguousarray(layout.convert(np.ascontiguousarray(image)))
