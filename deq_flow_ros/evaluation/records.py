# SPDX-License-Identifier: Apache-2.0
"""Frames on their way through an evaluation, what became of each, and ``frames.csv``, the table of all of them.

All figures are made from the table. Its columns are described in docs/evaluate_bag.md.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deq_flow_ros.evaluation.measures import MEASURES, PairFields
from deq_flow_ros.imaging.encodings import EncodingError, to_rgb
from deq_flow_ros.imaging.frame import Frame, MediaError
from deq_flow_ros.imaging.levels import Levels
from deq_flow_ros.streaming import FlowInfo

PROCESSED, FIRST, DROPPED = OUTCOMES = ("processed", "first", "dropped")
STAGES = (
    "wait", "convert", "resize", "encode", "prepare", "match", "correlate", "coarse", "solve", "upsample", "output",
    "publish",
)  # fmt: skip
"""Stages of one update in the order of the work."""

WORDS = ("outcome", "reason", "stop_reason", "reset_reason")
NUMBERS = ("iterations", "warm", "residual_px", "scale", "latency_ms", "over_budget")
VALUES = (*NUMBERS, *(f"stage_{stage}_ms" for stage in STAGES), *MEASURES)
COLUMNS = ("setting", "index", "stamp_ns", "previous_stamp_ns", *WORDS, *VALUES)
"""Columns of ``frames.csv``. An empty cell is a value that is not known."""


@dataclass(frozen=True, eq=False)
class InputFrame:
    """A frame of the recording.

    :ivar index: number among the frames that could be read, from 0.
    :ivar place: number in the recording, from 0; frames that could not be read count here.
    :ivar stamp_ns: its stamp in the stream: that of the header, or the time of recording.
    :ivar header_ns: stamp of the header.
    :ivar image: (H, W, 3) uint8 RGB; None where it cannot be decoded: ``problem`` then says why.
    :ivar convert_ms: time that it took to get the pixels out of the message.
    """

    index: int
    place: int
    stamp_ns: int
    header_ns: int
    record_ns: int
    frame_id: str
    image: np.ndarray | None
    problem: str = ""
    convert_ms: float = 0.0

    @classmethod
    def of(
        cls, index: int, frame: Frame, stamps: str = "header", left_out: int = 0, levels: Levels | None = None
    ) -> InputFrame:
        """Decode a frame of a source.

        :param stamps: "header", or "record": the frame is stamped with the time at which it was recorded.
        :param left_out: so many frames before it could not be read.
        :param levels: of the recording, which map 16 bits to 8; None for an image by itself.
        """
        start = time.perf_counter()
        image, problem = None, ""
        try:
            size = (frame.height, frame.width)
            image = to_rgb(frame.data, *size, frame.step, frame.encoding, frame.is_bigendian, levels)
        except EncodingError as error:
            problem = str(error)
        took_ms = 1e3 * (time.perf_counter() - start)
        if image is not None and not image.flags.writeable:
            image = image.copy()  # a view of the file's bytes, which PyTorch warns of
        stamp_ns = frame.record_ns if stamps == "record" else frame.stamp_ns
        stamps_ns = (stamp_ns, frame.stamp_ns, frame.record_ns)
        return cls(index, index + left_out, *stamps_ns, frame.frame_id, image, problem, took_ms)


@dataclass(frozen=True)
class FrameRecord:
    """What became of one frame under one setting; a row of the table.

    :ivar index: number of the frame in the recording, from 0.
    :ivar outcome: "processed", "first" (there is no pair yet) or "dropped".
    :ivar reason: why it is first or was dropped.
    :ivar measures: by the names of ``MEASURES``; what is missing is not known.

    The others are those of ``FlowInfo``, of a processed frame.
    """

    index: int
    stamp_ns: int
    outcome: str
    reason: str = ""
    previous_stamp_ns: int | None = None
    iterations: int = 0
    stop_reason: str = ""
    warm: bool = False
    residual_px: float = math.nan
    reset_reason: str = ""
    scale: float = math.nan
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float = math.nan
    over_budget: bool = False
    measures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_flow(cls, index: int, info: FlowInfo, measures: Mapping[str, float]) -> FrameRecord:
        """The record of a frame that gave flow."""
        same = {name: getattr(info, name) for name in ("stamp_ns", "previous_stamp_ns", "stop_reason", *NUMBERS)}
        reset = info.reset_reason or ""
        return cls(index, outcome=PROCESSED, reset_reason=reset, stage_ms=info.stage_ms, measures=measures, **same)

    def cells(self) -> dict[str, Any]:
        """Known values by column."""
        values = {**vars(self), **self.measures, **{f"stage_{name}_ms": ms for name, ms in self.stage_ms.items()}}
        unknown = () if self.outcome == PROCESSED else NUMBERS
        return {name: value for name, value in values.items() if name not in ("stage_ms", "measures", *unknown)}


@dataclass(frozen=True, eq=False)
class FrameOutcome:
    """What became of a frame under one setting.

    :ivar fields: arrays of its pair, where it gave flow.
    :ivar info: what the estimator said of it, where it gave flow.
    :ivar frame: the frame itself; None where it was played into a node, which has recorded its outputs already.
    """

    record: FrameRecord
    fields: PairFields | None = None
    info: FlowInfo | None = None
    frame: InputFrame | None = None


class FrameTable:
    """``frames.csv`` while it is written: one row per frame and setting, on disk as soon as the frame is done.

    :raises MediaError: where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise MediaError(f"cannot write {path}: {error}") from error
        self.close = self._file.close
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._write(dict(zip(COLUMNS, COLUMNS, strict=True)))

    def append(self, setting: str, record: FrameRecord) -> None:
        """Write one row.

        :raises MediaError: where the disk is full.
        :raises ValueError: for a stage or measure that there is no column for.
        """
        self._write({"setting": setting} | {name: _cell(value) for name, value in record.cells().items()})

    def _write(self, row: Mapping[str, str]) -> None:
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise MediaError(f"cannot write {self._path}: {error}; what is there so far is kept") from error


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def read_frames(path: Path) -> pd.DataFrame:
    """``frames.csv`` as a data frame with the columns ``COLUMNS``.

    What is not known, or infinite, is NaN in columns of numbers, -1 in ``previous_stamp_ns``, and "" elsewhere.
    """
    frames = pd.read_csv(
        path,
        dtype={name: "float64" if name in VALUES else "str" for name in COLUMNS} | {"index": "int64"},
        na_values={name: [""] for name in VALUES},
        keep_default_na=False,
    )
    # Not by way of float64, which has no room for nanoseconds since 1970.
    for name, missing in (("stamp_ns", "0"), ("previous_stamp_ns", "-1")):
        frames[name] = frames[name].replace("", missing).astype("int64")
    frames[list(VALUES)] = frames[list(VALUES)].replace([np.inf, -np.inf], np.nan)
    return frames
