# SPDX-License-Identifier: Apache-2.0
"""Images, fields and points as messages, to and from numpy; and the topics that images may come on.

cv_bridge and sensor_msgs_py are used where ROS provides them. The messages of video have no wheel on PyPI.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image, PointCloud2, PointField
from std_msgs.msg import Header

from deq_flow_ros.imaging.encodings import EncodingError, Levels, check_layout, decode_image, has_padded_rows, to_rgb
from deq_flow_ros.imaging.video import Picture, VideoDecoder, packet_of

try:
    from ffmpeg_image_transport_msgs.msg import FFMPEGPacket as FFMPEG
except ImportError:
    FFMPEG = None
try:
    from foxglove_msgs.msg import CompressedVideo as FOXGLOVE
except ImportError:
    FOXGLOVE = None
try:
    from sensor_msgs_py.point_cloud2 import create_cloud
except ImportError:
    create_cloud = None


def find_bridge() -> tuple[Any, str]:
    """The converter of ROS, or None where it cannot be used, and words on which is in use."""
    try:
        from cv_bridge import CvBridge
        from cv_bridge.boost import cv_bridge_boost  # noqa: F401  without the compiled module it cannot convert

        bridge = CvBridge()
        if bridge.encoding_to_cvtype2("bgr8") != cv2.CV_8UC3:  # OpenCV 5 has other numbers: each image would fail
            raise ImportError(f"it is compiled for another OpenCV than cv2 {cv2.__version__}")
    except (ImportError, AttributeError) as error:  # AttributeError: the ROS 1 cv_bridge of PyPI against a new OpenCV
        return None, f"numpy (cv_bridge cannot be used: {error})"
    return bridge, "cv_bridge"


BRIDGE, BACKEND = find_bridge()

BRIDGED = {"rgb8", "bgr8", "rgba8", "bgra8", "mono8", "yuv422", "yuv422_yuy2"}
BRIDGED |= {f"bayer_{pattern}8" for pattern in ("rggb", "bggr", "gbrg", "grbg")}
"""What cv_bridge converts to rgb8: 8UC3 and the like carry no colour meaning for it, newer names are unknown to it. Of
16 bits it keeps the upper 8, whatever part of them a camera uses."""


@dataclass(frozen=True)
class VideoImage:
    """Stands for a message of video where the node expects an image.

    :ivar picture: becomes RGB where it is used; None where there is none.
    """

    header: Header
    format: str
    picture: Picture | None


ImageMessage: TypeAlias = Image | CompressedImage | VideoImage


@dataclass(eq=False)
class ReceivedFrame:
    """A message that came, and what is known of it.

    :ivar arrival_ns: when it came, on the ``time.monotonic_ns`` clock.
    :ivar age_ms: from its stamp to its arrival by the ROS clock; None while that clock stands at zero.
    :ivar refused: why it is not to be processed; None if it is.
    :ivar starts_anew: why the stream starts anew before the next one that is processed; None if it does not.
    :ivar wanted: the outputs that somebody subscribed to when it came.
    :ivar accounted: whether it has had its account.
    """

    message: ImageMessage
    arrival_ns: int
    stamp_ns: int
    age_ms: float | None = None
    refused: str | None = None
    starts_anew: str | None = None
    wanted: AbstractSet[str] = frozenset()
    accounted: bool = False


@dataclass(frozen=True)
class Source:
    """A topic that may carry the images, and its message type."""

    topic: str
    kind: type

    def type_name(self) -> str:
        """As the ROS graph has it: "sensor_msgs/msg/Image"."""
        return f"{self.kind.__module__.partition('.')[0]}/msg/{self.kind.__name__}"


def candidates(node: Node, prefix: str, transport: str) -> Sequence[Source]:
    """Where the images of a camera may come from, by the parameter ``image_transport``; the best first.

    Names are image_transport's: the compressed images of IMAGE are on IMAGE/compressed, video is on IMAGE/ffmpeg or
    IMAGE/foxglove. A camera that has compressed images or video alone may as well publish them on IMAGE itself.

    :raises ValueError: for video whose messages are not installed.
    """
    image = node.resolve_topic_name(f"{prefix}image")

    def beside(name: str, kind: type) -> Source:
        return Source(node.resolve_topic_name(f"{image}/{name}"), kind)

    raw, compressed = Source(image, Image), [beside("compressed", CompressedImage), Source(image, CompressedImage)]
    kinds = {name: kind for name, kind in (("ffmpeg", FFMPEG), ("foxglove", FOXGLOVE)) if kind is not None}
    video = [beside(*one) for one in kinds.items()] + [Source(image, kind) for kind in kinds.values()]
    if transport == "video" and not video:
        raise ValueError(
            "image_transport is video, but no package of its messages is installed: "
            "apt install ros-$ROS_DISTRO-ffmpeg-image-transport-msgs or ros-$ROS_DISTRO-foxglove-msgs"
        )
    every = [raw, compressed[0], *video, compressed[1]]
    return {"raw": [raw], "compressed": compressed, "video": video, "auto": every}[transport]


def video_image(decoder: VideoDecoder, message: Any, lost: int) -> tuple[VideoImage, str | None]:
    """The picture of a message of video, or why there is none. Each has to be decoded, whether it is used or not.

    :param lost: messages that the middleware lost before it.
    """
    packet, problem, picture = packet_of(message), None, None
    stamp = message.timestamp if hasattr(message, "timestamp") else message.header.stamp
    try:
        picture = decoder.decode(packet, f"the network lost {lost} messages" if lost else "")
    except EncodingError as error:
        problem = str(error)
    return VideoImage(Header(stamp=stamp, frame_id=packet.frame_id), packet.format, picture), problem


def image_to_rgb(message: ImageMessage, levels: Levels | None = None) -> np.ndarray:
    """RGB of an image message: (H, W, 3) uint8, contiguous; may be a view of the message.

    :param levels: of the stream, which map 16 bits to 8; None for an image by itself.
    :raises EncodingError: naming what is wrong.
    """
    if isinstance(message, VideoImage):
        assert message.picture is not None  # one without is not processed
        return message.picture.rgb()
    data = np.frombuffer(message.data, np.uint8)
    if isinstance(message, CompressedImage):
        return decode_image(data, message.format, levels)
    shape, big = (message.height, message.width, message.step, message.encoding), bool(message.is_bigendian)
    # cv_bridge misplaces rows whose padding is no whole number of pixels, and fails on foreign byte order with numpy 2.
    bridged = BRIDGE is not None and message.encoding in BRIDGED and big == (sys.byteorder == "big")
    if not bridged or has_padded_rows(*shape[1:]):
        return to_rgb(data, *shape, big, levels)
    check_layout(data.size, *shape)  # cv_bridge trusts the fields of the message
    return np.ascontiguousarray(BRIDGE.imgmsg_to_cv2(message, desired_encoding="rgb8"))


def array_to_image(array: np.ndarray, encoding: str, header: Header) -> Image:
    """Message of an (H, W) or (H, W, C) array whose type fits ``encoding`` (rgb8, 32FC1, ...); copies the data."""
    if BRIDGE is not None:
        return BRIDGE.cv2_to_imgmsg(np.ascontiguousarray(array), encoding, header)
    height, width = array.shape[:2]
    step = array[0].size * array.itemsize
    return bytes_to_image(array, height, width, step, encoding, sys.byteorder == "big", header)


def bytes_to_image(
    data: np.ndarray, height: int, width: int, step: int, encoding: str, is_bigendian: bool, header: Header
) -> Image:
    """Message of an array's bytes as they are."""
    size = {"height": height, "width": width, "step": step}
    message = Image(header=header, encoding=encoding, is_bigendian=int(is_bigendian), **size)
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


def table_of(names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Rows (N, fields) of numbers as (N,) with these fields, each of float32, as ``make_cloud`` takes them."""
    table = np.ascontiguousarray(rows, np.float32).reshape(-1, len(names))
    return table.view([(name, np.float32) for name in names])[:, 0]


def make_cloud(header: Header, points: np.ndarray) -> PointCloud2:
    """A cloud of points (N,) with fields of float32 or uint32."""
    assert points.dtype.fields is not None
    types = {"f": PointField.FLOAT32, "u": PointField.UINT32}
    fields = [
        PointField(name=name, offset=offset, datatype=types[kind.kind], count=1)
        for name, (kind, offset, *_) in points.dtype.fields.items()
    ]
    if create_cloud is not None:
        return create_cloud(header, fields, points)
    size = points.dtype.itemsize
    cloud = PointCloud2(header=header, height=1, width=len(points), fields=fields, point_step=size)
    cloud.row_step = size * len(points)
    cloud.is_bigendian = sys.byteorder == "big"
    cloud.data.frombytes(points.tobytes())
    return cloud
