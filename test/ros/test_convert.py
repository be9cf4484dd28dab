# SPDX-License-Identifier: Apache-2.0
"""Images and clouds as messages and back: exact, the same with and without ROS's own converters, errors named."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from sensor_msgs.msg import CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.imaging.encodings import ENCODINGS, EncodingError, encode_image
from deq_flow_ros.ros import messages
from deq_flow_ros.ros.outputs import FLOW_FIELDS, RAY_FIELDS, flow_points


def test_arrays_survive_the_way_into_a_message_and_back() -> None:
    """Step, size, byte order and values of each kind of output; a strided array must not publish its neighbours."""
    generator = np.random.default_rng(0)
    header = Header(stamp=messages.ns_to_stamp(1_234_567_890_123), frame_id="camera")
    cases = (("32FC2", (5, 7, 2), np.float32), ("32FC1", (5, 7), np.float32), ("rgb8", (5, 7, 3), np.uint8))
    for encoding, shape, dtype in cases:
        wide = (generator.random((5, 14, *shape[2:])) * 255).astype(dtype)
        array = wide[:, ::2]
        message = messages.array_to_image(array, encoding, header)
        assert (message.height, message.width, message.encoding, message.is_bigendian) == (5, 7, encoding, 0)
        assert message.step * message.height == len(message.data) and message.header == header
        assert np.array_equal(np.frombuffer(message.data, dtype).reshape(shape), array)


def test_stamps_keep_every_nanosecond() -> None:
    """Floating point seconds would lose a hundred nanoseconds and with them the match of stamps."""
    for nanoseconds in (0, 1, 999_999_999, 1_763_000_000_123_456_789):
        assert stamp_to_ns(messages.ns_to_stamp(nanoseconds)) == nanoseconds
    with pytest.raises(ValueError, match="got -1 ns"):
        messages.ns_to_stamp(-1)


def test_compressed_images_convert_as_raw_ones_do() -> None:
    """The node treats both alike, and its own compressed output must come back as it went in."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    format, header = "rgb8; png compressed bgr8", Header(frame_id="camera")
    message = messages.compressed_image(encode_image(rgb, "png"), format, header)
    assert isinstance(message, CompressedImage) and message.header.frame_id == "camera"
    assert np.array_equal(messages.image_to_rgb(message), rgb)
    with pytest.raises(EncodingError, match=r"got 0 bytes .*format 'jpeg'"):
        messages.image_to_rgb(CompressedImage(format="jpeg"))


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
    return messages.compressed_image(data, "jpeg", Header())


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
            rgb = messages.image_to_rgb(message)
        except EncodingError as error:
            assert str(error)
            continue
        read[type(message)] += 1
        assert rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8 and rgb.size > 0
        if isinstance(message, Image):
            assert rgb.shape[:2] == (message.height, message.width)
    assert min(read.values()) > 100, read
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 50_000


@pytest.mark.skipif(messages.BACKEND != "cv_bridge", reason="needs cv_bridge, which comes from apt: CONTRIBUTING.md")
def test_both_converters_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with cv_bridge and one without must get the same flow."""
    generator = np.random.default_rng(1)
    array = generator.random((6, 8, 2)).astype(np.float32)
    given = []
    for encoding in sorted(messages.BRIDGED):
        pixel = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "yuv422": 2, "yuv422_yuy2": 2}.get(encoding, 1)
        given.append(Image(height=16, width=20, step=20 * pixel, encoding=encoding))
        given[-1].data.frombytes(generator.integers(0, 256, 16 * 20 * pixel, np.uint8).tobytes())

    def converted() -> tuple[list[np.ndarray], Image]:
        return [messages.image_to_rgb(image) for image in given], messages.array_to_image(array, "32FC2", Header())

    theirs = converted()
    monkeypatch.setattr(messages, "BRIDGE", None)
    ours = converted()
    for image, one, other in zip(given, ours[0], theirs[0], strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1, image.encoding
    assert ours[1] == theirs[1]


@pytest.mark.parametrize(("number", "used"), [(cv2.CV_8UC3, "cv_bridge"), (cv2.CV_8UC3 + 1, "for another OpenCV")])
def test_a_cv_bridge_that_is_compiled_for_another_opencv_is_not_used(
    number: int, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of ROS beside a cv2 of pip: the numbers of types differ, and each image failed with a KeyError."""
    compiled = SimpleNamespace(cv_bridge_boost=None)
    bridge = SimpleNamespace(encoding_to_cvtype2=lambda encoding: number)
    monkeypatch.setitem(sys.modules, "cv_bridge", SimpleNamespace(CvBridge=lambda: bridge, boost=compiled))
    monkeypatch.setitem(sys.modules, "cv_bridge.boost", compiled)
    found, said = messages.find_bridge()
    assert re.search(used, said) and found is (bridge if used == said else None)


HEADER = Header(frame_id="camera")
CAMERA = CameraModel(60.0, 60.0, 32.0, 24.0, 64, 48, "plumb_bob", (-0.2, 0.05, 0.001, -0.001, 0.0))


def read(cloud: PointCloud2) -> dict[str, np.ndarray]:
    """(height, width) of each field, by the message's own description of it."""
    assert all(field.datatype == PointField.FLOAT32 and field.count == 1 for field in cloud.fields)
    assert cloud.row_step == cloud.width * cloud.point_step and len(cloud.data) == cloud.height * cloud.row_step
    names, offsets = [field.name for field in cloud.fields], [field.offset for field in cloud.fields]
    layout = {"names": names, "formats": ["<f4"] * len(names), "offsets": offsets, "itemsize": cloud.point_step}
    array = np.frombuffer(cloud.data, np.dtype(layout)).reshape(cloud.height, cloud.width)
    return {name: array[name] for name in names}


def test_each_point_is_a_pixel_and_its_flow() -> None:
    """An organized cloud, so that a point's row and column are the pixel's, divided by the stride."""
    flow = np.random.default_rng(0).normal(size=(48, 64, 2)).astype(np.float32)
    residual = np.random.default_rng(1).random((48, 64)).astype(np.float32)
    cloud = flow_points(flow, residual, 5, HEADER, None, None)
    values = read(cloud)
    assert tuple(values) == FLOW_FIELDS and (cloud.height, cloud.width) == (10, 13) and cloud.is_dense
    assert cloud.header == HEADER and (values["u"][3, 7], values["v"][3, 7]) == (35, 15)
    for name, expected in (("du", flow[..., 0]), ("dv", flow[..., 1]), ("residual", residual)):
        assert np.array_equal(values[name], expected[::5, ::5])


def test_rates_are_those_of_a_turning_camera() -> None:
    """A camera that only turns sees each bearing turn the other way; flow of that turn through the distorting lens must
    give it back, less the part around the bearing itself, which no flow of one pixel shows.
    """
    omega, elapsed_s = np.array([0.3, -0.8, 0.5]), 0.05
    pixels = np.mgrid[:48, :64][::-1].reshape(2, -1).T.astype(float)
    here = CAMERA.bearings(pixels)
    there = here @ cv2.Rodrigues(omega * elapsed_s)[0].T
    matrix = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    moved = cv2.projectPoints(there, np.zeros(3), np.zeros(3), matrix, np.array(CAMERA.distortion))[0].reshape(-1, 2)
    flow = (moved - pixels).reshape(48, 64, 2).astype(np.float32)
    for time, sign in ((elapsed_s, 1), (-elapsed_s, -1)):  # backward flow of a camera that turns the other way
        values = read(flow_points(flow, flow[..., 0], 4, HEADER, CAMERA, time))
        rates = np.stack([values[f"rate_{axis}"] for axis in "xyz"], axis=2).reshape(-1, 3) * sign
        bearings = np.stack([values[axis] for axis in "xyz"], axis=2).reshape(-1, 3)
        sampled = here.reshape(48, 64, 3)[::4, ::4].reshape(-1, 3)
        assert np.allclose(bearings, sampled, atol=1e-6)
        across = omega - sampled * (sampled @ omega)[:, None]
        # The bearing moves on a cone around omega, its mean rate along the chord's great circle: second order in angle.
        assert np.abs(rates - across).max() < 0.03 and np.linalg.norm(across, axis=1).min() > 0.1


def test_a_large_turn_is_not_flattened() -> None:
    """The angle itself, not its sine: a whip of 1 rad between two images would come out 16 % too slow."""
    flow = np.zeros((1, 1, 2), np.float32)
    flow[0, 0, 0] = 60 * np.tan(1.0)
    plain = CameraModel(60.0, 60.0, 0.0, 0.0, 64, 48)
    values = read(flow_points(flow, flow[..., 0], 1, HEADER, plain, 0.1))
    rate = [float(values[f"rate_{axis}"][0, 0]) for axis in "xyz"]
    assert rate == pytest.approx([0, 10.0, 0], abs=1e-5)  # towards +x around +y
    assert [float(values[axis][0, 0]) for axis in "xyz"] == pytest.approx([0, 0, 1])


def test_what_is_unknown_is_nan() -> None:
    """Invalid flow, a time that nobody knows, still pixels: no rate may be made up, none be lost."""
    flow = np.zeros((4, 4, 2), np.float32)
    flow[0, 0] = np.nan
    cloud = flow_points(flow, flow[..., 0], 2, HEADER, CAMERA, 0.1)
    values = read(cloud)
    assert tuple(values) == FLOW_FIELDS + RAY_FIELDS and not cloud.is_dense
    unknown = ("du", "dv", "rate_x", "rate_y", "rate_z")
    assert all(np.isnan(values[name][0, 0]) for name in unknown) and np.isfinite(values["x"]).all()
    assert all((values[name].reshape(-1)[1:] == 0).all() for name in unknown)
    for elapsed_s in (None, 0.0):
        assert np.isnan(read(flow_points(flow, flow[..., 0], 2, HEADER, CAMERA, elapsed_s))["rate_x"]).all()


@pytest.mark.skipif(messages.create_cloud is None, reason="needs sensor_msgs_py: test/launch_environment.sh")
def test_both_writers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with sensor_msgs_py and one without must get the same message."""
    values = messages.table_of("uv", np.random.default_rng(0).random((6, 2)))
    theirs = messages.make_cloud(HEADER, values)
    monkeypatch.setattr(messages, "create_cloud", None)
    assert messages.make_cloud(HEADER, values) == theirs
