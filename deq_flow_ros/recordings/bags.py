# SPDX-License-Identifier: Apache-2.0
"""Writing rosbag2 recordings and reading them back, without a ROS installation."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.typesys import Stores, get_typestore

from deq_flow_ros.imaging.frame import Frame, MediaError
from deq_flow_ros.recordings.bag_reader import Bag
from deq_flow_ros.recordings.bag_source import CAMERA_INFO, IMAGE
from deq_flow_ros.recordings.files import METADATA

DIAGNOSTIC_ARRAY = "diagnostic_msgs/msg/DiagnosticArray"
STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}


class BagWriter:
    """Writes a new rosbag2 (metadata version 9, as in ROS 2 Jazzy). Use it in a ``with`` statement.

    :param path: the directory of the bag.
    :param storage: "mcap" or "sqlite3".
    :raises MediaError: if the directory exists already or cannot be made.
    """

    def __init__(self, path: str | Path, storage: str = "mcap") -> None:
        if storage not in STORAGES:
            raise MediaError(f"expected one of the bag storages {sorted(STORAGES)}, got {storage!r}")
        self.path = Path(path)
        if storage == "sqlite3" and (signs := sorted(set("#?%") & set(str(self.path)))):
            raise MediaError(
                f"rosbags cannot write an SQLite bag to {self.path}, because of the {' and '.join(signs)} in it; "
                "choose another place, or the storage mcap"
            )
        self._types = get_typestore(Stores.ROS2_JAZZY)
        self._connections: dict[str, Connection] = {}
        try:
            self._writer = Writer(self.path, version=9, storage_plugin=STORAGES[storage])
        except WriterError as error:
            raise MediaError(
                f"cannot write a bag to {self.path}: {error} Choose another place or remove it first"
            ) from error

    def __enter__(self) -> BagWriter:
        try:
            self._writer.open()
        except (OSError, WriterError) as error:
            raise MediaError(f"cannot write a bag to {self.path}: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write_raw(self, topic: str, msgtype: str, cdr: bytes | memoryview, record_ns: int) -> None:
        """Append a serialized message.

        :param msgtype: such as "sensor_msgs/msg/Image".
        :param record_ns: the time of recording.
        """
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
        arrays = {name: np.array(calibration[name], np.float64) for name in "dkrp"}
        roi = self._types.types["sensor_msgs/msg/RegionOfInterest"](**calibration["roi"])
        header = self._header(stamp_ns, frame_id)
        message = self._types.types[CAMERA_INFO](**{**calibration, **arrays, "header": header, "roi": roi})
        self._write(topic, CAMERA_INFO, message, record_ns)

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


def check_recording(path: Path, topics: Collection[str]) -> None:
    """Check that a path is free, or holds an earlier recording of ``topics`` or an empty folder, to be replaced.

    :raises MediaError: for anything but a rosbag2 that holds at least one of ``topics`` or no message at all. It may be
        somebody's data, so it is left alone.
    """
    wrong = ""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        wrong = "is not a directory"
    elif path.exists() and any(path.iterdir()):
        if not (path / METADATA).is_file():
            wrong = f"is not a bag (it has no {METADATA})"
        elif (found := set(Bag(path).topics)) and found.isdisjoint(topics):
            wrong = f"is a bag of {', '.join(sorted(found))}, not of flow"
    if wrong:
        raise MediaError(
            f"the outputs are to be recorded into {path}, but that {wrong} and is left alone; "
            "move it away, or choose another --out"
        )


def remove_recording(path: Path, topics: Collection[str]) -> None:
    """Delete an earlier recording of ``topics``, if there is one, to make room for a new one.

    :raises MediaError: see ``check_recording``.
    """
    check_recording(path, topics)
    if not path.exists():
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise MediaError(f"cannot replace the recording {path}: {error}") from error


def read_messages(path: str | Path, *topics: str) -> Iterator[tuple[str, int, Any]]:
    """Yield (topic, time of recording in ns, message) of the given topics, or of all, in the order of recording.

    :raises MediaError: if the bag cannot be read completely.
    """
    bag = Bag(Path(path))
    for recorded in () if bag.problems else bag.messages(*topics):
        yield recorded.topic, recorded.time_ns, recorded.message()
    if bag.problems:
        raise MediaError(f"the bag {bag.path} cannot be read: {'; '.join(bag.problems)}")


def read_image(message: Any) -> np.ndarray:
    """The array of an image message: 32FC1 (H, W) float32, 32FC2 (H, W, 2) float32 or rgb8 (H, W, 3) uint8.

    :raises MediaError: for other encodings, or if the message holds too few bytes.
    """
    layouts = {"32FC1": (np.float32, 1), "32FC2": (np.float32, 2), "rgb8": (np.uint8, 3)}
    if message.encoding not in layouts:
        raise MediaError(f"expected an image of encoding {sorted(layouts)}, got {message.encoding!r}")
    kind, channels = layouts[message.encoding]
    dtype = np.dtype(kind).newbyteorder(">" if message.is_bigendian else "<")
    row = message.width * channels * dtype.itemsize
    if message.step < row or message.data.size < message.step * message.height:
        raise MediaError(
            f"expected {message.height} rows of at least {row} bytes, "
            f"got step {message.step} and {message.data.size} bytes"
        )
    data = np.asarray(message.data).view(np.uint8)[: message.step * message.height]
    rows = np.ascontiguousarray(data.reshape(message.height, message.step)[:, :row])
    image = rows.view(dtype).reshape(message.height, message.width, channels)
    return image[:, :, 0] if channels == 1 else image
