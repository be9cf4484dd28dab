# SPDX-License-Identifier: Apache-2.0
"""Writes a rosbag2 with what the flow node would publish. ``flow_recording`` reads such bags."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.filesize import decimal

from deq_flow_ros.imaging.colour import flow_to_color
from deq_flow_ros.imaging.frame import Frame, MediaError
from deq_flow_ros.recordings.bags import BagWriter
from deq_flow_ros.recordings.names import STATUS_NAME

IMAGE_TOPIC = "/camera/image_raw"
FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC, INFO_TOPIC, STATISTICS_TOPIC = (
    f"/flow_node/{name}" for name in ("flow", "flow_color", "residual", "uncertainty", "camera_info", "statistics")
)
TOPICS = (IMAGE_TOPIC, FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, UNCERTAINTY_TOPIC, INFO_TOPIC, STATISTICS_TOPIC)
RECORDED_BYTES = 19
"""Bytes per pixel and frame that the node publishes: flow 8, residual and uncertainty 4 each, colours 3."""


def check_space(out: Path, frames: int, height: int, width: int, remedy: str, images: bool = False) -> None:
    """Refuse a recording of the flow that may not fit on the disk, because a full disk would end the run.

    :param remedy: what the user can do instead of making room.
    :param images: whether the images are recorded as well.
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
        """Append everything that is published for one frame.

        :param account: what happened to the frame, for ``STATISTICS_TOPIC``.
        :param image: (H, W, 3) uint8 RGB; None: not recorded.
        :param flow: (H, W, 2) px; None if there is none, and then no colours, residual or uncertainty are recorded.
        :param residual: (H, W) px; None: not recorded.
        :param uncertainty: (H, W) px; None: not recorded.
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
