# SPDX-License-Identifier: Apache-2.0
"""Where the images of a camera, and its calibration, may come from; and an image that came."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image

from deq_flow_ros.ros.video import FFMPEG, FOXGLOVE, VideoImage

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
    by_transport = {
        "raw": (raw,),
        "compressed": (compressed, compressed_alone),
        "video": (*video,),
        "auto": (raw, compressed, *video, compressed_alone),
    }
    if not by_transport[transport]:
        raise ValueError(
            "image_transport is video, but no package of its messages is installed: "
            "apt install ros-$ROS_DISTRO-ffmpeg-image-transport-msgs or ros-$ROS_DISTRO-foxglove-msgs"
        )
    return by_transport[transport]


def info_topic(node: Node, image_topic: str, prefix: str) -> str | None:
    """Topic of the calibration that belongs to an image topic: by image_transport's convention ``camera_info`` beside
    it.

    None where that is what the node itself publishes.
    """
    topic = node.resolve_topic_name(f"{image_topic.rpartition('/')[0]}/camera_info")
    return None if topic == node.resolve_topic_name(f"{prefix}camera_info") else topic
