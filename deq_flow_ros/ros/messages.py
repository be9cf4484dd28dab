# SPDX-License-Identifier: Apache-2.0
"""What the node takes in: images, raw, compressed or as video, the topics they may come on, and camera_info.

The messages of video have no wheel on PyPI. On a machine with ROS:
``apt install ros-$ROS_DISTRO-ffmpeg-image-transport-msgs`` or ``ros-$ROS_DISTRO-foxglove-msgs``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import Header

from deq_flow_ros.imaging.camera import CameraModel, known_distortion
from deq_flow_ros.imaging.encodings import EncodingError
from deq_flow_ros.imaging.video import Picture, VideoDecoder, packet_of

try:
    from ffmpeg_image_transport_msgs.msg import FFMPEGPacket as FFMPEG
except ImportError:
    FFMPEG = None
try:
    from foxglove_msgs.msg import CompressedVideo as FOXGLOVE
except ImportError:
    FOXGLOVE = None

VIDEO = tuple(kind for kind in (FFMPEG, FOXGLOVE) if kind is not None)
"""The types of messages that hold video and are installed."""


@dataclass(frozen=True)
class VideoImage:
    """Stands for a message of video where the node expects an image.

    :ivar format: of the video.
    :ivar picture: becomes RGB where it is used; None where there is none.
    """

    header: Header
    format: str
    picture: Picture | None


ImageMessage: TypeAlias = Image | CompressedImage | VideoImage


@dataclass(eq=False)
class ReceivedFrame:
    """A message, when it came, and how old it was then.

    :ivar arrival_ns: on the ``time.monotonic_ns`` clock.
    :ivar stamp_ns: of the message.
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
    raw, compressed_alone = Source(image, Image), Source(image, CompressedImage)
    compressed = Source(node.resolve_topic_name(f"{image}/compressed"), CompressedImage)
    named = [(name, kind) for name, kind in (("ffmpeg", FFMPEG), ("foxglove", FOXGLOVE)) if kind is not None]
    video = [Source(node.resolve_topic_name(f"{image}/{name}"), kind) for name, kind in named]
    video += [Source(image, kind) for _, kind in named]
    if transport == "raw":
        return [raw]
    if transport == "compressed":
        return [compressed, compressed_alone]
    if transport == "auto":
        return [raw, compressed, *video, compressed_alone]
    if not video:
        raise ValueError(
            "image_transport is video, but no package of its messages is installed: "
            "apt install ros-$ROS_DISTRO-ffmpeg-image-transport-msgs or ros-$ROS_DISTRO-foxglove-msgs"
        )
    return video


def info_topic(node: Node, image_topic: str, prefix: str) -> str | None:
    """Topic of the calibration of an image topic: by image_transport's convention ``camera_info`` beside it.

    None where that is what the node itself publishes.
    """
    topic = node.resolve_topic_name(f"{image_topic.rpartition('/')[0]}/camera_info")
    return None if topic == node.resolve_topic_name(f"{prefix}camera_info") else topic


Region = tuple[int, int, int, int]
"""x, y, width, height in pixels of an image; all 0 is the whole image, as in ``sensor_msgs/RegionOfInterest``."""
WHOLE: Region = (0, 0, 0, 0)
LEAST_FOCAL = 0.05
"""Focal length of the widest lens, 168 degrees, relative to the width of the image."""


def camera_model(message: CameraInfo, rectified: bool = False) -> CameraModel:
    """The camera of the images that ``message`` describes, its region of interest and binning included.

    :param rectified: of the images that image_proc rectifies, by P, in the frame that R turns to; else of those as they
        were taken, by K and D, in the frame of the lens.
    :raises ValueError: for an uncalibrated camera, or values that contradict each other or are unknown.
    """
    name, matrix = ("P", message.p.reshape(3, 4)) if rectified else ("K", message.k.reshape(3, 3))
    if not message.k[0] or not matrix[0, 0]:
        raise ValueError(f"the camera is not calibrated: expected {name}[0] above 0, got {matrix[0, 0]:g}")
    if (matrix[2, :3] != (0, 0, 1)).any():
        raise ValueError(f"expected 0, 0, 1 as the last row of {name}, got {matrix[2].tolist()}: is it transposed?")
    if 0 < matrix[0, 0] < LEAST_FOCAL * message.width:
        raise ValueError(
            f"expected a focal length in pixels, got {name}[0] = {matrix[0, 0]:g} for {message.width} px of width, as "
            "one in millimetres or metres would be"
        )
    if matrix[0, 1]:
        raise ValueError(f"expected a camera without skew, got {name}[1] = {matrix[0, 1]:g}")
    model, distortion = known_distortion(message.distortion_model, message.d)
    # Drivers without distortion name any model or none. Of a fisheye, zeros have a meaning.
    if rectified or (model != "equidistant" and not any(distortion)):
        model, distortion = "none", ()
    sensor = CameraModel(
        fx=float(matrix[0, 0]),
        fy=float(matrix[1, 1]),
        cx=float(matrix[0, 2]),
        cy=float(matrix[1, 2]),
        width=message.width,
        height=message.height,
        distortion_model=model,
        distortion=distortion,
    )
    x, y, width, height = _sensor_region(message)
    binning_x, binning_y = _binning(message)
    return sensor.cropped(x, y, width, height).scaled(1 / binning_x, 1 / binning_y)


def image_size(message: CameraInfo) -> tuple[int, int]:
    """Height and width of the images that ``message`` describes; 0 where an uncalibrated camera says none."""
    _, _, width, height = _sensor_region(message)
    binning_x, binning_y = _binning(message)
    return height // binning_y, width // binning_x


def adapted(message: CameraInfo, header: Header, roi: Region, size: tuple[int, int]) -> CameraInfo:
    """The camera_info, with ``header``, of the part ``roi`` of its image after that was resized to ``size`` (height,
    width).

    A part changes the region of interest, in pixels of the sensor, as image_proc's crop_decimate does. Another size
    scales K and P, as image_proc's resize does; the region and the binning, which another scale would not leave whole
    numbers, then become part of K and P.

    :raises ValueError: for a part that is not within the image that ``message`` describes.
    """
    result = copy.copy(message)
    result.header = header
    image_height, image_width = image_size(message)
    x, y, width, height = roi if roi != WHOLE else (0, 0, image_width, image_height)
    if width < 1 or height < 1 or x < 0 or y < 0 or x + width > image_width or y + height > image_height:
        part = f"x {x}, y {y}, width {width}, height {height}"
        raise ValueError(f"expected a region within the {image_width} x {image_height} px of camera_info, got {part}")
    sensor_x, sensor_y, _, _ = _sensor_region(message)
    binning_x, binning_y = _binning(message)
    left, top = sensor_x + x * binning_x, sensor_y + y * binning_y
    if size == (height, width):
        if roi not in (WHOLE, (0, 0, image_width, image_height)):
            result.roi = RegionOfInterest(
                x_offset=left, y_offset=top, width=width * binning_x, height=height * binning_y, do_rectify=True
            )
        return result
    scale_x, scale_y = size[1] / width / binning_x, size[0] / height / binning_y
    for name, columns in (("k", 3), ("p", 4)):
        scaled = getattr(message, name).reshape(3, columns).copy()
        scaled[:2, 2] -= scaled[2, 2] * np.array([left, top])
        scaled[0] *= scale_x
        scaled[1] *= scale_y
        setattr(result, name, scaled.reshape(-1))
    result.height, result.width = size
    result.binning_x = result.binning_y = 0
    result.roi = RegionOfInterest()
    return result


def _sensor_region(message: CameraInfo) -> Region:
    """x, y, width, height of the region of interest, in pixels of the sensor, binned or not."""
    roi = message.roi
    if not roi.width and not roi.height:
        return 0, 0, message.width, message.height
    return roi.x_offset, roi.y_offset, roi.width, roi.height


def _binning(message: CameraInfo) -> tuple[int, int]:
    """Pixels of the sensor per pixel of the image, across and down; 0 counts as 1."""
    return max(1, message.binning_x), max(1, message.binning_y)


class VideoInput:
    """Decodes the messages of one subscription, each of which has to be, whether its picture is used or not."""

    def __init__(self) -> None:
        self._decoder = VideoDecoder()

    def image(self, message: Any, lost: int) -> tuple[VideoImage, str | None]:
        """The picture of a message, or why there is none.

        :param lost: messages that the middleware lost before it.
        """
        packet = packet_of(message)
        time = message.timestamp if hasattr(message, "timestamp") else message.header.stamp
        header = Header(stamp=Time(sec=time.sec, nanosec=time.nanosec), frame_id=packet.frame_id)
        try:
            picture = self._decoder.decode(packet, f"the network lost {lost} messages" if lost else "")
        except EncodingError as error:
            return VideoImage(header, packet.format, None), str(error)
        return VideoImage(header, packet.format, picture), None
