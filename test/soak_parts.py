# SPDX-License-Identifier: Apache-2.0
"""The processes around the node in a soak run: `python -m soak_parts {camera,relay,neighbour,listener} ...`.

The camera prepares all its messages before the first goes out, and then only sets stamps: what it costs does not
disturb what is measured. The relay is the least that a node in Python can do: it takes each image and publishes a field
of the same size, always the same one. The neighbour keeps one core busy.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import cv2
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rclpy.serialization import serialize_message
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import Image
from soak_faults import disturbances, schedule
from std_msgs.msg import Header

from deq_flow_ros.imaging.encodings import to_rgb
from deq_flow_ros.recordings import open_source
from deq_flow_ros.ros import process
from deq_flow_ros.ros.messages import array_to_image

MAX_FRAMES = 90
"""Frames of the input that are used; they are shown forwards, backwards, and so on, so that no pair is a cut."""
STAMP_OFFSET = 4
"""Of `header.stamp` in a serialized message: behind the encapsulation header of CDR (OMG DDSI-RTPS 10.2)."""
SETTLE_S = 1.0
"""From the first sight of the node's subscription until the first image: the node must know of the camera as well."""
PHASES = ("as it should", "flood", "silence", "another size", "clock in a loop")
"""What a camera that misbehaves does, in this order, over and over."""
PHASE_S, FLOOD_HZ, LOOP_S = 10.0, 200.0, 2.0
"""Length of each; rate of the images in a flood; length of the loop."""
RELAY_INPUT, RELAY_OUTPUT = "/relay/image_raw", "/relay/flow"


def half(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of half the size."""
    return size[0] // 2, size[1] // 2


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


@dataclass(frozen=True)
class Shot:
    """An image to be published.

    :ivar due_s: when, counted from the first.
    :ivar topic: on which of the topics.
    :ivar clock_offset_ns: how far its clock is off.
    :ivar over: faults that have ended with it.
    """

    due_s: float
    message: bytearray
    topic: int = 0
    clock_offset_ns: int = 0
    over: tuple[str, ...] = ()


def steady(messages: Sequence[bytearray], rate: float, seconds: float, topics: int = 1) -> Iterator[Shot]:
    """Each image on all topics in turn, at `rate` Hz on each and evenly spaced over all."""
    for number, message in zip(range(round(seconds * rate)), back_and_forth(messages), strict=False):
        for topic in range(topics):
            yield Shot((number + topic / topics) / rate, message, topic)


def misbehaving(
    messages: Sequence[bytearray], smaller: Sequence[bytearray], rate: float, seconds: float
) -> Iterator[Shot]:
    """In turn everything that `PHASES` names, `PHASE_S` each."""
    for number in range(math.ceil(seconds / PHASE_S)):
        phase, begin_s = PHASES[number % len(PHASES)], number * PHASE_S
        if phase == "silence":
            continue
        shown = smaller if phase == "another size" else messages
        for shot in steady(shown, FLOOD_HZ if phase == "flood" else rate, min(PHASE_S, seconds - begin_s)):
            loops = int(shot.due_s / LOOP_S) if phase == "clock in a loop" else 0
            yield Shot(begin_s + shot.due_s, shot.message, 0, -loops * round(1e9 * LOOP_S))


def faulty(messages: Sequence[bytearray], smaller: Sequence[bytearray], options: argparse.Namespace) -> Iterator[Shot]:
    """What is left of a run with faults, of which `begin_s` seconds are over."""
    numbers = range(round((options.seconds - options.begin_s) * options.rate))
    shown = zip(back_and_forth(messages), back_and_forth(smaller), strict=False)
    due_s = (options.begin_s + number / options.rate for number in numbers)
    over: tuple[str, ...] = ("camera killed",) if options.begin_s else ()
    faults = schedule(options.faults, options.seconds)
    for (at_s, wrong), (large, small) in zip(disturbances(faults, due_s), shown, strict=False):
        over += wrong.over
        for _ in range(wrong.copies):
            yield Shot(at_s - options.begin_s, small if wrong.smaller else large, 0, wrong.clock_offset_ns, over)
            over = ()


def publish_all(
    publishers: Sequence[Publisher], logs: Sequence[TextIO], shots: Iterator[Shot], stop: process.StopRequest
) -> None:
    """Publish in time, and write into the log of each topic the stamp in ns and `time.monotonic_ns` of its images.

    Each line is written before its image goes out: a process that is killed leaves none without a line.
    """
    begin_ns = time.monotonic_ns()
    for shot in shots:
        time.sleep(max(0.0, shot.due_s - (time.monotonic_ns() - begin_ns) * 1e-9))
        if stop.requested:
            break
        stamp_ns, now_ns = time.time_ns() + shot.clock_offset_ns, time.monotonic_ns()
        struct.pack_into("<iI", shot.message, STAMP_OFFSET, *divmod(stamp_ns, 10**9))
        message = bytes(shot.message)
        logs[shot.topic].writelines(f"{json.dumps(line)}\n" for line in [(kind, now_ns) for kind in shot.over])
        logs[shot.topic].write(f"{json.dumps((stamp_ns, now_ns))}\n")
        publishers[shot.topic].publish(message)


def camera(options: argparse.Namespace, stop: process.StopRequest) -> None:
    """Wait for subscribers, publish, write a log for each topic: one JSON pair a line."""
    messages = prepare(options.input, options.size, options.name)
    if options.misbehave or options.faults is not None:
        smaller = prepare(options.input, half(options.size), options.name)
        if options.misbehave:
            shots = misbehaving(messages, smaller, options.rate, options.seconds)
        else:
            shots = faulty(messages, smaller, options)
    else:
        shots = steady(messages, options.rate, options.seconds, len(options.topic))
    node = Node(options.name)
    # Reliable, so that it is the node's parameter qos_reliability that decides.
    publishers = [node.create_publisher(Image, topic, QoSProfile(depth=30)) for topic in options.topic]
    while not all(publisher.get_subscription_count() for publisher in publishers) and not stop.requested:
        time.sleep(0.05)
    time.sleep(SETTLE_S)
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(path, "w", buffering=1, encoding="utf-8")) for path in options.log]
        publish_all(publishers, logs, shots, stop)
    time.sleep(SETTLE_S)  # the last image is still on its way
    node.destroy_node()


def listen(options: argparse.Namespace, stop: process.StopRequest) -> None:
    """Subscribe reliably, as most programs do, and do nothing with what comes."""
    node = Node("listener")
    node.create_subscription(Image, options.topic[0], lambda _: None, 10)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while not stop.requested:
        executor.spin_once(timeout_sec=0.2)
    node.destroy_node()


def relay(stop: process.StopRequest) -> None:
    """Answer each image with a field of its size, under the image's header."""
    node = Node("relay")
    publisher = node.create_publisher(Image, RELAY_OUTPUT, qos_profile_sensor_data)
    field = Image()

    def answer(image: Image) -> None:
        nonlocal field
        if (field.height, field.width) != (image.height, image.width):
            field = array_to_image(np.ones((image.height, image.width, 2), np.float32), "32FC2", image.header)
        field.header = image.header
        publisher.publish(field)

    node.create_subscription(Image, RELAY_INPUT, answer, qos_profile_sensor_data)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while not stop.requested:
        executor.spin_once(timeout_sec=0.2)
    node.destroy_node()


def main(args: Sequence[str] | None = None) -> int:
    """Run one of the processes; returns its exit status."""
    args = sys.argv if args is None else args
    parser = argparse.ArgumentParser(prog="soak_parts")
    parser.add_argument("part", choices=["camera", "relay", "neighbour", "listener"])
    parser.add_argument("--input")
    parser.add_argument("--name", default="camera")
    parser.add_argument("--topic", action="append")
    parser.add_argument("--size", type=image_size)
    parser.add_argument("--rate", type=float, help="Hz")
    parser.add_argument("--misbehave", action="store_true", help="flood, fall silent, change size, loop the clock")
    parser.add_argument("--faults", type=int, metavar="SEED", help="what soak_faults.schedule makes of it")
    parser.add_argument("--begin-s", type=float, default=0.0, help="so many seconds of the run are over")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--log", action="append", help="one for each topic")
    options = parser.parse_args(remove_ros_args(args)[1:])
    stop = process.start(args)
    try:
        if options.part == "camera":
            camera(options, stop)
        if options.part == "relay":
            relay(stop)
        if options.part == "listener":
            listen(options, stop)
        while options.part == "neighbour" and not stop.requested:
            pass  # keeps one core busy, which is all that it is for
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
