# SPDX-License-Identifier: Apache-2.0
"""Compressed images: the bytes decide what they are, and what could hurt is refused before it is decoded."""

import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest

from deq_flow_ros.imaging.encodings import FULL, EncodingError, Levels, decode_image, encode_image


def picture() -> np.ndarray:
    """(40, 56, 3) RGB whose channels differ, smooth enough for JPEG."""
    rows, columns = np.mgrid[:40, :56]
    return np.stack([60 + 4 * rows, 30 + 4 * columns, 200 - 2 * rows - columns], axis=2).astype(np.uint8)


def compress(extension: str, array: np.ndarray) -> np.ndarray:
    """Written by OpenCV, which takes BGR."""
    if array.ndim == 3:
        array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]
    return cv2.imencode(extension, np.ascontiguousarray(array))[1].reshape(-1)


def png_claiming(width: int, height: int) -> np.ndarray:
    """A PNG of some 100 bytes with a header of any size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return np.frombuffer(b"\x89PNG\r\n\x1a\n" + body, np.uint8)


@pytest.mark.parametrize("format", ["jpeg", "png", "bgr8; jpeg compressed bgr8", "mono16; png compressed", "", "webp"])
def test_the_data_decides_not_the_format(format: str) -> None:
    """Drivers write "jpeg", image_transport its own pattern, and some the wrong one; EXIF must not turn the image."""
    for extension, tolerance in ((".png", 0), (".jpg", 6)):
        rgb = decode_image(compress(extension, picture()), format)
        assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous and rgb.flags.writeable
        assert np.abs(rgb.astype(int) - picture()).max() <= tolerance


def test_grey_alpha_and_sixteen_bits_are_read() -> None:
    """Thermal and machine-vision cameras send them; 16 bits must use the whole range, as the raw encodings do."""
    grey = picture()[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(decode_image(compress(".png", grey)), expected)
    sixteen = compress(".png", grey.astype(np.uint16) * 257 + 100)
    assert np.array_equal(decode_image(sixteen, levels=Levels(FULL)), expected)
    assert np.abs(decode_image(compress(".jpg", grey)).astype(int) - expected).max() <= 3
    alpha = np.dstack([picture(), np.full((40, 56), 9, np.uint8)])
    assert np.array_equal(decode_image(compress(".png", alpha)), picture())
    wide = compress(".png", picture().astype(np.uint16) * 257)
    assert np.array_equal(decode_image(wide, levels=Levels(FULL)), picture())
    few = decode_image(compress(".png", picture().astype(np.uint16)))
    assert few.max() - few.min() > 150, "of few counts, the upper bits are a black picture"


def test_the_orientation_of_a_photograph_is_ignored() -> None:
    """A turned image would not fit its camera_info."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = compress(".jpg", picture()).tobytes()
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert decode_image(np.frombuffer(turned, np.uint8)).shape == (40, 56, 3)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_truncated_data_is_refused(extension: str) -> None:
    """Half an image with a grey rest is motion that never was. Cut everywhere, but in the end mark of PNG."""
    data = compress(extension, picture())
    for length in range(0, data.size - (24 if extension == ".png" else 1), 7):
        with pytest.raises(EncodingError, match=f"{length} bytes"):
            decode_image(data[:length], "jpeg")


def test_jpeg_data_of_which_a_part_was_lost_is_refused() -> None:
    """USB loses a part, the camera still writes the end mark, and libjpeg fills the rest with grey, silently."""
    rows = np.arange(480)[:, None, None] * np.array([1, 3, 5]) + 7 * np.arange(640)[None, :, None]
    large = (rows % 251).astype(np.uint8)
    for options in ([], [cv2.IMWRITE_JPEG_RST_INTERVAL, 4]):
        for image in (picture(), large, large[:, :, 0]):
            data = cv2.imencode(".jpg", image, options)[1]
            assert decode_image(np.append(data, np.zeros(99, np.uint8))).shape[:2] == image.shape[:2], "padding is none"
            half = data.size // 2
            if data.size > 9000:
                with pytest.raises(EncodingError, match=r"JPEG data .* damaged"):
                    decode_image(np.concatenate([data[:half], data[half + 3000 :]]))
            end = np.array([0xFF, 0xD9], np.uint8)
            with pytest.raises(EncodingError, match=r"JPEG data .* damaged"):
                decode_image(np.concatenate([data[: data.size * 9 // 10], end]))


def test_a_bayer_pattern_within_a_compressed_image_is_demosaiced() -> None:
    """compressed_image_transport leaves it in a grey picture; its squares, which stand still, would hold the flow."""
    image = picture()
    raw = image[:, :, 1].copy()
    raw[::2, ::2], raw[1::2, 1::2] = image[::2, ::2, 0], image[1::2, 1::2, 2]
    for format, data in (("jpeg", raw), ("png", raw), ("png", raw.astype(np.uint16) * 257)):
        encoding = f"bayer_rggb{8 * data.itemsize}"
        stored = compress(".jpg" if format == "jpeg" else ".png", data)
        rgb = decode_image(stored, f"{encoding}; {format} compressed ", Levels(FULL))
        assert np.abs(rgb.astype(int) - image)[2:-2, 2:-2].max() <= (3 if format == "png" else 30)


def test_bombs_are_refused_by_their_header() -> None:
    """A hundred bytes may claim gigabytes; nothing of that may be allocated."""
    tracemalloc.start()
    for size in ((8193, 8192), (30000, 30000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(EncodingError, match=r"at most 67108864 pixels, got|DecompressionBomb"):
            decode_image(png_claiming(*size), "png")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert decode_image(compress(".png", np.zeros((3, 2), np.uint8))).shape == (3, 2, 3)


def test_what_is_no_picture_is_named() -> None:
    """The message tells a wrong topic from a broken cable."""
    with pytest.raises(EncodingError, match=r"4 bytes that begin 52 49 46 46 \(format 'jpeg'\)"):
        decode_image(np.frombuffer(b"RIFF", np.uint8), "jpeg")
    with pytest.raises(EncodingError, match="0 bytes that begin -"):
        decode_image(np.empty(0, np.uint8))
    with pytest.raises(EncodingError, match="got depth"):
        decode_image(compress(".png", picture()), "16UC1; compressedDepth png")


def test_what_is_encoded_is_decoded() -> None:
    """Colours must not swap on the way out, and quality must do something."""
    assert np.array_equal(decode_image(encode_image(picture(), "png")), picture())
    fine, coarse = (encode_image(picture(), "jpeg", quality) for quality in (95, 20))
    assert coarse.size < fine.size and np.abs(decode_image(fine).astype(int) - picture()).max() <= 6
