# SPDX-License-Identifier: Apache-2.0
"""Conversion of JPEG and PNG images, as in ``sensor_msgs/CompressedImage``, to and from RGB arrays."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from deq_flow_ros.imaging.encodings import EncodingError
from deq_flow_ros.imaging.levels import Levels, eight_bits

MAX_PIXELS = 1 << 26
"""Larger images (than 8192 x 8192) are not decoded, because a few kilobytes of data can claim any size."""
FORMATS = ("jpeg", "png")


def decode_image(data: np.ndarray, format: str = "", levels: Levels | None = None) -> np.ndarray:
    """Decode a compressed image to RGB. Grey is repeated in all channels, and alpha is left out.

    The orientation in EXIF data is ignored, because calibrations are of the image as it is stored.

    :param data: (N,) uint8. The data itself decides how it is decoded.
    :param format: the format that the message states. It is often wrong, so it is only quoted in errors, and used to
        refuse depth images (compressed_depth_image_transport).
    :param levels: maps 16 bits to 8 for the stream that the image belongs to; None for a single image.
    :returns: (H, W, 3) uint8, contiguous.
    :raises EncodingError: for data that is neither JPEG nor PNG, is incomplete or damaged, or claims more than
        ``MAX_PIXELS`` (such data is not decoded).
    """
    said = f" (format {format!r})"
    if "compressedDepth" in format:
        raise EncodingError(f"expected a colour or grey image, got depth{said}")
    try:
        image = Image.open(io.BytesIO(data.data), formats=FORMATS)
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
            if image.mode.startswith("I"):
                grey = eight_bits(np.asarray(image).astype(np.uint16), levels or Levels())
                return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except Exception as error:
            raise EncodingError(f"the {image.format} data of {data.size} bytes is damaged{said}: {error}") from None


def encode_image(rgb: np.ndarray, format: str, quality: int = 95) -> np.ndarray:
    """Encode an image as JPEG or PNG data, (N,) uint8.

    :param rgb: (H, W, 3) uint8 RGB.
    :param format: "jpeg" or "png".
    :param quality: 1 to 100, for JPEG only.
    :raises ValueError: for another format, or an image of another shape or type.
    """
    if format not in FORMATS:
        raise ValueError(f"expected the format {' or '.join(FORMATS)}, got {format!r}")
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image of shape (H, W, 3), got {rgb.dtype} of {rgb.shape}")
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if format == "jpeg" else []
    return cv2.imencode(f".{format}", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1].reshape(-1)
