# SPDX-License-Identifier: Apache-2.0
"""The flow of a recording as a rosbag2 with the node's topics and the recording's stamps.

It is written in parts, as a recorder splits a bag. A part counts once it is closed, so an interrupted run leaves a bag
that opens, and goes on with the next part.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.filesize import decimal

from deq_flow_ros.evaluation.results import write_text
from deq_flow_ros.evaluation.runner import Done
from deq_flow_ros.media.bags import BagWriter
from deq_flow_ros.media.colour import flow_to_color
from deq_flow_ros.media.flow_recording import pair_values
from deq_flow_ros.media.frame import Frame, MediaError

IMAGE_TOPIC = "/camera/image_raw"
FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, INFO_TOPIC, STATISTICS_TOPIC = (
    f"/flow_node/{name}" for name in ("flow", "flow_color", "residual", "camera_info", "statistics")
)
TOPICS = (IMAGE_TOPIC, FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, INFO_TOPIC, STATISTICS_TOPIC)
STATUS_NAME = "deq_flow_ros: flow"
METADATA = "metadata.yaml"
RECORDED_BYTES = 15
"""Per pixel and frame of what the node publishes: flow 8, residual 4, colours 3."""


def check_space(out: Path, frames: int, height: int, width: int, remedy: str, images: bool = False) -> None:
    """Raises `MediaError` where a recording of the flow might not fit: a full disk in mid-run would cost the run.

    :param remedy: what else to do than to make room.
    :param images: they are recorded as well.
    """
    needed, free = frames * height * width * (RECORDED_BYTES + 3 * images), shutil.disk_usage(out).free
    if needed > free:
        raise MediaError(
            f"the flow of {frames} frames of {width}x{height} may need {decimal(needed)}, and {out} has "
            f"{decimal(free)} left; make room, choose another --out, or {remedy}"
        )


class FlowBag:
    """A new rosbag2 in the folder `path`, which is its own, or one that an interrupted run left there.

    :param images: record the images as well (rgb8), as a viewer wants them beside the flow.
    :param information: that of the parts to go on after; any others are removed.
    :param calibration: that of the source, which goes with the flow as it is; None where there is none.
    :raises MediaError: where it cannot be written.

    :ivar information: of the closed parts, as `metadata.yaml` has it; None while there is none.
    """

    def __init__(
        self, path: Path, storage: str = "mcap", images: bool = False, information: dict[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.path, self._storage, self._images, self._calibration = path, storage, images, calibration
        self.information = information
        self._nursery = path.parent / f".{path.name}.partial"
        self._writer: BagWriter | None = None
        parts = set(information["relative_file_paths"]) if information else set()
        try:
            shutil.rmtree(self._nursery, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            for file in path.glob(f"{path.name}_*"):
                if file.name not in parts:  # written after the state that the run goes on from
                    file.unlink()
            if information:
                self._write_metadata()
            else:
                (path / METADATA).unlink(missing_ok=True)
        except OSError as error:
            raise MediaError(f"cannot write a bag to {path}: {error}") from error

    def add(self, done: Done, max_px: float = 0.0) -> None:
        """Append what the node would publish of a frame: its account, and with flow the fields.

        :param max_px: motion with the full colour; 0: the largest of the field.
        """
        if self._writer is None:
            number = len(self.information["relative_file_paths"]) if self.information else 0
            self._writer = BagWriter(self._nursery / f"{self.path.name}_{number}", self._storage)
            self._writer.__enter__()
        writer, shot, fields = self._writer, done.shot, done.fields
        if self._images and shot.image is not None:
            writer.write_frame(IMAGE_TOPIC, _frame(shot.image, "rgb8", shot.stamp_ns, shot.record_ns, shot.frame_id))
        writer.write_diagnostics(STATISTICS_TOPIC, STATUS_NAME, account(done), shot.stamp_ns, shot.record_ns)
        if fields is None:
            return
        forward = fields.direction == "forward"
        earlier_ns = done.record.previous_stamp_ns
        assert earlier_ns is not None
        header = (earlier_ns if forward else shot.stamp_ns, shot.record_ns, shot.frame_id)
        writer.write_frame(FLOW_TOPIC, _frame(fields.flow, "32FC2", *header))
        writer.write_frame(COLOR_TOPIC, _frame(flow_to_color(fields.flow, max_px or None), "rgb8", *header))
        if self._calibration is not None:
            writer.write_camera_info(INFO_TOPIC, self._calibration, *header)
        if fields.residual is not None:
            writer.write_frame(RESIDUAL_TOPIC, _frame(fields.residual, "32FC1", *header))

    def close_part(self) -> None:
        """Make what was added so far a part of the bag. Raises `MediaError` where that cannot be written."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.__exit__(None, None, None)
            part = yaml.safe_load((writer.path / METADATA).read_text())["rosbag2_bagfile_information"]
            for name in part["relative_file_paths"]:
                (writer.path / name).replace(self.path / name)
            self.information = part if self.information is None else joined(self.information, part)
            self._write_metadata()
            shutil.rmtree(self._nursery, ignore_errors=True)
        except OSError as error:
            raise MediaError(f"cannot write {self.path}: {error}; its closed parts are kept") from error

    def _write_metadata(self) -> None:
        text = yaml.safe_dump({"rosbag2_bagfile_information": self.information}, sort_keys=False)
        write_text(self.path / METADATA, text)

    @property
    def size(self) -> int:
        """Bytes of the closed parts."""
        return sum(file.stat().st_size for file in self.path.iterdir())


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata (`rosbag2_bagfile_information`) of a bag that holds the files of two, one after the other."""
    starts = [part["starting_time"]["nanoseconds_since_epoch"] for part in (first, second)]
    ends = [start + part["duration"]["nanoseconds"] for start, part in zip(starts, (first, second), strict=True)]
    topics: dict[str, dict[str, Any]] = {}
    for topic in (*first["topics_with_message_count"], *second["topics_with_message_count"]):
        name = topic["topic_metadata"]["name"]
        before = topics[name]["message_count"] if name in topics else 0
        topics[name] = {**topic, "message_count": before + topic["message_count"]}
    return {
        **first,
        "relative_file_paths": [*first["relative_file_paths"], *second["relative_file_paths"]],
        "duration": {"nanoseconds": max(ends) - min(starts)},
        "starting_time": {"nanoseconds_since_epoch": min(starts)},
        "message_count": first["message_count"] + second["message_count"],
        "topics_with_message_count": list(topics.values()),
        "files": [*first["files"], *second["files"]],
    }


def account(done: Done) -> dict[str, str]:
    """What the node would say of a frame, and the measures."""
    record = done.record
    values = {"outcome": record.outcome, "reason": record.reason, "image2_stamp_ns": str(record.stamp_ns)}
    if done.info is not None:
        values |= pair_values(done.info, record.stage_ms)
    return values | {name: f"{value:.6g}" for name, value in record.measures.items()}


def _frame(array: np.ndarray, encoding: str, stamp_ns: int, record_ns: int, frame_id: str) -> Frame:
    array = np.ascontiguousarray(array)
    height, width = array.shape[:2]
    data = array.reshape(-1).view(np.uint8)
    return Frame(data, height, width, data.size // height, encoding, False, stamp_ns, record_ns, frame_id)
