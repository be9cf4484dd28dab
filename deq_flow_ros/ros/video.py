# SPDX-License-Identifier: Apache-2.0
"""Messages of video as images: the one place that knows whether their packages are installed.

They have no wheel on PyPI. On a machine with ROS: ``apt install ros-$ROS_DISTRO-ffmpeg-image-transport-msgs`` or
``ros-$ROS_DISTRO-foxglove-msgs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builtin_interfaces.msg import Time
from std_msgs.msg import Header

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
        header, picture, problem = (
            Header(stamp=Time(sec=time.sec, nanosec=time.nanosec), frame_id=packet.frame_id),
            None,
            None,
        )
        try:
            picture = self._decoder.decode(packet, f"the network lost {lost} messages" if lost else "")
        except EncodingError as error:
            problem = str(error)
        return VideoImage(header, packet.format, picture), problem
