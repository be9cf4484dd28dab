# SPDX-License-Identifier: Apache-2.0
"""Image topics of ROS 1 and ROS 2 bags."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros import did_you_mean
from deq_flow_ros.imaging import Frame, MediaError, Pace, stamp_to_ns
from deq_flow_ros.imaging.encodings import ENCODINGS, EncodingError, Levels, decode_image
from deq_flow_ros.imaging.video import VideoDecoder, VideoPacket, codec_of, is_key, packet_of
from deq_flow_ros.recordings.bag_reader import VIDEO, Bag, MessageError, Recorded
from deq_flow_ros.recordings.source import Source

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
ANOTHER_UNIT = 300.0
"""Stamps that are so many times as fast or slow as the recording are in another unit, 1000 times as long at least: no
simulated time, and no images that a converter or a network brought in bursts."""
IMAGE_TYPES = (IMAGE, COMPRESSED_IMAGE, *VIDEO)
MOST_NEEDED = 1000
"""A picture of a video is decoded from so many packets before it at most."""


class BagSource(Source):
    """The messages of one topic with images, compressed images or video, due at the time they were recorded."""

    kind = "bag"

    def __init__(self, path: Path, topic: str | None) -> None:
        super().__init__()
        self.path = path
        self._bag = bag = Bag(path)
        self.topic = _choose_topic(bag, topic)
        counts = bag.topics[self.topic]
        self._msgtype = _image_type(counts) or ""
        self.count = counts[self._msgtype]
        for other in sorted(set(counts) & set(IMAGE_TYPES) - {self._msgtype}):
            bag.note(f"left out {counts[other]} messages of type {other} on {self.topic}; most are {self._msgtype}")
        if self.count == 0:
            raise MediaError(f"the topic {self.topic} of the bag {path} holds no messages; it holds: {_listing(bag)}")
        self.calibration = _calibration(bag, self.topic)
        self.nominal_period_ns = self._period_ns()
        self.skipped = list(bag.problems)
        rate = f"{self.count} frames at about {1e9 / self.nominal_period_ns:.1f} Hz" if self.count > 1 else "1 frame"
        self.description = f"bag {path.name}: {self.topic} ({self._msgtype}), {rate}"

    def entries(self) -> Generator[tuple[int, Callable[[], Frame]], None, None]:
        """See ``Source.entries``. Raw images pass unchanged, compressed ones are decoded to rgb8. Of video, each packet
        gives a frame in rgb8, or one without an image, which says why; decoding begins at the key frame before the part
        that is read. What is missing of the bag is in ``skipped``.
        """
        self.skipped, known = list(self._bag.problems), len(self._bag.problems)
        levels, decoder = Levels(), VideoDecoder() if self._msgtype in VIDEO else None
        needed = deque[VideoPacket](maxlen=MOST_NEEDED)
        pace, offset_ns = Pace(self.nominal_period_ns, max_pause_s=0.0), 0
        self._compared = self.calibration is None
        try:
            for recorded in self._bag.of_type(self.topic, self._msgtype):
                offset_ns += pace.step(recorded.time_ns)[0]
                if decoder is not None and self.part_of(offset_ns) < 0:
                    with contextlib.suppress(MessageError, EncodingError):
                        packet = packet_of(recorded.message())
                        if is_key(packet.data, codec_of(packet.format)):
                            needed.clear()
                        needed.append(packet)
                while decoder is not None and needed and self.part_of(offset_ns) == 0:
                    with contextlib.suppress(EncodingError):
                        decoder.decode(needed.popleft())
                yield offset_ns, partial(self._read, recorded, levels, decoder)
        finally:
            self.skipped += self._bag.problems[known:]

    def _read(self, recorded: Recorded, levels: Levels, decoder: VideoDecoder | None) -> Frame:
        frame = _frame(recorded, levels, decoder)
        if not self._compared and not frame.problem:
            self._compared = True
            if strange := _strange(self.calibration or {}, frame):
                self.note(f"the camera_info beside {self.topic} {strange}")
        return replace(frame, record_ns=frame.stamp_ns) if self._recorded_at_once else frame

    def _period_ns(self) -> int:
        """Usual time between two frames, by the times of recording or by the stamps, whichever is longer.

        Images that are recorded together have no time between them, and those of some drivers no stamps.
        """
        times, stamps = [], []
        for recorded in itertools.islice(self._bag.of_type(self.topic, self._msgtype), 21):
            times.append(recorded.time_ns)
            with contextlib.suppress(MessageError):
                message = recorded.message()
                stamps.append(stamp_to_ns(message.timestamp if hasattr(message, "timestamp") else message.header.stamp))
        self._recorded_at_once = len(times) > 1 and not np.diff(times).any()
        known = [steps[steps > 0] for steps in (np.diff(times), np.diff(stamps))]
        if all(steps.size > 2 for steps in known):
            # A single odd time changes the mean of the steps, and what comes in bursts their median.
            ratios = [float(of(known[1]) / of(known[0])) for of in (np.mean, np.median)]
            ratio = min(ratios, key=lambda one: abs(math.log(one)))
            if not 1 / ANOTHER_UNIT < ratio < ANOTHER_UNIT and (ratios[0] > 1) == (ratios[1] > 1):
                times_as = f"{ratio:,.0f} times faster" if ratio > 1 else f"{1 / ratio:,.0f} times more slowly"
                self.odd_stamps = f"the stamps on {self.topic} advance {times_as} than the recording: a wrong unit?"
                known.pop()
        return max((int(np.median(steps)) for steps in known if steps.size), default=100_000_000)


def _frame(recorded: Recorded, levels: Levels, decoder: VideoDecoder | None) -> Frame:
    """The frame of a recorded message.

    :raises MessageError: for a message, or a compressed image in it, that cannot be decoded.
    """
    message = recorded.message()
    if decoder is not None:
        packet = packet_of(message)
        times_and_id = packet.stamp_ns, recorded.time_ns, packet.frame_id
        try:
            return Frame.of(decoder.decode(packet).rgb(), "rgb8", *times_and_id)
        except EncodingError as error:
            return Frame.without_image(str(error), *times_and_id)
    times_and_id = stamp_to_ns(message.header.stamp), recorded.time_ns, message.header.frame_id
    data = np.asarray(message.data).view(np.uint8)
    if recorded.channel.msgtype == IMAGE:
        layout = message.height, message.width, message.step, message.encoding, bool(message.is_bigendian)
        return Frame(data, *layout, *times_and_id)
    try:
        return Frame.of(decode_image(data, message.format, levels), "rgb8", *times_and_id)
    except EncodingError as error:
        raise MessageError(f"frame stamped {times_and_id[0]}: {error}") from error


def _calibration(bag: Bag, image_topic: str) -> dict[str, Any] | None:
    """First calibration beside an image topic, where image_transport puts it; a damaged one is a problem of the bag."""
    base = re.sub("/(compressed|ffmpeg|foxglove)$", "", image_topic)
    topic = base.rpartition("/")[0] + "/camera_info"
    recorded = next(bag.of_type(topic, CAMERA_INFO), None) if topic in bag.topics else None
    if recorded is None:
        return None
    try:
        message = recorded.message()
    except MessageError as error:
        bag.note(str(error))
        return None

    plain = ("height", "width", "distortion_model", "binning_x", "binning_y")
    calibration: dict[str, Any] = {name: getattr(message, name) for name in plain}
    for name in "dkrp":  # capital letters in ROS 1
        calibration[name] = [float(x) for x in getattr(message, name if hasattr(message, "k") else name.upper())]
    roi = ("x_offset", "y_offset", "height", "width", "do_rectify")
    return calibration | {"roi": {name: getattr(message.roi, name) for name in roi}}


def _strange(calibration: Mapping[str, Any], frame: Frame) -> str:
    """How a calibration does not fit to an image; empty if it does, or says nothing of its size."""
    part = calibration["roi"] if calibration["roi"]["height"] else calibration
    size = part["width"] // max(1, calibration["binning_x"]), part["height"] // max(1, calibration["binning_y"])
    fits = size in ((0, 0), (frame.width, frame.height))
    return "" if fits else f"describes images of {size[0]}x{size[1]} px, these are {frame.width}x{frame.height}"


def _image_type(counts: Mapping[str, int]) -> str | None:
    """The most frequent type of images on a topic; None if there is none."""
    return max((kind for kind in IMAGE_TYPES if kind in counts), key=counts.__getitem__, default=None)


def _listing(bag: Bag) -> str:
    """Every topic of a bag with its type and number of messages."""
    counts = [(name, *item) for name, topic in sorted(bag.topics.items()) for item in topic.items()]
    return ", ".join(f"{name} ({kind}, {count} messages)" for name, kind, count in counts) or "no topics"


def _choose_topic(bag: Bag, wanted: str | None) -> str:
    """The wanted image topic; without a wish, the only one whose images can be read."""
    images = {name: kind for name, topic in bag.topics.items() if (kind := _image_type(topic)) is not None}
    if not images:
        foreign = any(" in " in kind for topic in bag.topics.values() for kind in topic)
        hint = "; only messages of ROS, and foxglove.CompressedVideo, can be read here" if foreign else ""
        none = f"no topic of type {IMAGE}, {COMPRESSED_IMAGE} or of video: {', '.join(VIDEO)}"
        raise MediaError(f"the bag {bag.path} holds no images ({none}); it holds: {_listing(bag)}{hint}")
    if wanted is not None and wanted not in images:
        got = f"is not in it{did_you_mean(wanted, images)}"
        if wanted in bag.topics:
            got = f"is of type {' and '.join(bag.topics[wanted])}"
        there = f"its image topics: {', '.join(sorted(images))}"
        raise MediaError(f"expected an image topic of the bag {bag.path}, but {wanted} {got}; {there}")
    if wanted is not None:
        return wanted
    painted = {name for name in images if name.endswith("/flow_color") and name.removesuffix("_color") in images}
    fields = ("flow", "residual", "uncertainty")  # of the flow node
    of_flow = tuple(f"{name.removesuffix('flow_color')}{field}" for name in painted for field in fields)
    images = {name: kind for name, kind in images.items() if not name.startswith(of_flow)}
    if not images:
        raise MediaError(
            f"the bag {bag.path} holds flow ({', '.join(sorted(painted))}) and not the images that it was made of: "
            "give the recording of the camera, or record its topic as well"
        )
    if len(images) == 1:
        return next(iter(images))
    usable, lines = [], []
    for name, kind in sorted(images.items()):
        picture, what = False, "empty"
        for recorded in itertools.islice(bag.of_type(name, kind), 5):  # the first ones may be damaged
            picture, what = _look_at(recorded)
            if picture:
                usable.append(name)
                break
        lines.append(f"{name} ({kind}, {bag.topics[name][kind]} images, {what})")
    if len(usable) == 1:
        return usable[0]
    raise MediaError(f"the bag {bag.path} has several image topics; choose one with --topic: {'; '.join(lines)}")


def _look_at(recorded: Recorded) -> tuple[bool, str]:
    """Whether a message holds a picture, not depth or flow, and its size and encoding for people."""
    try:
        message = recorded.message()
        if recorded.channel.msgtype == IMAGE:
            return message.encoding in ENCODINGS, f"{message.width}x{message.height} {message.encoding}"
        if recorded.channel.msgtype in VIDEO:
            return True, f"{codec_of(packet_of(message).format)} video"
        height, width = decode_image(np.asarray(message.data).view(np.uint8), message.format).shape[:2]
    except (MessageError, EncodingError) as error:
        return False, str(error)
    return True, f"{width}x{height} {message.format}"
