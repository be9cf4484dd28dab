# SPDX-License-Identifier: Apache-2.0
"""Messages and arrays: what is published is what was computed, and both converters agree."""

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from sensor_msgs.msg import Image
from std_msgs.msg import Header

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
        assert convert.stamp_to_ns(convert.ns_to_stamp(nanoseconds)) == nanoseconds
    with pytest.raises(ValueError, match="got -1 ns"):
        convert.ns_to_stamp(-1)


@pytest.mark.skipif(convert.BACKEND != "cv_bridge", reason=f"cv_bridge is not installed; in use: {convert.BACKEND}")
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
