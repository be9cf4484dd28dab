# SPDX-License-Identifier: Apache-2.0
"""Where the images of a camera, and its calibration, may come from; and an image that came."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image

ImageMessage: TypeAlias = Image | CompressedImage


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
    kind: type[ImageMessage]

    def type_name(self) -> str:
        """As the ROS graph has it: "sensor_msgs/msg/Image"."""
        return f"sensor_msgs/msg/{self.kind.__name__}"


def candidates(node: Node, prefix: str, transport: str) -> Sequence[Source]:
    """Where the images of a camera may come from, by the parameter ``image_transport``; the best first.

    Names are image_transport's: the compressed images of IMAGE are on IMAGE/compressed. A camera that has compressed
    images alone may as well publish them on IMAGE itself.
    """
    image = node.resolve_topic_name(f"{prefix}image")
    raw, compressed_alone = Source(image, Image), Source(image, CompressedImage)
    compressed = Source(node.resolve_topic_name(f"{image}/compressed"), CompressedImage)
    by_transport = {
        "raw": (raw,),
        "compressed": (compressed, compressed_alone),
        "auto": (raw, compressed, compressed_alone),
    }
    return by_transport[transport]


def info_topic(node: Node, image_topic: str, prefix: str) -> str | None:
    """Topic of the calibration that belongs to an image topic: by image_transport's convention ``camera_info`` beside
    it.

    None where that is what the node itself publishes.
    """
    topic = node.resolve_topic_name(f"{image_topic.rpartition('/')[0]}/camera_info")
    return None if topic == node.resolve_topic_name(f"{prefix}camera_info") else topic
