# SPDX-License-Identifier: Apache-2.0
"""Bags with what the flow node publishes: writing them without a node, and reading the reports and the flow."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.filesize import decimal

from deq_flow_ros.imaging.frame import Frame, MediaError, stamp_to_ns
from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.recordings.bags import BagWriter, read_messages
from deq_flow_ros.recordings.files import STATUS_NAME

IMAGE_TOPIC = "/camera/image_raw"
FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC, INFO_TOPIC, STATISTICS_TOPIC = (
    f"/flow_node/{name}" for name in ("flow", "flow_color", "residual", "uncertainty", "camera_info", "statistics")
)
TOPICS = (IMAGE_TOPIC, FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC, INFO_TOPIC, STATISTICS_TOPIC)
RECORDED_BYTES = 19
"""Bytes per pixel and frame that the node publishes: flow 8, residual and uncertainty 4 each, colours 3."""


def check_space(out: Path, frames: int, height: int, width: int, remedy: str, images: bool = False) -> None:
    """Refuse a recording of the flow, and of the ``images`` if they are wanted, that may not fit on the disk.

    :param remedy: what the user can do instead of making room.
    :raises MediaError: if there may be too little room.
    """
    needed, free = frames * height * width * (RECORDED_BYTES + 3 * images), shutil.disk_usage(out).free
    if needed > free:
        raise MediaError(
            f"the flow of {frames} frames of {width}x{height} may need {decimal(needed)}, and {out} has "
            f"{decimal(free)} left; make room, choose another --out, or {remedy}"
        )


class FlowBag:
    """Writes the bag. It is moved to its place when it is closed, so a bag at that place can always be opened.

    :param path: folder of the bag.
    :param nursery: folder in which it is written until then.
    :param calibration: that of the source, which is recorded with the flow; None if the source has none.
    :raises MediaError: if it cannot be written.
    """

    def __init__(
        self, path: Path, nursery: Path, storage: str = "mcap", calibration: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self._calibration = path, calibration
        self._writer = BagWriter(nursery / f"{path.name}_0", storage)  # the data file is named after this folder

    def __enter__(self) -> FlowBag:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.__exit__(None, None, None)
            self._writer.path.replace(self.path)
        except (OSError, sqlite3.Error) as failure:
            if error is None:
                raise MediaError(f"cannot write {self.path}: {failure}") from failure

    def add(
        self, stamp_ns: int, record_ns: int, frame_id: str, account: Mapping[str, str],
        image: np.ndarray | None = None, flow: np.ndarray | None = None, residual: np.ndarray | None = None,
        uncertainty: np.ndarray | None = None, flow_stamp_ns: int | None = None,
    ) -> None:  # fmt: skip
        """Append everything that is published for one frame, but what is None.

        :param account: what happened to the frame, for ``STATISTICS_TOPIC``.
        :param image: (H, W, 3) uint8 RGB.
        :param flow: (H, W, 2) px; without it, neither residual nor uncertainty, (H, W) px, are recorded.
        :param flow_stamp_ns: stamp of the image on whose pixels the flow is defined.
        :raises MediaError: if the disk is full.
        """
        writer = self._writer
        try:
            if image is not None:
                writer.write_frame(IMAGE_TOPIC, Frame.of(image, "rgb8", stamp_ns, record_ns, frame_id))
            writer.write_diagnostics(STATISTICS_TOPIC, STATUS_NAME, account, stamp_ns, record_ns)
            if flow is None or flow_stamp_ns is None:
                return
            header = (flow_stamp_ns, record_ns, frame_id)
            writer.write_frame(FLOW_TOPIC, Frame.of(flow, "32FC2", *header))
            writer.write_frame(COLOR_TOPIC, Frame.of(flow_to_color(flow), "rgb8", *header))
            if self._calibration is not None:
                writer.write_camera_info(INFO_TOPIC, self._calibration, *header)
            for topic, values in ((RESIDUAL_TOPIC, residual), (UNCERTAINTY_TOPIC, uncertainty)):
                if values is not None:
                    writer.write_frame(topic, Frame.of(values, "32FC1", *header))
        except (OSError, sqlite3.Error) as error:
            raise MediaError(f"cannot write {self.path}: {error}; what was written so far is kept") from error


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
        text = self.values.get(key, "")
        return float(text) if text else float("nan")

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


def read_reports(bag: Path, topic: str) -> list[FrameReport]:
    """All reports of a recording in the order of arrival.

    :raises MediaError: if the bag cannot be read.
    """
    return [report_of(message) for _, _, message in read_messages(bag, topic)]


@dataclass(frozen=True)
class Account:
    """The frames of a run by what happened to them. ``problems`` says in words what does not add up."""

    outcomes: Counter[str]
    drop_reasons: Counter[str]
    first_reasons: Counter[str]
    problems: list[str]


def take_account(published_ns: Sequence[int], reports: Sequence[FrameReport], flow_stamps_ns: Sequence[int]) -> Account:
    """Compare the published stamps with the reports of the node and with the recorded flow."""
    outcomes = Counter(report.outcome for report in reports)
    dropped, first = (
        Counter(report.values.get("reason", "") for report in reports if report.outcome == name)
        for name in ("dropped", "first")
    )
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
            problems.append(f"{sum(stamps.values())} frames {what} (stamps in ns: {some})")
    if unknown := sorted(set(outcomes) - {"processed", "first", "dropped"}):
        problems.append(f"expected the outcomes processed, first and dropped, got {unknown} as well")
    if dropped[""]:
        problems.append(f"{dropped['']} frames were dropped without a reason")
    return Account(outcomes, dropped, first, problems)
