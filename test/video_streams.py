# SPDX-License-Identifier: Apache-2.0
"""Short videos for tests: encoded by FFmpeg, packet by packet, and written into bags of every kind that holds them."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

HEIGHT, WIDTH, COUNT, KEY_EVERY = 120, 160, 12, 4
FIRST_NS, PERIOD_NS = 1_700_000_000_000_000_000, 40_000_000
TOPIC = "/camera/image_raw/ffmpeg"
OPTIONS = {
    "libx264": ("x264-params", f"keyint={KEY_EVERY}:scenecut=0:bframes=0:ref=2:crf=12"),
    "libx265": ("x265-params", f"keyint={KEY_EVERY}:scenecut=0:bframes=0:ref=2:crf=12:repeat-headers=1:log-level=none"),
}
CODECS = tuple(OPTIONS)


def stamp_of(number: int) -> int:
    return FIRST_NS + number * PERIOD_NS


def source_pictures(count: int = COUNT, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    """RGB, a grey texture over soft colours, which moves by 3 px a frame."""
    random = np.random.default_rng(5)
    size = (width + 3 * count, height)
    texture = cv2.resize(random.integers(0, 80, (18, 40), np.uint8), size, interpolation=cv2.INTER_CUBIC)[..., None]
    texture = cv2.resize(random.integers(60, 160, (3, 6, 3), np.uint8), size) + texture
    return [np.ascontiguousarray(texture[:, 3 * i : 3 * i + width]) for i in range(count)]


def encode(
    pictures: list[np.ndarray],
    codec: str,
    more: str = "",
    pixels: str = "yuv420p",
    tune: str = "zerolatency",
    **of: int,
) -> list[bytes]:
    """One packet a picture, unless ``more`` options of the encoder have it otherwise.

    :param of: colour attributes of the pictures.
    """
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = pictures[0].shape[:2]
    context.pix_fmt, context.time_base = pixels, Fraction(1, 25)
    name, options = OPTIONS[codec]
    context.options = {name: options + more, "preset": "ultrafast"} | ({"tune": tune} if tune else {})
    packets = []
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixels, threads=1, **of)
        frame.pts = number
        packets += context.encode(frame)
    return [bytes(packet) for packet in packets + context.encode(None)]


TYPES = get_typestore(Stores.ROS2_JAZZY)
FFMPEG, FOXGLOVE = "ffmpeg_image_transport_msgs/msg/FFMPEGPacket", "foxglove_msgs/msg/CompressedVideo"
TYPES.register(
    get_types_from_msg(
        "std_msgs/Header header\nint32 width\nint32 height\nstring encoding\nuint64 pts\nuint8 flags\n"
        "bool is_bigendian\nuint8[] data\n",
        FFMPEG,
    )
)
TYPES.register(
    get_types_from_msg("builtin_interfaces/Time timestamp\nstring frame_id\nuint8[] data\nstring format\n", FOXGLOVE)
)


def write_ros(path: Path, packets: dict[int, bytes], kind: str, format: str, topic: str = TOPIC) -> Path:
    """A rosbag2 in MCAP of packets by their number in the stream."""
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection(topic, kind, typestore=TYPES)
        for number, data in packets.items():
            time = TYPES.types["builtin_interfaces/msg/Time"](*divmod(stamp_of(number), 10**9))
            content = np.frombuffer(data, np.uint8)
            if kind == FFMPEG:
                header = TYPES.types["std_msgs/msg/Header"](time, "eye")
                message = TYPES.types[kind](header, WIDTH, HEIGHT, format, number, 0, False, content)
            else:
                message = TYPES.types[kind](time, "eye", content, format)
            writer.write(connection, stamp_of(number) + 5_000_000, TYPES.serialize_cdr(message, kind))
    return path


def write_foxglove(path: Path, packets: dict[int, bytes], format: str) -> Path:
    """An MCAP file of ``foxglove.CompressedVideo`` in protobuf, written by the libraries of both."""
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start("", "test")
        schema = writer.register_schema("foxglove.CompressedVideo", "protobuf", b"")
        channel = writer.register_channel(TOPIC, "protobuf", schema)
        for number, data in packets.items():
            seconds, rest = divmod(stamp_of(number), 10**9)
            fields = {"timestamp": {"seconds": seconds, "nanos": rest}, "frame_id": "eye", "format": format}
            raw = _protobuf()(**fields, data=data).SerializeToString()
            writer.add_message(channel, stamp_of(number) + 5_000_000, raw, stamp_of(number))
        writer.finish()
    return path


@cache
def _protobuf() -> type:
    """https://github.com/foxglove/foxglove-sdk/blob/main/schemas/proto/foxglove/CompressedVideo.proto"""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(name="video.proto", package="foxglove", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    message = file.message_type.add(name="CompressedVideo")
    kinds = descriptor_pb2.FieldDescriptorProto
    stamp, text, data = kinds.TYPE_MESSAGE, kinds.TYPE_STRING, kinds.TYPE_BYTES
    named = {"timestamp": stamp, "frame_id": text, "data": data, "format": text}
    for number, (name, kind) in enumerate(named.items(), 1):
        field = message.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
        if kind == stamp:
            field.type_name = ".google.protobuf.Timestamp"
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("foxglove.CompressedVideo"))
