# SPDX-License-Identifier: Apache-2.0
"""Messages of bags, independent of the file format; those of video in every form: ``ffmpeg_image_transport_msgs``,
``foxglove.CompressedVideo`` of ROS, as protobuf and as JSON.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from deq_flow_ros.imaging import MediaError

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
        types = message_types(self.channel.ros1)
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
def message_types(ros1: bool = False) -> Typestore:
    """The types of rosbags, and those of video, which its own stores lack."""
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_JAZZY)
    for name, definition in _DEFINITIONS.items():
        store.register(get_types_from_msg(definition, name))
    return store


FFMPEG_PACKET, COMPRESSED_VIDEO = "ffmpeg_image_transport_msgs/msg/FFMPEGPacket", "foxglove_msgs/msg/CompressedVideo"
_DEFINITIONS = {
    FFMPEG_PACKET: "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8 flags\n"
    "bool is_bigendian\nuint8[] data\n",
    COMPRESSED_VIDEO: "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
}


def _from_json(raw: bytes) -> Any:
    fields = json.loads(raw)
    time = fields["timestamp"]
    stamp = SimpleNamespace(sec=int(time["sec"]), nanosec=int(time["nsec"]))
    data = base64.b64decode(fields["data"], validate=True)
    return SimpleNamespace(timestamp=stamp, frame_id=fields["frame_id"], data=data, format=fields["format"])


def _from_protobuf(raw: bytes) -> Any:
    fields = dict(_fields(raw))
    time = dict(_fields(fields.get(1, b"")))
    stamp = SimpleNamespace(sec=int(time.get(1, 0)), nanosec=int(time.get(2, 0)))
    frame_id, format = (fields.get(number, b"").decode() for number in (2, 4))
    return SimpleNamespace(timestamp=stamp, frame_id=frame_id, data=fields.get(3, b""), format=format)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a message: https://protobuf.dev/programming-guides/encoding.

    Four fields do not make protobuf worth a dependency, whose versions other packages pin as well.
    """
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = raw[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(raw):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        place += size
        if place > len(raw):
            raise ValueError("it ends early")
        yield tag >> 3, raw[place - size : place]


FOREIGN: dict[str, Callable[[bytes], Any]] = {
    "foxglove.CompressedVideo in protobuf": _from_protobuf,
    "foxglove.CompressedVideo in jsonschema": _from_json,
}
"""How the messages of such a type are read that are not ROS's."""
VIDEO = (*_DEFINITIONS, *FOREIGN)
"""Every type of message that holds video."""
