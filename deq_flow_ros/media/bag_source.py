# SPDX-License-Identifier: Apache-2.0
"""Image topics of ROS 1 and ROS 2 bags."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.media.frame import Frame, MediaError, Source, frame_from_array

log = logging.getLogger(__name__)

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"


@contextmanager
def open_bag(path: Path) -> Iterator[AnyReader]:
    """An open reader of a ROS 1 .bag, a rosbag2 directory, or a single .db3 or .mcap file.

    Raises `MediaError` for everything that a damaged, unfinished or foreign file can bring up, at opening and while
    reading.
    """
    if path.is_dir() and not (path / "metadata.yaml").exists():
        # A recorder that was killed leaves its data file without the metadata; the file itself can still be read.
        parts = sorted(child for child in path.iterdir() if child.suffix in {".db3", ".mcap"})
        if len(parts) != 1:
            raise MediaError(
                f"the bag {path} has no metadata.yaml and {len(parts)} data files; run `ros2 bag reindex {path}` first"
            )
        path = parts[0]
    try:
        with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
            yield reader
    except (MediaError, GeneratorExit):
        raise
    except Exception as error:
        # rosbags lets sqlite, struct, zstd and yaml errors through: whatever it is, the bag cannot be read and the
        # user needs its name.
        raise MediaError(
            f"the bag {path} cannot be read; it is damaged, cut short or no bag ({type(error).__name__}: {error})"
        ) from error


def stamp_of(header: Any) -> int:
    """Header stamp in nanoseconds."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


class BagSource(Source):
    """The messages of one `sensor_msgs/Image` or `CompressedImage` topic, due at the time they were recorded."""

    kind = "bag"

    def __init__(self, path: Path, topic: str | None) -> None:
        super().__init__()
        self.path = path
        with open_bag(path) as reader:
            topics: dict[str, tuple[str, int]] = {}
            for connection in reader.connections:
                before = topics.get(connection.topic, ("", 0))[1]
                topics[connection.topic] = (connection.msgtype, before + connection.msgcount)
            self.topic = _choose_topic(path, topics, topic)
            msgtype, self.count = topics[self.topic]
            if self.count == 0:
                raise MediaError(
                    f"the topic {self.topic} of the bag {path} holds no messages; it holds: {_listing(topics)}"
                )
            self.calibration = _calibration(reader, self.topic)
            times = [time_ns for _, time_ns, _ in itertools.islice(reader.messages(self._connections(reader)), 21)]
        steps = np.diff(times)
        self.nominal_period_ns = max(1, int(np.median(steps))) if steps.size else 100_000_000
        rate = 1e9 / self.nominal_period_ns
        self.description = f"bag {path.name}: {self.topic} ({msgtype}), {self.count} frames at about {rate:.1f} Hz"

    def _connections(self, reader: AnyReader) -> list[Connection]:
        return [connection for connection in reader.connections if connection.topic == self.topic]

    def frames(self) -> Iterator[Frame]:
        """See `Source.frames`. Raw images pass unchanged; compressed ones are decoded, and named in `skipped` where
        that fails.
        """
        self.skipped = []
        with open_bag(self.path) as reader:
            for connection, time_ns, raw in reader.messages(self._connections(reader)):
                message: Any = reader.deserialize(raw, connection.msgtype)
                stamp_ns = stamp_of(message.header)
                if connection.msgtype == IMAGE:
                    data = np.asarray(message.data).view(np.uint8)
                    yield Frame(
                        data,
                        message.height,
                        message.width,
                        message.step,
                        message.encoding,
                        bool(message.is_bigendian),
                        stamp_ns,
                        time_ns,
                        message.header.frame_id,
                    )
                    continue
                try:
                    yield frame_from_array(
                        decode_image(message.data, message.format), stamp_ns, time_ns, message.header.frame_id
                    )
                except MediaError as error:
                    self.skipped.append(f"frame stamped {stamp_ns}: {error}")
                    log.warning("left out the frame stamped %d of %s: %s", stamp_ns, self.topic, error)
        if len(self.skipped) == self.count:
            raise MediaError(
                f"none of the {self.count} images on {self.topic} can be decoded; the first: {self.skipped[0]}"
            )


def _calibration(reader: AnyReader, image_topic: str) -> dict[str, Any] | None:
    """First calibration beside an image topic, where image_transport puts it; one that changes while recording is not
    followed.
    """
    topic = image_topic.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"
    connections = [item for item in reader.connections if item.topic == topic and item.msgtype == CAMERA_INFO]
    for connection, _, raw in reader.messages(connections) if connections else ():
        message: Any = reader.deserialize(raw, connection.msgtype)
        names = ("height", "width", "distortion_model", "binning_x", "binning_y")
        plain = {name: getattr(message, name) for name in names}
        # The matrices have capital letters in ROS 1.
        letters = "dkrp" if hasattr(message, "k") else "DKRP"
        matrices = {letter.lower(): [float(value) for value in getattr(message, letter)] for letter in letters}
        roi = {name: getattr(message.roi, name) for name in ("x_offset", "y_offset", "height", "width", "do_rectify")}
        return {**plain, **matrices, "roi": roi}
    return None


def decode_image(data: np.ndarray, format: str) -> np.ndarray:
    """Image of a `CompressedImage`, as OpenCV decodes it; raises `MediaError` where it cannot."""
    if "compressedDepth" in format:
        raise MediaError(
            f"expected a JPEG or PNG picture, got compressed depth (format {format!r}), which has no optical flow"
        )
    image = cv2.imdecode(np.asarray(data).view(np.uint8), cv2.IMREAD_UNCHANGED) if len(data) else None
    if image is None:
        raise MediaError(
            f"expected a JPEG or PNG picture, got {len(data)} bytes of format {format!r} that cannot be decoded"
        )
    return image


def _listing(topics: dict[str, tuple[str, int]]) -> str:
    return (
        ", ".join(f"{name} ({msgtype}, {count} messages)" for name, (msgtype, count) in sorted(topics.items()))
        or "no topics"
    )


def _choose_topic(path: Path, topics: dict[str, tuple[str, int]], wanted: str | None) -> str:
    images = {name: topics[name] for name in topics if topics[name][0] in (IMAGE, COMPRESSED_IMAGE)}
    if not images:
        raise MediaError(
            f"the bag {path} holds no images (no topic of type {IMAGE} or {COMPRESSED_IMAGE}); "
            f"it holds: {_listing(topics)}"
        )
    if wanted is None:
        first = next(iter(images))
        if len(images) > 1:
            log.warning(
                "%s has several image topics: %s; taking %s (choose with --topic)", path.name, _listing(images), first
            )
        return first
    if wanted not in images:
        got = f"is of type {topics[wanted][0]}" if wanted in topics else "is not in it"
        raise MediaError(
            f"expected an image topic of the bag {path}, but {wanted} {got}; its image topics: {_listing(images)}"
        )
    return wanted
