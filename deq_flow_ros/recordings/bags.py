# SPDX-License-Identifier: Apache-2.0
"""Bags that are written without a ROS installation: any rosbag2, and what the flow node publishes, with its reports."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.filesize import decimal
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.imaging import Frame, MediaError, stamp_to_ns
from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.recordings.bag_reader import Bag
from deq_flow_ros.recordings.bag_source import CAMERA_INFO, IMAGE
from deq_flow_ros.recordings.files import METADATA, STATUS_NAME

DIAGNOSTIC_ARRAY = "diagnostic_msgs/msg/DiagnosticArray"
_Writer = TypeVar("_Writer", bound="BagWriter")
STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}


class BagWriter:
    """Writes a new rosbag2 (metadata version 9, as in ROS 2 Jazzy). Use it in a ``with`` statement.

    :raises MediaError: for a storage that is none of ``STORAGES``, or a directory that exists or cannot be made.
    """

    def __init__(self, path: str | Path, storage: str = "mcap") -> None:
        if storage not in STORAGES:
            raise MediaError(f"expected one of the bag storages {sorted(STORAGES)}, got {storage!r}")
        self.path = Path(path)
        if storage == "sqlite3" and (signs := sorted(set("#?%") & set(str(self.path)))):
            why = f"because of the {' and '.join(signs)} in it; choose another place, or the storage mcap"
            raise MediaError(f"rosbags cannot write an SQLite bag to {self.path}, {why}")
        self._types = get_typestore(Stores.ROS2_JAZZY)
        self._connections: dict[str, Connection] = {}
        try:
            self._writer = Writer(self.path, version=9, storage_plugin=STORAGES[storage])
        except WriterError as error:
            raise MediaError(f"cannot write a bag to {self.path}: {error} Choose another place") from error

    def __enter__(self: _Writer) -> _Writer:
        try:
            self._writer.open()
        except (OSError, WriterError) as error:
            raise MediaError(f"cannot write a bag to {self.path}: {error}") from error
        return self

    def __exit__(self, *failure: object) -> None:
        self._writer.close()

    def write_raw(self, topic: str, msgtype: str, cdr: bytes | memoryview, record_ns: int) -> None:
        """Append a serialized message of a type like "sensor_msgs/msg/Image" that was recorded at ``record_ns``."""
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=self._types)
        connection = self._connections[topic]
        if connection.msgtype != msgtype:
            raise MediaError(f"expected {connection.msgtype} on {topic}, as before, got {msgtype}")
        self._writer.write(connection, record_ns, cdr)

    def write_frame(self, topic: str, frame: Frame) -> None:
        """Append a ``sensor_msgs/Image`` that was recorded at ``frame.record_ns``."""
        header, data = self._header(frame.stamp_ns, frame.frame_id), np.ascontiguousarray(frame.data)
        layout = (frame.height, frame.width, frame.encoding, int(frame.is_bigendian), frame.step)
        self._write(topic, IMAGE, self._types.types[IMAGE](header, *layout, data), frame.record_ns)

    def write_camera_info(
        self, topic: str, calibration: Mapping[str, Any], stamp_ns: int, record_ns: int, frame_id: str
    ) -> None:
        """Append a ``sensor_msgs/CameraInfo`` with the values of ``Source.calibration``."""
        fields = {name: np.array(calibration[name], np.float64) for name in "dkrp"}
        fields["roi"] = self._types.types["sensor_msgs/msg/RegionOfInterest"](**calibration["roi"])
        header = self._header(stamp_ns, frame_id)
        self._write(topic, CAMERA_INFO, self._types.types[CAMERA_INFO](header, **{**calibration, **fields}), record_ns)

    def write_diagnostics(
        self, topic: str, name: str, values: Mapping[str, str], stamp_ns: int, record_ns: int
    ) -> None:
        """Append a ``diagnostic_msgs/DiagnosticArray`` with one status of this name and of level OK."""
        types = self._types.types
        pairs = [types["diagnostic_msgs/msg/KeyValue"](*item) for item in values.items()]
        status = types["diagnostic_msgs/msg/DiagnosticStatus"](0, name, message="", hardware_id="", values=pairs)
        message = types[DIAGNOSTIC_ARRAY](self._header(stamp_ns, ""), [status])
        self._write(topic, DIAGNOSTIC_ARRAY, message, record_ns)

    def _write(self, topic: str, msgtype: str, message: Any, record_ns: int) -> None:
        self.write_raw(topic, msgtype, self._types.serialize_cdr(message, msgtype), record_ns)

    def _header(self, stamp_ns: int, frame_id: str) -> Any:
        seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
        stamp = self._types.types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
        return self._types.types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def read_image(message: Any) -> np.ndarray:
    """The array of an image message: 32FC1 (H, W) float32, 32FC2 (H, W, 2) float32 or rgb8 (H, W, 3) uint8.

    :raises MediaError: for other encodings, or if the message holds too few bytes.
    """
    layouts = {"32FC1": ("f4", 1), "32FC2": ("f4", 2), "rgb8": ("u1", 3)}
    if message.encoding not in layouts:
        raise MediaError(f"expected an image of encoding {sorted(layouts)}, got {message.encoding!r}")
    kind, channels = layouts[message.encoding]
    dtype, height, width = np.dtype(f"{'>' if message.is_bigendian else '<'}{kind}"), message.height, message.width
    pixel = channels * dtype.itemsize
    if message.step < width * pixel or message.data.size < message.step * height:
        got = f"step {message.step} and {message.data.size} bytes"
        raise MediaError(f"expected {height} rows of at least {width * pixel} bytes, got {got}")
    data, strides = np.ascontiguousarray(message.data), (message.step, pixel, dtype.itemsize)
    image = np.ndarray((height, width, channels), dtype, data, 0, strides).astype(kind)
    return image[:, :, 0] if channels == 1 else image


IMAGE_TOPIC = "/camera/image_raw"
FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC, INFO_TOPIC, STATISTICS_TOPIC = (
    f"/flow_node/{name}" for name in ("flow", "flow_color", "residual", "uncertainty", "camera_info", "statistics")
)
TOPICS = (IMAGE_TOPIC, FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC, INFO_TOPIC, STATISTICS_TOPIC)


def check_recording(path: Path) -> None:
    """Check that nothing is lost where a recording of flow is to come.

    :raises MediaError: for anything but an empty folder, or a rosbag2 of ``TOPICS`` or without a message. One of images
        alone, or with other topics, is somebody's.
    """
    wrong = ""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        wrong = "is not a directory"
    elif path.exists() and any(path.iterdir()):
        if not (path / METADATA).is_file():
            wrong = f"is not a bag (it has no {METADATA})"
        elif (found := set(Bag(path).topics)) and (found == {IMAGE_TOPIC} or not found <= {*TOPICS}):
            wrong = f"is a bag of {', '.join(sorted(found))}, not of flow"
    if wrong:
        hint = "and is left alone; move it away, or choose another --out"
        raise MediaError(f"the outputs are to be recorded into {path}, but that {wrong} {hint}")


RECORDED_BYTES = 19  # per pixel and frame: flow 8, residual and uncertainty 4 each, colours 3


def check_space(out: Path, frames: int, height: int, width: int, remedy: str, images: bool = False) -> None:
    """Refuse a recording of the flow, and of the ``images`` if they are wanted, that may not fit on the disk.

    :param remedy: what the user can do instead.
    """
    needed, free = frames * height * width * (RECORDED_BYTES + 3 * images), shutil.disk_usage(out).free
    if needed > free:
        needs = f"the flow of {frames} frames of {width}x{height} may need {decimal(needed)}"
        hint = f"make room, choose another --out, or {remedy}"
        raise MediaError(f"{needs}, and {out} has {decimal(free)} left; {hint}")


class FlowBag(BagWriter):
    """Writes what the node publishes, without a node. A bag at its place can always be opened: it comes there complete.

    :param nursery: folder in which it is written until then.
    :param calibration: as ``Source.calibration``, recorded with the flow.
    """

    def __init__(
        self, path: Path, nursery: Path, storage: str = "mcap", calibration: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(nursery / f"{path.name}_0", storage)  # the data file is named after this folder
        self._place, self._calibration = path, calibration

    def __exit__(self, *failure: object) -> None:
        try:
            super().__exit__()
            self.path.replace(self._place)
        except (OSError, sqlite3.Error) as error:
            if not any(failure):
                raise MediaError(f"cannot write {self._place}: {error}") from error

    def add(
        self, stamp_ns: int, record_ns: int, frame_id: str, account: Mapping[str, str],
        image: np.ndarray | None = None, flow: np.ndarray | None = None, residual: np.ndarray | None = None,
        uncertainty: np.ndarray | None = None, flow_stamp_ns: int | None = None,
    ) -> None:  # fmt: skip
        """Append what is published for one frame, but what is None.

        :param account: what happened to the frame.
        :param image: (H, W, 3) uint8 RGB.
        :param flow: (H, W, 2) px; without it, neither residual nor uncertainty, (H, W) px, are recorded.
        :param flow_stamp_ns: stamp of the image on whose pixels the flow is defined.
        :raises MediaError: if the disk is full.
        """
        try:
            if image is not None:
                self.write_frame(IMAGE_TOPIC, Frame.of(image, "rgb8", stamp_ns, record_ns, frame_id))
            self.write_diagnostics(STATISTICS_TOPIC, STATUS_NAME, account, stamp_ns, record_ns)
            if flow is None or flow_stamp_ns is None:
                return
            header = (flow_stamp_ns, record_ns, frame_id)
            self.write_frame(FLOW_TOPIC, Frame.of(flow, "32FC2", *header))
            self.write_frame(COLOR_TOPIC, Frame.of(flow_to_color(flow), "rgb8", *header))
            if self._calibration is not None:
                self.write_camera_info(INFO_TOPIC, self._calibration, *header)
            for topic, values in ((RESIDUAL_TOPIC, residual), (UNCERTAINTY_TOPIC, uncertainty)):
                if values is not None:
                    self.write_frame(topic, Frame.of(values, "32FC1", *header))
        except (OSError, sqlite3.Error) as error:
            raise MediaError(f"cannot write {self._place}: {error}; what was written so far is kept") from error


@dataclass(frozen=True)
class FrameReport:
    """One ``~/statistics`` message: what happened to the frame with this stamp. The values are strings, as sent."""

    stamp_ns: int
    values: dict[str, str]

    @property
    def outcome(self) -> str:
        """One of "processed", "first" and "dropped"."""
        return self.values.get("outcome", "")

    def number(self, key: str) -> float:
        """A value as a number; NaN if it is empty or missing."""
        return float(self.values.get(key) or "nan")

    def stamp(self, key: str) -> int | None:
        """A value as a stamp in nanoseconds; None if it is empty or missing."""
        text = self.values.get(key, "")
        return int(text) if text else None

    def flag(self, key: str) -> bool:
        """A value that is "true" or "false"."""
        return self.values.get(key) == "true"

    @property
    def forward(self) -> bool:
        """Whether the flow is that from the previous image to this one, on the pixels of the previous image."""
        return self.values.get("direction") != "backward"

    @property
    def flow_stamp_ns(self) -> int | None:
        """The stamp that the flow of this frame must have: that of the image on whose pixels it is defined."""
        return self.stamp("image1_stamp_ns" if self.forward else "image2_stamp_ns")


def report_of(message: Any) -> FrameReport:
    """The report in a ``diagnostic_msgs/DiagnosticArray``, from whichever library the message comes."""
    values = {pair.key: pair.value for status in message.status for pair in status.values}
    return FrameReport(stamp_to_ns(message.header.stamp), values)


class Account(NamedTuple):
    """The frames of a run by what happened to them. ``problems`` says in words what does not add up."""

    outcomes: Counter[str]
    drop_reasons: Counter[str]
    first_reasons: Counter[str]
    problems: list[str]


def take_account(published_ns: Sequence[int], reports: Sequence[FrameReport], flow_stamps_ns: Sequence[int]) -> Account:
    """Compare the published stamps with the reports of the node and with the recorded flow."""
    reasons = [(report.outcome, report.values.get("reason", "")) for report in reports]
    dropped, first = (Counter(why for outcome, why in reasons if outcome == name) for name in ("dropped", "first"))
    published, reported = Counter(published_ns), Counter(report.stamp_ns for report in reports)
    stamps_of_flow = (report.flow_stamp_ns for report in reports if report.outcome == "processed")
    promised = Counter(stamp for stamp in stamps_of_flow if stamp is not None)
    sent, problems = Counter(flow_stamps_ns), []
    for stamps, what in (
        (published - reported, "published, but no report says what became of them"),
        (reported - published, "reported, but never published, or reported twice"),
        (sent - promised, "flow messages whose stamp is not that of a processed frame's image"),
        (promised - sent, "processed, but their flow was not recorded"),
    ):
        if stamps:
            some = ", ".join(str(stamp) for stamp in list(stamps)[:3]) + (", ..." if len(stamps) > 3 else "")
            problems.append(f"{stamps.total()} frames {what} (stamps in ns: {some})")
    outcomes = Counter(report.outcome for report in reports)
    if unknown := sorted(set(outcomes) - {"processed", "first", "dropped"}):
        problems.append(f"expected the outcomes processed, first and dropped, got {unknown} as well")
    if dropped[""]:
        problems.append(f"{dropped['']} frames were dropped without a reason")
    return Account(outcomes, dropped, first, problems)
