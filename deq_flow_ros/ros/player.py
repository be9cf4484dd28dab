# SPDX-License-Identifier: Apache-2.0
"""``player``: a bag, video, image folder or camera as ``sensor_msgs/Image`` at the recorded rate.

    player INPUT [--topic T] [--rate R] [--loop] [--compressed jpeg|png] [--wait-for-subscribers N] [--max-frames N]
        [--log FILE] [--start S] [--stop S] [--max-pause-s S] [--fps HZ]

Every option is also a ROS parameter, which wins over the command line. The header stamp of a message is the recorded
one; with --loop the stamps start over at each pass. With --compressed the images go out as
``sensor_msgs/CompressedImage``, on ``<topic>/compressed`` alone. The calibration that a bag holds beside the images
goes out on the sibling ``camera_info``, with the header of each image. Pauses beyond --max-pause-s, and steps back of
the recording's clock, are skipped, and said. Exit status: 0 done or stopped, 2 unusable input or option, 3 no
subscriber came.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import rclpy
from rclpy.duration import Duration
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from std_msgs.msg import Header

from deq_flow_ros import UNUSABLE
from deq_flow_ros.command_line import USER_ERRORS, CommandLine, exit_status
from deq_flow_ros.imaging import MAX_PAUSE_S, Pace
from deq_flow_ros.imaging.encodings import FORMATS, Levels, encode_image, to_rgb
from deq_flow_ros.recordings import Frame, MediaError, Source, open_source
from deq_flow_ros.recordings.source import DEFAULT_FPS
from deq_flow_ros.recordings.sources import FrameReader
from deq_flow_ros.ros import process
from deq_flow_ros.ros.messages import bytes_to_image, ns_to_stamp
from deq_flow_ros.ros.parameter_table import as_declared, unused_overrides
from deq_flow_ros.ros.qos import given_overrides

QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
"""Reliable, so that subscribers of both kinds match; a slow one misses frames instead of slowing the player."""
LATE_NS = 1_000_000_000
"""Delay behind the schedule that is worth a warning."""


class NoSubscriberError(Exception):
    """Nobody subscribed in time."""


class Player(Node):
    """Publishes a source on ``~/image``."""

    def __init__(self, options: argparse.Namespace, stop: process.StopRequest) -> None:
        super().__init__("player")
        given = given_overrides(self)
        for name, value in vars(options).items():
            if name in given:
                given[name] = as_declared(given[name], value)
            self.declare_parameter(name, value)
        for line in unused_overrides(self, list(vars(options))):
            self.get_logger().warning(line)
        self._stop = stop
        self._compressed = self.option("compressed")
        if self._compressed not in ("", *FORMATS):
            raise ValueError(f"expected compressed to be {' or '.join(FORMATS)} (or empty), got {self._compressed!r}")
        topic = self.resolve_topic_name("~/image")
        kind, suffix = (CompressedImage, "/compressed") if self._compressed else (Image, "")
        self.publisher = self.create_publisher(kind, topic + suffix, QOS)
        self._levels = Levels()
        self._info_topic = topic.rpartition("/")[0] + "/camera_info"
        self._calibration: tuple[Publisher, CameraInfo] | None = None
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self.published, self.left_out = 0, 0
        self.stamps_ns: tuple[int, int] | None = None

    def option(self, name: str) -> Any:
        """Value of a parameter."""
        return self.get_parameter(name).value

    def play(self) -> Source:
        """Publish everything, or until stopped.

        :raises MediaError: for an input that cannot be read.
        :raises NoSubscriberError: if nobody subscribes in the time that was given for it.
        :raises ValueError: for a rate that is not above 0.
        """
        rate = self.option("rate")
        if not 0.0 < rate < float("inf"):
            raise ValueError(f"expected a rate above 0, got {rate}")
        for name in ("max_frames", "wait_for_subscribers", "wait_timeout_s", "fps", "max_pause_s"):
            if not 0 <= self.option(name) < math.inf:
                raise ValueError(f"expected {name} of at least 0, got {self.option(name)}")
        if not self.option("input"):
            raise MediaError("no input given: name a bag, a video, a folder of images or a camera index")
        source = open_source(
            self.option("input"), self.option("topic") or None, self.option("fps") or None, self.option("start"),
            self.option("stop") or math.inf,
        )  # fmt: skip
        self.get_logger().info(f"{source.description} -> {self.publisher.topic_name}")
        if source.odd_stamps:
            self.get_logger().warning(source.odd_stamps)
        if source.calibration:
            info = CameraInfo(**{**source.calibration, "roi": RegionOfInterest(**source.calibration["roi"])})
            self._calibration = self.create_publisher(CameraInfo, self._info_topic, QOS), info
            self.get_logger().info(f"its calibration -> {self._info_topic}")
        self._wait_for_subscribers(self.option("wait_for_subscribers"), self.option("wait_timeout_s"))
        reader = FrameReader(source, self.option("loop"))
        log = os.path.expanduser(self.option("log"))
        try:
            with open(log, "w", encoding="utf-8") if log else contextlib.nullcontext() as log_file:
                self._publish_all(reader, source, rate, log_file)
        except OSError as error:
            if error.errno == errno.ENOSPC and log:  # this error names no file
                raise MediaError(f"cannot write {log}: {error.strerror}") from error
            raise
        finally:
            reader.close()
            for problem in source.skipped:
                self.get_logger().warning(f"of the recording: {problem}")
        return source

    def _wait_for_subscribers(self, wanted: int, timeout_s: float) -> None:
        give_up = time.monotonic() + timeout_s
        while self.publisher.get_subscription_count() < wanted and not self._stop.requested:
            if time.monotonic() > give_up:
                raise NoSubscriberError(
                    f"waited {timeout_s:g} s for {wanted} subscriber(s) on {self.publisher.topic_name}, found "
                    f"{self.publisher.get_subscription_count()}; check topic names, ROS_DOMAIN_ID and the node's log"
                )
            self._executor.spin_once(timeout_sec=0.05)
        if wanted:  # our side knows the subscriber before it knows us: a best-effort one would miss the first frame
            self._spin_until(time.monotonic_ns() + 200_000_000)

    def _publish_all(self, reader: FrameReader, source: Source, rate: float, log_file: TextIO | None) -> None:
        limit, max_pause_s = self.option("max_frames"), self.option("max_pause_s")
        current_pass, first_due_ns, played_ns = -1, 0, 0
        for item in reader:
            if self._stop.requested:
                break
            if item is None:
                self._executor.spin_once(timeout_sec=0.0)
                continue
            number, frame = item
            if number and not self.published:  # a loop would go on like that for ever
                break
            if number != current_pass:
                # An absolute schedule from the first frame on: sleeping from frame to frame would drift.
                if number == 0:
                    first_due_ns = time.monotonic_ns()
                else:
                    played_ns += source.nominal_period_ns
                current_pass, pace = number, Pace(source.nominal_period_ns, max_pause_s)
            step_ns, skipped = pace.step(frame.record_ns)
            if skipped and not source.live:
                self.get_logger().warning(f"{skipped} before the frame stamped {frame.stamp_ns} ns; skipped")
            played_ns += step_ns
            due_ns = first_due_ns + round(played_ns / rate)
            try:
                message = self._message(frame)
            except ValueError as error:  # no image, it contradicts itself, or no message can hold its stamp
                self.left_out += 1
                self.get_logger().warning(f"left out the frame stamped {frame.stamp_ns} ns: {error}")
                continue
            if not source.live:
                self._spin_until(due_ns)
                if time.monotonic_ns() - due_ns > LATE_NS:
                    self.get_logger().warning("reading is slower than playing", throttle_duration_sec=5.0)
            if self._stop.requested:
                break
            self._publish(frame, message, log_file)
            if self.published == limit:
                break
        if self.left_out and not self.published:
            raise MediaError(f"none of the {self.left_out} frames can be published; the warnings above say why")
        # The process must not end before reliable subscribers have the last frames.
        self.publisher.wait_for_all_acked(Duration(seconds=5))

    def _message(self, frame: Frame) -> Image | CompressedImage:
        if frame.problem:
            raise ValueError(frame.problem)
        header = Header(stamp=ns_to_stamp(frame.stamp_ns), frame_id=frame.frame_id)
        pixels = (frame.data, frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
        if not self._compressed:
            return bytes_to_image(*pixels, header)
        # The words of compressed_image_transport: encoding of the source, then that of the compressed picture.
        message = CompressedImage(header=header, format=f"{frame.encoding}; {self._compressed} compressed bgr8")
        message.data.frombytes(encode_image(to_rgb(*pixels, self._levels), self._compressed).data)
        return message

    def _publish(self, frame: Frame, message: Image | CompressedImage, log_file: TextIO | None) -> None:
        if self._calibration is not None:
            publisher, info = self._calibration
            info.header = message.header
            publisher.publish(info)
        self.publisher.publish(message)
        if log_file:
            line = {"number": self.published, "stamp_ns": frame.stamp_ns, "published_ns": time.monotonic_ns()}
            log_file.write(json.dumps(line) + "\n")
        self.published += 1
        self.stamps_ns = (self.stamps_ns[0] if self.stamps_ns else frame.stamp_ns, frame.stamp_ns)

    def _spin_until(self, due_ns: int) -> None:
        """Serve parameter requests until a time on the ``time.monotonic_ns`` clock, or until stopped."""
        while not self._stop.requested and (left_s := (due_ns - time.monotonic_ns()) * 1e-9) > 0.0:
            if left_s > 0.003:
                self._executor.spin_once(timeout_sec=min(left_s - 0.002, 0.1))
            else:
                time.sleep(left_s)

    def summary(self, source: Source | None) -> str:
        """One line: what was published."""
        if self.stamps_ns is None:
            return "player: published 0 frames"
        first, last = (f"{stamp // 10**9}.{stamp % 10**9:09d}" for stamp in self.stamps_ns)
        problems = self.left_out + (len(source.skipped) if source else 0)
        skipped = f", {problems} problems, named above" if problems else ""
        return f"player: published {self.published} frames, first stamp {first}, last stamp {last}{skipped}"


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of a command line without its ROS arguments; the names are those of the parameters."""
    line = CommandLine("player", "Publish a recording or a camera as sensor_msgs/Image.")
    line.add_argument("input", nargs="?", default="", help="bag, video file, folder of images, or camera index")
    line.add_argument("--topic", default="", help="image topic of a bag that has several")
    line.add_number("--rate", 1.0, "speed; 1: as recorded")
    line.add_argument("--loop", action="store_true", help="start over at the end; the stamps start over as well")
    line.add_argument("--compressed", default="", metavar="jpeg|png", help="publish compressed images instead of raw")
    line.add_number("--wait-for-subscribers", 0, "start when N have come", metavar="N", least=0)
    line.add_number("--wait-timeout-s", 30.0, "and give up after S seconds", metavar="S", least=0)
    line.add_number("--max-frames", 0, "stop after N frames; 0: never", metavar="N", least=0)
    line.add_number("--fps", 0.0, f"rate of a folder of images; 0: {DEFAULT_FPS:g}", metavar="HZ", least=0)
    line.add_part()
    line.add_number("--max-pause-s", MAX_PAUSE_S, "skip pauses that last longer; 0: wait them out", metavar="S")
    line.add_argument("--log", default="", metavar="FILE", help="write one JSON line per published frame")
    return line.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Run the process; returns its exit status."""
    args = sys.argv if args is None else args
    options = parse_options(process.own_arguments(args))
    stop = process.start(args)

    def play() -> int:
        player, source = Player(options, stop), None
        try:
            source = player.play()
        finally:
            if source is not None or player.published:  # else the error says it all
                print(player.summary(source), flush=True)
            process.end_node(player)
        return 0

    errors: dict[type[Exception], int] = {NoSubscriberError: 3, ParameterException: UNUSABLE, **USER_ERRORS}
    try:
        return exit_status(play, errors, prefix="player", stream=sys.stderr)
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
