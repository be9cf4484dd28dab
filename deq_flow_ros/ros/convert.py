# SPDX-License-Identifier: Apache-2.0
"""Images and point clouds as messages, to and from numpy: by cv_bridge and sensor_msgs_py where ROS provides them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header

from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.imaging.encodings import Levels, check_layout, decode_image, has_padded_rows, to_rgb
from deq_flow_ros.ros.messages import Region, VideoImage

try:
    from cv_bridge import CvBridge
    from cv_bridge.boost import cv_bridge_boost  # noqa: F401  without the compiled module cv_bridge cannot convert

    _bridge = CvBridge()
    BACKEND = "cv_bridge"
except (ImportError, AttributeError) as error:  # AttributeError: the ROS 1 cv_bridge of PyPI against a new OpenCV
    _bridge = None
    BACKEND = f"numpy (cv_bridge cannot be used: {error})"
"""Which converter is in use, for a start-up line."""
try:
    from sensor_msgs_py.point_cloud2 import create_cloud
except ImportError:
    create_cloud = None

FLOW_FIELDS = ("u", "v", "du", "dv", "residual")
RAY_FIELDS = ("x", "y", "z", "rate_x", "rate_y", "rate_z")

# What cv_bridge converts to rgb8: 8UC3 and the like carry no colour meaning for it, newer names are unknown to it.
# Of 16 bits it keeps the upper 8, whatever part of them a camera uses.
_BRIDGED = {"rgb8", "bgr8", "rgba8", "bgra8", "mono8", "yuv422", "yuv422_yuy2"} | {
    f"bayer_{pattern}8" for pattern in ("rggb", "bggr", "gbrg", "grbg")
}


def image_to_rgb(message: Image | CompressedImage | VideoImage, levels: Levels | None = None) -> np.ndarray:
    """RGB of an image message.

    :param levels: of the stream, which map 16 bits to 8; None for an image by itself.
    :returns: (H, W, 3) uint8, contiguous; may be a view of the message.
    :raises EncodingError: naming what is wrong.
    """
    if isinstance(message, VideoImage):
        assert message.picture is not None  # one without is not processed
        return message.picture.rgb()
    if isinstance(message, CompressedImage):
        return decode_image(np.frombuffer(message.data, np.uint8), message.format, levels)
    if _bridge is None or not _bridgeable(message):
        return image_to_rgb_numpy(message, levels)
    # cv_bridge trusts the fields of the message.
    check_layout(len(message.data), message.height, message.width, message.step, message.encoding)
    return np.ascontiguousarray(_bridge.imgmsg_to_cv2(message, desired_encoding="rgb8"))


def region(rgb: np.ndarray, roi: Region) -> np.ndarray:
    """A part of an (H, W, 3) image, contiguous: (height, width, 3).

    :param roi: x, y, width, height in pixels.
    :raises ValueError: where it reaches outside of the image.
    """
    x, y, width, height = roi
    if x + width > rgb.shape[1] or y + height > rgb.shape[0]:
        raise ValueError(
            f"roi {list(roi)} reaches outside of the image, {rgb.shape[1]}x{rgb.shape[0]}; set the parameter "
            "roi to a part of it, or to [0, 0, 0, 0] for all of it"
        )
    return np.ascontiguousarray(rgb[y : y + height, x : x + width])


def image_to_rgb_numpy(message: Image, levels: Levels | None = None) -> np.ndarray:
    """``image_to_rgb`` without cv_bridge."""
    data, big = np.frombuffer(message.data, np.uint8), bool(message.is_bigendian)
    return to_rgb(data, message.height, message.width, message.step, message.encoding, big, levels)


def _bridgeable(message: Image) -> bool:
    # cv_bridge misplaces rows whose padding is no whole number of pixels, and fails on foreign byte order with numpy 2.
    if message.encoding not in _BRIDGED or bool(message.is_bigendian) != (sys.byteorder == "big"):
        return False
    return not has_padded_rows(message.width, message.step, message.encoding)


def array_to_image(array: np.ndarray, encoding: str, header: Header) -> Image:
    """Message of an (H, W) or (H, W, C) array whose type fits ``encoding`` (rgb8, 32FC1, ...); copies the data."""
    if _bridge is not None:
        return _bridge.cv2_to_imgmsg(np.ascontiguousarray(array), encoding, header)
    return array_to_image_numpy(array, encoding, header)


def array_to_image_numpy(array: np.ndarray, encoding: str, header: Header) -> Image:
    """``array_to_image`` without cv_bridge."""
    height, width = array.shape[:2]
    channels = 1 if array.ndim == 2 else array.shape[2]
    step = width * channels * array.itemsize
    return bytes_to_image(array, height, width, step, encoding, sys.byteorder == "big", header)


def bytes_to_image(
    data: np.ndarray, height: int, width: int, step: int, encoding: str, is_bigendian: bool, header: Header
) -> Image:
    """Message of an array's bytes as they are."""
    message = Image(
        header=header, height=height, width=width, step=step, encoding=encoding, is_bigendian=int(is_bigendian)
    )
    # The one way that is fast on every distribution: assigning `data` checks each byte in Python on some.
    message.data.frombytes(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return message


def compressed_image(data: np.ndarray, format: str, header: Header) -> CompressedImage:
    """Message of compressed data (N,) uint8."""
    message = CompressedImage(header=header, format=format)
    message.data.frombytes(data.data)
    return message


def field_of(message: Image, encoding: str) -> np.ndarray:
    """The field of an image message: (H, W, 2) float32 of "32FC2", (H, W) of "32FC1".

    :raises ValueError: for another encoding, or fewer bytes than the size says.
    """
    if message.encoding != encoding:
        raise ValueError(f"expected an image in {encoding}, as flow_node publishes it, got {message.encoding!r}")
    height, width, channels = message.height, message.width, int(encoding[-1])
    row = 4 * channels * width
    if not height * width or message.step < row or len(message.data) < height * message.step:
        got = f"{len(message.data)} bytes in rows of {message.step}"
        raise ValueError(f"expected {height} rows of {row} bytes for {width}x{height} px in {encoding}, got {got}")
    rows = np.frombuffer(message.data, np.uint8, height * message.step).reshape(height, message.step)[:, :row]
    values = np.ascontiguousarray(rows).view(">f4" if message.is_bigendian else "<f4")
    return values.astype(np.float32, copy=False).reshape((height, width, channels)[: 2 + (channels > 1)])


def ns_to_stamp(nanoseconds: int) -> Time:
    """Message stamp of a time in nanoseconds; raises ValueError if a stamp cannot hold it (before 1970, after 2038)."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    if not 0 <= seconds < 2**31:
        raise ValueError(f"expected a stamp between 0 and {2**31 - 1} seconds, got {nanoseconds} ns")
    return Time(sec=seconds, nanosec=rest)


def flow_points(
    flow: np.ndarray,
    residual: np.ndarray,
    stride: int,
    header: Header,
    camera: CameraModel | None,
    elapsed_s: float | None,
) -> PointCloud2:
    """Every ``stride``-th pixel of flow (H, W, 2) px and residual (H, W) px, from the first on, as an organized cloud.

    The fields are float32: the pixel ``u``, ``v`` and its flow ``du``, ``dv``, NaN where there is none, and
    ``residual``, all in px. With the ``camera`` of the field's pixels also the unit bearing ``x``, ``y``, ``z`` of the
    pixel in the camera's optical frame (REP 103), and ``rate_x``, ``rate_y``, ``rate_z`` rad/s: b x db/dt of the
    bearing b, as it turns from (u, v) to (u + du, v + dv) in ``elapsed_s``. That is the time from the field's image to
    the one that its flow points to, so below 0 for backward flow; rates are NaN without it.
    """
    height, width = residual.shape
    pixels = _grid(height, width, stride)
    there = flow[::stride, ::stride].reshape(-1, 2)
    columns = [*pixels.T, *there.T, residual[::stride, ::stride].reshape(-1)]
    names: tuple[str, ...] = FLOW_FIELDS
    if camera is not None:
        bearings = _grid_bearings(camera, height, width, stride)
        rates = angular_rates(bearings, camera.bearings(pixels + there), elapsed_s)
        columns += [*bearings.T, *rates.T]
        names += RAY_FIELDS
    points = np.column_stack(columns).astype(np.float32)
    cloud = make_cloud(header, names, points)
    cloud.height, cloud.width = residual[::stride, ::stride].shape
    cloud.row_step = cloud.width * cloud.point_step
    cloud.is_dense = bool(np.isfinite(points).all())
    return cloud


@lru_cache(maxsize=4)
def _grid_bearings(camera: CameraModel, height: int, width: int, stride: int) -> np.ndarray:
    """(N, 3) bearings of every ``stride``-th pixel: the same for every field of a camera."""
    return camera.bearings(_grid(height, width, stride))


def _grid(height: int, width: int, stride: int) -> np.ndarray:
    """(N, 2) float64: x and y of every ``stride``-th pixel, row by row."""
    return np.mgrid[:height:stride, :width:stride][::-1].reshape(2, -1).T.astype(np.float64)


def angular_rates(here: np.ndarray, there: np.ndarray, elapsed_s: float | None) -> np.ndarray:
    """(N, 3) rad/s: the constant rotation that turns unit vectors ``here`` (N, 3) to ``there`` the short way.

    NaN without a time.
    """
    if not elapsed_s:
        return np.full(here.shape, np.nan)
    axis = np.cross(here, there)
    sine = np.linalg.norm(axis, axis=1)
    angle = np.arctan2(sine, np.sum(here * there, axis=1))
    return axis * (np.divide(angle, sine, out=np.ones_like(sine), where=sine > 0) / elapsed_s)[:, None]


def make_cloud(header: Header, names: Sequence[str], points: np.ndarray) -> PointCloud2:
    """A cloud of float32 ``points`` (N, fields), whose fields have these names."""
    fields = [
        PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
        for index, name in enumerate(names)
    ]
    if create_cloud is not None:
        return create_cloud(header, fields, points)
    return cloud_by_numpy(header, fields, points)


def cloud_by_numpy(header: Header, fields: list[PointField], points: np.ndarray) -> PointCloud2:
    """``create_cloud`` of sensor_msgs_py for points (N, fields), or (N,) of a structured type; a value has 4 bytes."""
    cloud = PointCloud2(header=header, height=1, width=len(points), fields=fields, point_step=4 * len(fields))
    cloud.row_step = cloud.point_step * len(points)
    cloud.is_bigendian = sys.byteorder == "big"
    cloud.data.frombytes(np.ascontiguousarray(points).reshape(-1).view(np.uint8).data)
    return cloud
