# SPDX-License-Identifier: Apache-2.0
"""Messages of bags, independent of the file format."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.recordings.packets import FOREIGN, add_types

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Channel(NamedTuple):
    """The topic and type of messages, as a file describes them once.

    :ivar msgtype: such as "sensor_msgs/msg/Image"; for messages that are not from ROS, their name and encoding.
    :ivar ros1: whether messages are serialized as in ROS 1, not as CDR.
    """

    topic: str
    msgtype: str
    ros1: bool = False


class MessageError(MediaError):
    """A single message cannot be read. Other messages may be readable."""


@dataclass(frozen=True)
class Recorded:
    """A message of a bag, recorded at ``time_ns``."""

    channel: Channel
    time_ns: int
    _stored: bytes = field(repr=False)

    @property
    def topic(self) -> str:
        """Name of its topic."""
        return self.channel.topic

    @property
    def msgtype(self) -> str:
        """Name of its type, like "sensor_msgs/msg/Image"."""
        return self.channel.msgtype

    def raw(self) -> bytes:
        """The serialized message.

        :raises MessageError: if it was compressed and cannot be unpacked.
        """
        # A serialized message begins with its encoding, 0x00 0x00 or 0x00 0x01.
        if self._stored[:4] != ZSTD_MAGIC:
            return self._stored
        try:
            return zstd.decompress(self._stored)
        except zstd.ZstdError as error:
            raise self._unreadable(error) from error

    def message(self) -> Any:
        """The deserialized message, with its fields as attributes.

        :raises MessageError: if it cannot be decoded.
        """
        raw = self.raw()
        types = _types(self.channel.ros1)
        decode = types.deserialize_ros1 if self.channel.ros1 else types.deserialize_cdr
        try:
            return FOREIGN[self.msgtype](raw) if self.msgtype in FOREIGN else decode(raw, self.msgtype)
        except Exception as error:
            # With damaged bytes, the code that rosbags generates may raise any error.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> MessageError:
        what = f"the message ({self.msgtype}) on {self.topic} that was recorded at {self.time_ns} ns"
        return MessageError(f"{what} cannot be decoded: {type(error).__name__}: {error}")


class Damage(Exception):
    """Something cannot be read at this place; the message says what."""


def ros_type(name: str) -> str:
    """The ROS 2 name of a message type: "sensor_msgs/msg/Image" for ROS 1's "sensor_msgs/Image"."""
    package, _, message = name.rpartition("/")
    return name if not package or "/" in package else f"{package}/msg/{message}"


@cache
def _types(ros1: bool) -> Typestore:
    return add_types(get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY))
