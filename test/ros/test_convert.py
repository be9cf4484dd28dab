# SPDX-License-Identifier: Apache-2.0
"""Messages and arrays: what is published is what was computed, and both converters agree."""

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from deq_flow_ros.imaging.encodings import ENCODINGS, EncodingError, encode_image
from deq_flow_ros.imaging.frame import stamp_to_ns
from deq_flow_ros.ros import convert


def test_arrays_survive_the_way_into_a_message_and_back() -> None:
    """Step, size, byte order and values of each kind of output; a strided array must not publish its neighbours."""
    generator = np.random.default_rng(0)
    header = Header(stamp=convert.ns_to_stamp(1_234_567_890_123), frame_id="camera")
    cases = (("32FC2", (5, 7, 2), np.float32), ("32FC1", (5, 7), np.float32), ("rgb8", (5, 7, 3), np.uint8))
    for encoding, shape, dtype in cases:
        wide = (generator.random((5, 14, *shape[2:])) * 255).astype(dtype)
        array = wide[:, ::2]
        message = convert.array_to_image(array, encoding, header)
        assert (message.height, message.width, message.encoding, message.is_bigendian) == (5, 7, encoding, 0)
        assert message.step * message.height == len(message.data) and message.header == header
        assert np.array_equal(np.frombuffer(message.data, dtype).reshape(shape), array)


def test_stamps_keep_every_nanosecond() -> None:
    """Floating point seconds would lose a hundred nanoseconds and with them the match of stamps."""
    for nanoseconds in (0, 1, 999_999_999, 1_763_000_000_123_456_789):
        assert stamp_to_ns(convert.ns_to_stamp(nanoseconds)) == nanoseconds
    with pytest.raises(ValueError, match="got -1 ns"):
        convert.ns_to_stamp(-1)


def test_compressed_images_convert_as_raw_ones_do() -> None:
    """The node treats both alike, and its own compressed output must come back as it went in."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    message = convert.compressed_image(encode_image(rgb, "png"), "rgb8; png compressed bgr8", Header(frame_id="camera"))
    assert isinstance(message, CompressedImage) and message.header.frame_id == "camera"
    assert np.array_equal(convert.image_to_rgb(message), rgb)
    with pytest.raises(EncodingError, match=r"got 0 bytes .*format 'jpeg'"):
        convert.image_to_rgb(CompressedImage(format="jpeg"))


SIZES = (0, 1, 2, 3, 7, 8, 8, 640, 65536, 2**31 - 1, 2**31, 2**32 - 1)
ENCODING_NAMES = (*ENCODINGS, "", "rgb9", "32FC1", "RGB8", "\N{GREEK SMALL LETTER PI}8")


def malformed_image(generator: np.random.Generator) -> Image:
    """An image message of some hundred bytes with fields of any value, a few of them consistent by chance."""

    def any_of(values: Sequence) -> Any:
        return values[generator.integers(len(values))]

    height, width = any_of(SIZES), any_of(SIZES)
    step = any_of((0, 1, width, width, 2 * width, 3 * width, 4 * width, 6 * width, 8 * width, 2**32 - 1))
    message = Image(height=height, width=width, step=min(step, 2**32 - 1), encoding=any_of(ENCODING_NAMES))
    message.is_bigendian = any_of((0, 1, 255))
    size = min(int(step * height * any_of((0.5, 1, 1, 1, 1.5, 3))), 600) + any_of((0, 0, 0, 1))
    message.data.frombytes(generator.bytes(size))
    return message


def malformed_compressed_image(generator: np.random.Generator, originals: list[np.ndarray]) -> CompressedImage:
    """A JPEG or PNG image with bytes changed, cut off or put before it."""
    data = originals[generator.integers(len(originals))].copy()
    # Most damage in the header: the image data behind it is longer, and less is decided there.
    where = (data.size * generator.random(generator.integers(1, 6)) ** 4).astype(int)
    data[where] = generator.integers(0, 256, where.size)
    data = data[: generator.choice([data.size, generator.integers(data.size)])]
    return convert.compressed_image(data, "jpeg", Header())


def test_malformed_images_are_refused_and_nothing_else() -> None:
    """10,000 messages as a broken driver may send them: an `EncodingError` each, or an image; no crash, no flood of
    memory, whatever size they claim.
    """
    generator = np.random.default_rng(0)
    originals = [
        encode_image(np.random.default_rng(1).integers(0, 256, (20, 24, 3), np.uint8), format)
        for format in ("jpeg", "png")
    ]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = {Image: 0, CompressedImage: 0}
    for number in range(10_000):
        if number % 4:
            message = malformed_image(generator)
        else:
            message = malformed_compressed_image(generator, originals)
        try:
            rgb = convert.image_to_rgb(message)
        except EncodingError as error:
            assert str(error)
            continue
        read[type(message)] += 1
        assert rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8 and rgb.size > 0
        if isinstance(message, Image):
            assert rgb.shape[:2] == (message.height, message.width)
    assert min(read.values()) > 100, read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 50_000


@pytest.mark.skipif(convert.BACKEND != "cv_bridge", reason="needs cv_bridge, which comes from apt: CONTRIBUTING.md")
def test_both_converters_agree() -> None:
    """A user with cv_bridge and one without must get the same flow."""
    generator = np.random.default_rng(1)
    for encoding in sorted(convert._BRIDGED):
        pixel = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono16": 2, "yuv422": 2, "yuv422_yuy2": 2}.get(encoding)
        pixel = pixel or (2 if encoding.endswith("16") else 1)
        message = Image(height=16, width=20, step=20 * pixel, encoding=encoding)
        message.data.frombytes(generator.integers(0, 256, 16 * 20 * pixel, np.uint8).tobytes())
        difference = convert.image_to_rgb(message).astype(int) - convert.image_to_rgb_numpy(message)
        assert np.abs(difference).max() <= 1, encoding
    array = generator.random((6, 8, 2)).astype(np.float32)
    assert convert.array_to_image(array, "32FC2", Header()) == convert.array_to_image_numpy(array, "32FC2", Header())
