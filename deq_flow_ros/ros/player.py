# SPDX-License-Identifier: Apache-2.0
"""``player``: a bag, video, image folder or camera as ``sensor_msgs/Image`` at the recorded rate.

Every option is also a ROS parameter, which wins over the command line. The header stamp of a message is the recorded
one. Exit status: 0 done or stopped, 2 unusable input or option, 3 no subscriber came.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
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
from deq_flow_ros.recordings import Frame, FrameReader, MediaError, Source, open_source
from deq_flow_ros.recordings.source import DEFAULT_FPS
from deq_flow_ros.ros import process
from deq_flow_ros.ros.messages import bytes_to_image, compressed_image, ns_to_stamp
from deq_flow_ros.ros.parameter_table import ParameterTable
from deq_flow_ros.settings import at_start, number, one_of

QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
"""Reliable, so that subscribers of both kinds match; a slow one misses frames instead of slowing the player."""
LATE_NS = 1_000_000_000
"""Delay behind the schedule that is worth a warning."""
MOST = 1e9


class NoSubscriberError(Exception):
    """Nobody subscribed in time."""


@dataclasses.dataclass(frozen=True)
class PlayerSettings(ParameterTable):
    """The options of the command line and parameters of the node."""

    input: str = at_start("", "bag, video file, folder of images, or camera index")
    topic: str = at_start("", "image topic of a bag that has several")
    rate: float = at_start(number(1.0, 0.001, MOST), "speed; 1: as recorded")
    loop: bool = at_start(False, "start over at the end; the stamps start over as well")
    compressed: str = at_start(one_of("", *FORMATS), "publish compressed images instead of raw: jpeg or png")
    wait_for_subscribers: int = at_start(number(0, 0, 1000), "start when so many have come")
    wait_timeout_s: float = at_start(number(30.0, 0, MOST), "and give up after so many seconds")
    max_frames: int = at_start(number(0, 0, 2**31), "stop after so many frames; 0: never")
    fps: float = at_start(number(0.0, 0, MOST), f"rate of a folder of images in Hz; 0: {DEFAULT_FPS:g}")
    start: float = at_start(number(0.0, 0, MOST), "begin so many seconds after the first frame")
    stop: float = at_start(number(0.0, 0, MOST), "and end there; 0: at the end")
    max_pause_s: float = at_start(number(MAX_PAUSE_S, 0, MOST), "skip pauses that last longer; 0: wait them out")
    log: str = at_start("", "write one JSON line per published frame to this file")


class Player(Node):
    """Publishes a source on ``~/image``.

    :param options: those of the command line, by the names of the parameters.
    :raises ValueError: for a parameter that cannot be; or rclpy's ParameterException.
    """

    def __init__(self, options: dict[str, Any], stop: process.StopRequest) -> None:
        super().__init__("player")
        PlayerSettings.declare(self, **options)
        self.settings = PlayerSettings.read(self)
        self._stop = stop
        topic = self.resolve_topic_name("~/image")
        kind, suffix = (CompressedImage, "/compressed") if self.settings.compressed else (Image, "")
        self.publisher = self.create_publisher(kind, topic + suffix, QOS)
        self._levels = Levels()
        self._info_topic = topic.rpartition("/")[0] + "/camera_info"
        self._calibration: tuple[Publisher, CameraInfo] | None = None
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self.published, self.left_out = 0, 0
        self.stamps_ns = (0, 0)

    def play(self) -> Source:
        """Publish everything, or until stopped.

        :raises MediaError: for an input that cannot be read.
        :raises NoSubscriberError: if nobody subscribes in the time that was given for it.
        """
        settings = self.settings
        if not settings.input:
            raise MediaError("no input given: name a bag, a video, a folder of images or a camera index")
        part = settings.start, settings.stop or math.inf
        source = open_source(settings.input, settings.topic, settings.fps or None, *part)
        self.get_logger().info(f"{source.description} -> {self.publisher.topic_name}")
        if source.odd_stamps:
            self.get_logger().warning(source.odd_stamps)
        if source.calibration:
            info = CameraInfo(**{**source.calibration, "roi": RegionOfInterest(**source.calibration["roi"])})
            self._calibration = self.create_publisher(CameraInfo, self._info_topic, QOS), info
            self.get_logger().info(f"its calibration -> {self._info_topic}")
        self._wait_for_subscribers()
        log = os.path.expanduser(settings.log)
        try:
            with (
                closing(FrameReader(source, settings.loop)) as reader,
                open(log, "w", encoding="utf-8") if log else nullcontext() as log_file,
            ):
                self._publish_all(reader, source, log_file)
        except OSError as error:
            # A full disk names no file, and that a file to be written does not exist would not say what to do.
            if log and (error.errno == errno.ENOSPC or error.filename == log):
                raise MediaError(f"cannot write {log}: {error.strerror}") from error
            raise
        finally:
            for problem in source.skipped:
                self.get_logger().warning(f"of the recording: {problem}")
        return source

    def _wait_for_subscribers(self) -> None:
        wanted, timeout_s = self.settings.wait_for_subscribers, self.settings.wait_timeout_s
        give_up = time.monotonic() + timeout_s
        while (found := self.publisher.get_subscription_count()) < wanted and not self._stop.requested:
            if time.monotonic() > give_up:
                raise NoSubscriberError(
                    f"waited {timeout_s:g} s for {wanted} subscriber(s) on {self.publisher.topic_name}, found {found}; "
                    "check topic names, ROS_DOMAIN_ID and the node's log"
                )
            self._executor.spin_once(timeout_sec=0.05)
        if wanted:  # our side knows the subscriber before it knows us: a best-effort one would miss the first frame
            self._spin_until(time.monotonic_ns() + 200_000_000)

    def _publish_all(self, reader: FrameReader, source: Source, log_file: TextIO | None) -> None:
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
                current_pass, pace = number, Pace(source.nominal_period_ns, self.settings.max_pause_s)
            step_ns, skipped = pace.step(frame.record_ns)
            if skipped and not source.live:
                self.get_logger().warning(f"{skipped} before the frame stamped {frame.stamp_ns} ns; skipped")
            played_ns += step_ns
            due_ns = first_due_ns + round(played_ns / self.settings.rate)
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
            if self.published == self.settings.max_frames:
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
        if not (format := self.settings.compressed):
            return bytes_to_image(*pixels, header)
        # The words of compressed_image_transport: encoding of the source, then that of the compressed picture.
        data = encode_image(to_rgb(*pixels, self._levels), format)
        return compressed_image(data, f"{frame.encoding}; {format} compressed bgr8", header)

    def _publish(self, frame: Frame, message: Image | CompressedImage, log_file: TextIO | None) -> None:
        if self._calibration is not None:
            publisher, info = self._calibration
            info.header = message.header
            publisher.publish(info)
        self.publisher.publish(message)
        if log_file:
            line = {"number": self.published, "stamp_ns": frame.stamp_ns, "published_ns": time.monotonic_ns()}
            log_file.write(json.dumps(line) + "\n")
        self.stamps_ns = self.stamps_ns[0] if self.published else frame.stamp_ns, frame.stamp_ns
        self.published += 1

    def _spin_until(self, due_ns: int) -> None:
        """Serve requests until a time on the ``time.monotonic_ns`` clock, or until stopped."""
        while not self._stop.requested and (left_s := (due_ns - time.monotonic_ns()) * 1e-9) > 0.0:
            if left_s > 0.003:
                self._executor.spin_once(timeout_sec=min(left_s - 0.002, 0.1))
            else:
                time.sleep(left_s)

    def summary(self, source: Source | None) -> str:
        """One line: what was published."""
        if not self.published:
            return "player: published 0 frames"
        first, last = (f"{stamp // 10**9}.{stamp % 10**9:09d}" for stamp in self.stamps_ns)
        problems = self.left_out + (len(source.skipped) if source else 0)
        skipped = f", {problems} problems, named above" if problems else ""
        return f"player: published {self.published} frames, first stamp {first}, last stamp {last}{skipped}"


def parse_options(args: Sequence[str]) -> dict[str, Any]:
    """Options of a command line without its ROS arguments; the names are those of the parameters."""
    line = CommandLine("player", "Publish a recording or a camera as sensor_msgs/Image.")
    for field in dataclasses.fields(PlayerSettings):
        option, default, about = f"--{field.name.replace('_', '-')}", field.default, field.metadata
        if field.name == "input":
            line.add_argument("input", nargs="?", default=default, help=about["description"])
        elif isinstance(default, bool):
            line.add_argument(option, action="store_true", help=about["description"])
        elif isinstance(default, str):
            line.add_argument(option, default=default, help=about["description"])
        else:
            line.add_number(option, default, about["description"], least=about["minimum"])
    return vars(line.parse_args(args))


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
