# SPDX-License-Identifier: Apache-2.0
"""Messages of video: ``ffmpeg_image_transport_msgs/FFMPEGPacket``, and ``foxglove.CompressedVideo`` in any form."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from deq_flow_ros.imaging.frame import stamp_to_ns
from deq_flow_ros.imaging.video import VideoPacket

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore

FFMPEG_PACKET, COMPRESSED_VIDEO = "ffmpeg_image_transport_msgs/msg/FFMPEGPacket", "foxglove_msgs/msg/CompressedVideo"
_DEFINITIONS = {
    FFMPEG_PACKET: "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8 flags\n"
    "bool is_bigendian\nuint8[] data\n",
    COMPRESSED_VIDEO: "builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n",
}


def add_types(store: Typestore) -> Typestore:
    """Teach rosbags the ROS messages, which its own stores lack."""
    from rosbags.typesys import get_types_from_msg  # not at the top: the node reads messages, and needs no rosbags

    for name, definition in _DEFINITIONS.items():
        store.register(get_types_from_msg(definition, name))
    return store


def packet_of(message: Any) -> VideoPacket:
    """What a message holds, whether it comes from ROS or from a recording."""
    data = bytes(message.data)
    if hasattr(message, "timestamp"):
        return VideoPacket(data, message.format, stamp_to_ns(message.timestamp), message.frame_id)
    header = message.header
    return VideoPacket(data, message.encoding, stamp_to_ns(header.stamp), header.frame_id, message.pts)


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
