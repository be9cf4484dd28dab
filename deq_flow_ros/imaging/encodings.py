# SPDX-License-Identifier: Apache-2.0
"""Images of ROS as RGB arrays: raw encodings (``sensor_msgs/image_encodings.hpp``), JPEG and PNG, and 16 bits to 8."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np
from PIL import Image

from deq_flow_ros import did_you_mean


class EncodingError(ValueError):
    """An image contradicts itself or its encoding is unknown; the message says what was expected and what was got."""


FULL = (0, 65535)
MIN_WIDTH = 16  # counts; a narrower range would turn the noise of the camera into a picture
_MARGIN = 0.15  # of the range of an image, added on each side, so that the next images fit as well
_WASTED = 0.4  # an image that uses less of the range than this has lost too much contrast
_SAMPLES = 20_000
_TAILS = (0.1, 99.9)  # percent; hot and dead pixels lie beyond


class Levels:
    """The counts of 16 bits that become 0 and 255 in the images of one stream.

    Thermal cameras and sensors of 10 or 12 bits use a small part of the 16 bits. The range is therefore taken from the
    images, and kept as long as they fit into it and use it well, because a change of brightness spoils the flow.

    :param fixed: (black, white) in counts, for a range that never changes. ``ValueError`` if it is none.
    """

    def __init__(self, fixed: tuple[int, int] | None = None) -> None:
        if fixed is not None and not 0 <= fixed[0] < fixed[1] <= FULL[1]:
            raise ValueError(f"expected a range of counts such as (0, 65535), black before white, got {fixed}")
        self._fixed, self._held = fixed, fixed

    def of(self, image: np.ndarray) -> tuple[int, int]:
        """The counts of black and white for the next image of the stream.

        :param image: uint16, any shape.
        """
        if self._fixed is not None:
            return self._fixed
        step = max(1, math.isqrt(image.size // _SAMPLES))
        low, high = np.percentile(image[::step, ::step], _TAILS)
        if self._held is not None:
            black, white = self._held
            if black <= low and high <= white and high - low >= _WASTED * (white - black):
                return self._held
        margin = max(_MARGIN * (high - low), (MIN_WIDTH - (high - low)) / 2)
        self._held = max(0, math.floor(low - margin)), min(FULL[1], math.ceil(high + margin))
        return self._held


def eight_bits(image: np.ndarray, levels: Levels) -> np.ndarray:
    """Convert an image of any shape to uint8: uint16 is mapped by its levels and rounded."""
    if image.dtype == np.uint8:
        return image
    colours = image[:, :, :3] if image.ndim == 3 else image  # a fourth channel is opacity, usually all white
    black, white = levels.of(colours)
    # Both operations saturate: counts below black become 0, counts above white become 255.
    return cv2.convertScaleAbs(cv2.subtract(image, (black,) * 4), alpha=255.0 / (white - black))


@dataclass(frozen=True)
class _Layout:
    """How an encoding becomes RGB: ``convert`` takes (H, W) or (H, W, C) samples of uint8 or native uint16.

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
    return eight_bits if code is None else lambda image, levels: cv2.cvtColor(eight_bits(image, levels), code)


def _bayer(code: int) -> Callable[[np.ndarray, Levels], np.ndarray]:
    """A conversion that demosaics with all bits, because demosaicing interpolates."""
    return lambda image, levels: eight_bits(cv2.cvtColor(image, code), levels)


# ITU-R BT.601 in studio range, from (Y, U, V, 1) to (R, G, B), as OpenCV uses it for the other encodings.
_BT601 = np.array([[1.164, 0, 1.596], [1.164, -0.391, -0.813], [1.164, 2.018, 0]])
_BT601 = np.column_stack([_BT601, _BT601 @ (-16, -128, -128)])


def _nv24(planes: np.ndarray, levels: Levels) -> np.ndarray:
    """RGB of (3 H, W): H rows of luma, then for each row of the image W interleaved pairs of U and V in two rows."""
    height, width = planes.shape[0] // 3, planes.shape[1]
    strides = 2 * planes.strides[0], 2, 1
    chroma = np.lib.stride_tricks.as_strided(planes[height:], (height, width, 2), strides, writeable=False)
    # OpenCV has no conversion for colour at full resolution.
    return cv2.transform(cv2.merge([np.maximum(planes[:height], 16), chroma]), _BT601)


# ROS names a Bayer pattern by the first two rows, OpenCV by the second row from its second pixel on.
_BAYER_CODES = {
    "rggb": cv2.COLOR_BayerBG2RGB, "bggr": cv2.COLOR_BayerRG2RGB, "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}  # fmt: skip
_BAYER = {f"bayer_{pattern}{bits}" for pattern in _BAYER_CODES for bits in (8, 16)}


# Channels, and the conversion to RGB. The names with UC do not define colours. They are read in OpenCV's order, because
# OpenCV usually writes them.
_PACKED = {
    "rgb{}": (3, None), "rgba{}": (4, cv2.COLOR_RGBA2RGB), "bgr{}": (3, cv2.COLOR_BGR2RGB),
    "bgra{}": (4, cv2.COLOR_BGRA2RGB), "mono{}": (1, cv2.COLOR_GRAY2RGB), "{}UC1": (1, cv2.COLOR_GRAY2RGB),
    "{}UC3": (3, cv2.COLOR_BGR2RGB), "{}UC4": (4, cv2.COLOR_BGRA2RGB),
}  # fmt: skip


def _packed(depth: int) -> dict[str, _Layout]:
    """The encodings of whole pixels with ``depth`` bytes per channel."""
    bits = 8 * depth
    bayer = {f"bayer_{pattern}{bits}": _Layout(1, depth, _bayer(code)) for pattern, code in _BAYER_CODES.items()}
    return bayer | {name.format(bits): _Layout(n, depth, _colour(code)) for name, (n, code) in _PACKED.items()}


_LAYOUTS = {
    **_packed(1),
    **_packed(2),
    # Colour at half the width (4:2:2), ITU-R BT.601 in studio range, as in V4L2; by its newer and its older name.
    **dict.fromkeys(("uyvy", "yuv422"), _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_UYVY), even_width=True)),
    **dict.fromkeys(("yuyv", "yuv422_yuy2"), _Layout(2, 1, _colour(cv2.COLOR_YUV2RGB_YUYV), even_width=True)),
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
    if (layout := _LAYOUTS.get(encoding)) is None:
        hint = did_you_mean(encoding, ENCODINGS)
        raise EncodingError(f"unknown encoding {encoding!r}{hint}: expected one of {', '.join(ENCODINGS)}")
    if height <= 0 or width <= 0:
        raise EncodingError(f"empty image: expected a height and width above 0, got height {height}, width {width}")
    for name, value, even in (("width", width, layout.even_width), ("height", height, layout.even_height)):
        if even and value % 2:  # neighbours share their colour
            raise EncodingError(f"{encoding} shares colour between neighbours: expected an even {name}, got {value}")
    row = width * layout.pixel_bytes
    if step < row:
        raise EncodingError(f"rows too short: {width} pixels of {encoding} expect a step of at least {row}, got {step}")
    expected = step * int(height * layout.rows)
    if size != expected:
        planes = "" if layout.rows == 1 else f" x {layout.rows} for the planes"
        wanted = f"step {step} x height {height}{planes} = {expected} bytes"
        raise EncodingError(f"wrong amount of data: expected {wanted}, got {size}")


def has_padded_rows(width: int, step: int, encoding: str) -> bool:
    """Whether rows are longer than their pixels."""
    return step != width * _LAYOUTS[encoding].pixel_bytes


def to_rgb(
    data: np.ndarray, height: int, width: int, step: int, encoding: str, is_bigendian: bool = False,
    levels: Levels | None = None,
) -> np.ndarray:  # fmt: skip
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
    size, dtype = layout.bytes_per_channel, ("u1", ">u2" if is_bigendian else "<u2")[layout.bytes_per_channel - 1]
    shape, strides = (int(height * layout.rows), width, layout.channels), (step, layout.pixel_bytes, size)
    samples = np.ndarray(shape, dtype, buffer=np.ascontiguousarray(data), strides=strides)  # rows may not be adjacent
    samples = samples[:, :, 0] if layout.channels == 1 else samples
    samples = samples if size == 1 else np.require(samples, np.uint16, ["ALIGNED"])
    row = width * layout.pixel_bytes  # several times that long are those of drivers that call colours mono8
    if width >= 16 and step in (2 * row, 3 * row, 4 * row) and np.ptp(data.reshape(-1, step)[:, row:]):
        what = f"{step // row} times as many as {width} pixels of {encoding} have, and not padded with one value"
        raise EncodingError(f"rows of {step} bytes, {what}: does the driver name the wrong encoding?")
    return np.ascontiguousarray(layout.convert(samples, levels or Levels()))


MAX_PIXELS = 1 << 26
"""Larger images (than 8192 x 8192) are not decoded, because a few kilobytes of data can claim any size."""
FORMATS = ("jpeg", "png")
_MORE = b"\xff\x00" * 10  # of no meaning; so many bytes libjpeg wants to have behind the last ones that it needs


def open_ended(data: bytes) -> bytes:
    """JPEG data whose decoder raises an error if some of it, more than a few bytes, is missing before its end mark.

    With that mark, libjpeg makes a grey area of what is lost, and reports nothing. Data of several scans needs it.
    """
    scan, end = data.find(b"\xff\xda"), data.rfind(b"\xff\xd9")
    if scan < 0 or end < scan or b"\xff\xc0" not in data or data.find(b"\xff\xda", scan + 2) > 0:
        return data
    for number, mark in enumerate(re.finditer(b"\xff([\xd0-\xd7])", data[scan:end])):
        if mark[1][0] & 7 != number & 7:  # restart marks count to 7 and start over: some are lost
            return data[: scan + mark.start()]
    return data[:end] + _MORE


def decode_image(data: np.ndarray, format: str = "", levels: Levels | None = None) -> np.ndarray:
    """Decode a compressed image to RGB, without alpha, and as it is stored (calibrations know no EXIF orientation).

    :param data: (N,) uint8. The data itself decides how it is decoded.
    :param format: what the message states. It is often wrong, and only serves for errors, to refuse depth, and to
        demosaic a grey image ("bayer_rggb8; jpeg compressed " of compressed_image_transport).
    :param levels: as for ``to_rgb``.
    :returns: (H, W, 3) uint8, contiguous.
    :raises EncodingError: for data that is neither JPEG nor PNG, is damaged, or claims more than ``MAX_PIXELS``.
    """
    said = f" (format {format!r})"
    if "compressedDepth" in format:
        raise EncodingError(f"expected a colour or grey image, got depth{said}")
    try:
        image = Image.open(io.BytesIO(open_ended(data.tobytes())), formats=FORMATS)
    except Exception as error:  # Pillow raises errors of many types
        got = f"{data.size} bytes that begin {data[:8].tobytes().hex(' ') or '-'}{said}"
        raise EncodingError(f"expected JPEG or PNG data, got {got}: {type(error).__name__}") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise EncodingError(f"expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}{said}")
        try:
            if image.format == "PNG" and image.mode.startswith("RGB") and data[24] == 16:
                image.load()  # in full, but of 16 bits only the upper ones
                colour = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH))
                return cv2.cvtColor(eight_bits(colour, levels or Levels()), cv2.COLOR_BGR2RGB)
            if image.mode.startswith("I") or image.mode == "L":
                grey = np.asarray(image).astype(np.uint8 if image.mode == "L" else np.uint16)
                bits = 8 * grey.itemsize
                encoding = re.sub(r"\d*;.*", str(bits), format)
                layout = _LAYOUTS[encoding if encoding in _BAYER else f"mono{bits}"]
                return layout.convert(grey, levels or Levels())
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except Exception as error:
            raise EncodingError(f"the {image.format} data of {data.size} bytes is damaged{said}: {error}") from None


def encode_image(rgb: np.ndarray, format: str, quality: int = 95) -> np.ndarray:
    """Encode an image (H, W, 3) uint8 RGB as data, (N,) uint8, of one of ``FORMATS``.

    :param quality: 1 to 100, for JPEG only.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if format == "jpeg" else []
    return cv2.imencode(f".{format}", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1].reshape(-1)
