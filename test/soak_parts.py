# SPDX-License-Identifier: Apache-2.0
"""The processes around the node in a soak run: `python -m soak_parts camera ...` and `python -m soak_parts neighbour`.

The camera prepares all its messages before the first goes out, and then only sets stamps: what it costs does not
disturb what is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from rclpy.serialization import serialize_message
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from deq_flow_ros.media import open_source
from deq_flow_ros.media.encodings import to_rgb
from deq_flow_ros.ros import process
from deq_flow_ros.ros.convert import array_to_image

MAX_FRAMES = 90
"""Frames of the input that are used; they are shown forwards, backwards, and so on, so that no pair is a cut."""
STAMP_OFFSET = 4
"""Of `header.stamp` in a serialized message: behind the encapsulation header of CDR (OMG DDSI-RTPS 10.2)."""
SETTLE_S = 1.0
"""From the first sight of the node's subscription until the first image: the node must know of the camera as well."""


def image_size(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT", for argparse."""
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, got {text!r}")
    return int(width), int(height)


def read_stamp(data: bytes) -> int:
    """Nanoseconds of the stamp of a serialized message that begins with a header."""
    seconds, nanoseconds = struct.unpack_from("<iI", data, STAMP_OFFSET)
    return seconds * 10**9 + nanoseconds


def prepare(input: str, size: tuple[int, int], frame_id: str) -> list[bytearray]:
    """Serialized rgb8 images (width, height) = `size` of the first frames of a bag, video or folder.

    Raises `MediaError` for an input that cannot be read.
    """
    messages = []
    for frame in itertools.islice(open_source(input).frames(), MAX_FRAMES):
        rgb = to_rgb(frame.data, frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
        resized = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        message = array_to_image(np.ascontiguousarray(resized), "rgb8", Header(frame_id=frame_id))
        messages.append(bytearray(serialize_message(message)))
    return messages


def back_and_forth(messages: Sequence[bytearray]) -> Iterator[bytearray]:
    """0, 1, ..., n - 1, n - 2, ..., 1, 0, 1, ..."""
    return itertools.cycle([*messages, *messages[-2:0:-1]])


def publish_all(
    publisher: Publisher, messages: Sequence[bytearray], rate: float, seconds: float, stop: process.StopRequest
) -> list[tuple[int, int]]:
    """Publish at `rate` Hz; returns (stamp in ns by the wall clock, `time.monotonic_ns` when it went out) of each."""
    published = []
    first_ns, period_ns = time.monotonic_ns(), round(1e9 / rate)
    for number, message in zip(range(round(seconds * rate)), back_and_forth(messages), strict=False):
        time.sleep(max(0.0, (first_ns + number * period_ns - time.monotonic_ns()) * 1e-9))
        if stop.requested:
            break
        stamp_ns, now_ns = time.time_ns(), time.monotonic_ns()
        struct.pack_into("<iI", message, STAMP_OFFSET, *divmod(stamp_ns, 10**9))
        publisher.publish(bytes(message))
        published.append((stamp_ns, now_ns))
    return published


def camera(options: argparse.Namespace, stop: process.StopRequest) -> None:
    """Wait for a subscriber, publish, write the log: one JSON pair of numbers a line."""
    messages = prepare(options.input, options.size, options.name)
    node = Node(options.name)
    # Reliable, so that it is the node's parameter qos_reliability that decides.
    publisher = node.create_publisher(Image, options.topic, QoSProfile(depth=30))
    while publisher.get_subscription_count() == 0 and not stop.requested:
        time.sleep(0.05)
    time.sleep(SETTLE_S)
    published = publish_all(publisher, messages, options.rate, options.seconds, stop)
    time.sleep(SETTLE_S)  # the last image is still on its way
    node.destroy_node()
    Path(options.log).write_text("".join(json.dumps(pair) + "\n" for pair in published))


def main(args: Sequence[str] | None = None) -> int:
    """Run one of the processes; returns its exit status."""
    args = sys.argv if args is None else args
    parser = argparse.ArgumentParser(prog="soak_parts")
    parser.add_argument("part", choices=["camera", "neighbour"])
    parser.add_argument("--input")
    parser.add_argument("--name", default="camera")
    parser.add_argument("--topic")
    parser.add_argument("--size", type=image_size)
    parser.add_argument("--rate", type=float, help="Hz")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--log")
    options = parser.parse_args(remove_ros_args(args)[1:])
    stop = process.start(args)
    try:
        if options.part == "camera":
            camera(options, stop)
        while options.part == "neighbour" and not stop.requested:
            pass  # keeps one core busy, which is all that it is for
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
