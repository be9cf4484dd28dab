# SPDX-License-Identifier: Apache-2.0
"""Image topics of ROS 1 and ROS 2 bags."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.imaging.compressed import decode_image
from deq_flow_ros.imaging.encodings import ENCODINGS, EncodingError
from deq_flow_ros.imaging.frame import Frame, MediaError, stamp_to_ns
from deq_flow_ros.recordings.bag_reader import Bag
from deq_flow_ros.recordings.messages import MessageError, Recorded
from deq_flow_ros.recordings.source import Source
from deq_flow_ros.stamps import Pace

log = logging.getLogger(__name__)

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"


class BagSource(Source):
    """The messages of one ``sensor_msgs/Image`` or ``CompressedImage`` topic, due at the time they were recorded."""

    kind = "bag"

    def __init__(self, path: Path, topic: str | None) -> None:
        super().__init__()
        self.path = path
        self._bag = bag = Bag(path)
        self.topic = _choose_topic(bag, topic)
        msgtype, self.count = bag.topics[self.topic].msgtype, bag.topics[self.topic].count
        if self.count == 0:
            raise MediaError(f"the topic {self.topic} of the bag {path} holds no messages; it holds: {_listing(bag)}")
        self.calibration = _calibration(bag, self.topic)
        self.nominal_period_ns = self._period_ns()
        self.skipped = list(bag.problems)
        rate = 1e9 / self.nominal_period_ns
        self.description = f"bag {path.name}: {self.topic} ({msgtype}), {self.count} frames at about {rate:.1f} Hz"

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. Raw images pass unchanged, compressed ones are decoded to rgb8. A message for which
        that fails is named in ``skipped``, like whatever is missing of the bag.
        """
        self.skipped = list(self._bag.problems)
        before, read, unreadable, self.left_out = len(self.skipped), 0, 0, 0
        pace, offset_ns = Pace(self.nominal_period_ns, max_pause_s=0.0), 0
        for recorded in self._bag.messages(self.topic):
            offset_ns += pace.step(recorded.time_ns)[0]
            part = self.part_of(offset_ns)
            if part > 0:
                break
            if part < 0:
                self.left_out += 1
                continue
            read += 1
            try:
                frame = _frame(recorded)
            except MessageError as error:
                self.left_out += 1
                unreadable += 1
                self.skipped.append(str(error))
                log.warning("left out of %s: %s", self.topic, error)
                continue
            yield replace(frame, record_ns=frame.stamp_ns) if self._recorded_at_once else frame
        self.skipped[before:before] = self._bag.problems[before:]
        if unreadable == read:
            if not read:
                self.check_part()
            why = self.skipped[-1] if self.skipped else "there is none"
            none = f"none of the {read} images" if read else "no image"
            raise MediaError(f"{none} on {self.topic} of {self.path} can be read: {why}")

    def _period_ns(self) -> int:
        """Usual time between two frames, by the times of recording or by the stamps, whichever is longer.

        Images that are recorded together have no time between them, and those of some drivers no stamps.
        """
        times, stamps = [], []
        for recorded in itertools.islice(self._bag.messages(self.topic), 21):
            times.append(recorded.time_ns)
            with contextlib.suppress(MessageError):
                stamps.append(stamp_to_ns(recorded.message().header.stamp))
        self._recorded_at_once = len(times) > 1 and not np.diff(times).any()
        known = [steps[steps > 0] for steps in (np.diff(times), np.diff(stamps))]
        return max((int(np.median(steps)) for steps in known if steps.size), default=100_000_000)


def _frame(recorded: Recorded) -> Frame:
    """The frame of a recorded message.

    :raises MessageError: for a message, or a compressed image in it, that cannot be decoded.
    """
    message = recorded.message()
    stamp_ns, frame_id, time_ns = stamp_to_ns(message.header.stamp), message.header.frame_id, recorded.time_ns
    if recorded.msgtype == IMAGE:
        data, height, width = np.asarray(message.data).view(np.uint8), message.height, message.width
        big = bool(message.is_bigendian)
        return Frame(data, height, width, message.step, message.encoding, big, stamp_ns, time_ns, frame_id)
    try:
        image = decode_image(np.asarray(message.data).view(np.uint8), message.format)
    except EncodingError as error:
        raise MessageError(f"frame stamped {stamp_ns}: {error}") from error
    return Frame.of(image, "rgb8", stamp_ns, time_ns, frame_id)


def _calibration(bag: Bag, image_topic: str) -> dict[str, Any] | None:
    """First calibration beside an image topic, where image_transport puts it; one that changes while recording is not
    followed, and one that cannot be decoded is a problem of the bag.
    """
    topic = image_topic.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"
    if topic not in bag.topics or bag.topics[topic].msgtype != CAMERA_INFO:
        return None
    recorded = bag.first(topic)
    if recorded is None:
        return None
    try:
        message = recorded.message()
    except MessageError as error:
        bag.note(str(error))
        return None
    names = ("height", "width", "distortion_model", "binning_x", "binning_y")
    plain = {name: getattr(message, name) for name in names}
    # The matrices have capital letters in ROS 1.
    letters = "dkrp" if hasattr(message, "k") else "DKRP"
    matrices = {letter.lower(): [float(value) for value in getattr(message, letter)] for letter in letters}
    roi = {name: getattr(message.roi, name) for name in ("x_offset", "y_offset", "height", "width", "do_rectify")}
    return {**plain, **matrices, "roi": roi}


def _listing(bag: Bag) -> str:
    """Every topic of a bag with its type and number of messages."""
    topics = [f"{name} ({topic.msgtype}, {topic.count} messages)" for name, topic in sorted(bag.topics.items())]
    return ", ".join(topics) or "no topics"


def _choose_topic(bag: Bag, wanted: str | None) -> str:
    """The wanted image topic; without a wish, the only one whose images can be read."""
    images = {name: topic for name, topic in bag.topics.items() if topic.msgtype in (IMAGE, COMPRESSED_IMAGE)}
    if not images:
        foreign = any(" in " in topic.msgtype for topic in bag.topics.values())
        hint = "; only messages of ROS can be read here" if foreign else ""
        raise MediaError(
            f"the bag {bag.path} holds no images (no topic of type {IMAGE} or {COMPRESSED_IMAGE}); "
            f"it holds: {_listing(bag)}{hint}"
        )
    if wanted is not None and wanted not in images:
        got = f"is of type {bag.topics[wanted].msgtype}" if wanted in bag.topics else "is not in it"
        raise MediaError(
            f"expected an image topic of the bag {bag.path}, but {wanted} {got}; its image topics: "
            f"{', '.join(sorted(images))}"
        )
    if wanted is not None or len(images) == 1:
        return wanted or next(iter(images))
    looks = {name: _look(bag, name) for name in sorted(images)}
    usable = [name for name, (ok, _) in looks.items() if ok]
    if len(usable) == 1:
        return usable[0]
    lines = [f"{n} ({images[n].msgtype}, {images[n].count} images, {look})" for n, (_, look) in looks.items()]
    raise MediaError(f"the bag {bag.path} has several image topics; choose one with --topic: {'; '.join(lines)}")


def _look(bag: Bag, topic: str) -> tuple[bool, str]:
    """Whether the first image of a topic is a picture, and its size and encoding for people."""
    recorded = bag.first(topic)
    if recorded is None:
        return False, "empty"
    try:
        message = recorded.message()
        if recorded.msgtype == IMAGE:
            return message.encoding in ENCODINGS, f"{message.width}x{message.height} {message.encoding}"
        height, width = decode_image(np.asarray(message.data).view(np.uint8), message.format).shape[:2]
    except (MessageError, EncodingError) as error:
        return False, str(error)
    return True, f"{width}x{height} {message.format}"
