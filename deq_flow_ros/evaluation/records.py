# SPDX-License-Identifier: Apache-2.0
"""The frames of an evaluation, the outcome of each, and ``frames.csv``, the table of all outcomes.

All figures are computed from this table. docs/evaluate_bag.md describes its columns.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deq_flow_ros.evaluation.measures import MEASURES, PairFields
from deq_flow_ros.imaging.encodings import EncodingError, Levels, to_rgb
from deq_flow_ros.imaging.frame import Frame, MediaError
from deq_flow_ros.streaming import FlowInfo
from deq_flow_ros.streaming.result import REPEATED_SHARE

PROCESSED, FIRST, DROPPED = OUTCOMES = ("processed", "first", "dropped")
STAGES = (
    "wait", "convert", "resize", "reencode", "encode", "prepare", "match", "correlate", "coarse", "solve", "upsample",
    "output", "refine", "publish",
)  # fmt: skip
"""The stages of one update in the order in which they run."""

WORDS = ("outcome", "reason", "stop_reason", "reset_reason")
NUMBERS = ("iterations", "warm", "residual_px", "scale", "latency_ms", "over_budget", "matched", "repeated")
VALUES = (*NUMBERS, *(f"stage_{stage}_ms" for stage in STAGES), *MEASURES)
SOURCE = ("frame_id", "encoding")
"""What changes if another camera takes over a topic."""
COLUMNS = ("setting", "index", "stamp_ns", "previous_stamp_ns", *WORDS, *VALUES)
"""The columns of ``frames.csv``. An empty cell means that the value is not known."""


@dataclass(frozen=True, eq=False)
class InputFrame:
    """A frame of the recording.

    :ivar index: number among the frames that could be read, from 0; ``place`` is that among all frames.
    :ivar stamp_ns: its stamp in the stream: that of the header, or the time of recording.
    :ivar image: (H, W, 3) uint8 RGB; None if it cannot be decoded, and then ``problem`` says why.
    :ivar convert_ms: the time that decoding took.
    """

    index: int
    place: int
    stamp_ns: int
    header_ns: int
    record_ns: int
    frame_id: str
    image: np.ndarray | None
    encoding: str
    problem: str = ""
    convert_ms: float = 0.0

    @classmethod
    def of(
        cls, index: int, frame: Frame, stamps: str = "header", left_out: int = 0, levels: Levels | None = None
    ) -> InputFrame:
        """Decode a frame of a source.

        :param stamps: "header" takes the stamp of the header, "record" the time at which the frame was recorded.
        :param left_out: the number of earlier frames that could not be read.
        :param levels: see ``to_rgb``.
        """
        start = time.perf_counter()
        image, problem = None, frame.problem
        try:
            if not problem:
                layout = (frame.height, frame.width, frame.step, frame.encoding, frame.is_bigendian)
                image = to_rgb(frame.data, *layout, levels)
        except EncodingError as error:
            problem = str(error)
        took_ms = 1e3 * (time.perf_counter() - start)
        if image is not None and not image.flags.writeable:
            image = image.copy()  # PyTorch warns of a view of the file's bytes
        stamps_ns = (frame.record_ns if stamps == "record" else frame.stamp_ns, frame.stamp_ns, frame.record_ns)
        return cls(index, index + left_out, *stamps_ns, frame.frame_id, image, frame.encoding, problem, took_ms)


def frame_problems(previous: InputFrame | None, frame: InputFrame) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a frame: the kind of problem, and the details of this frame."""
    if frame.image is None:
        yield "cannot be read", f"frame {frame.index}: {frame.problem}"
    if previous is None:
        return
    if frame.stamp_ns <= previous.stamp_ns:
        kind = "have a stamp that is not after the one before (see --stamps record)"
        yield kind, f"frame {frame.index}: {frame.stamp_ns} ns after {previous.stamp_ns} ns"
    if frame.image is not None and previous.image is not None and frame.image.shape != previous.image.shape:
        (h0, w0), (h1, w1) = previous.image.shape[:2], frame.image.shape[:2]
        yield "have another size than the one before", f"frame {frame.index}: {w1}x{h1} after {w0}x{h0}"


@dataclass(frozen=True)
class FrameRecord:
    """The outcome of one frame with one setting, which is a row of the table; of a processed frame as in ``FlowInfo``.

    :ivar outcome: "processed", "first" (there is no pair yet) or "dropped".
    :ivar reason: why it is first or was dropped.
    :ivar measures: by the names of ``MEASURES``; those that are not known are missing.
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
    matched: bool = True
    repeated: bool = False
    measures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_flow(cls, index: int, info: FlowInfo, measures: Mapping[str, float]) -> FrameRecord:
        """The record of a frame that gave flow."""
        same = {name: getattr(info, name) for name in ("stamp_ns", "previous_stamp_ns", "stop_reason", *NUMBERS)}
        reset = info.reset_reason or ""
        return cls(index, outcome=PROCESSED, reset_reason=reset, stage_ms=info.stage_ms, measures=measures, **same)


@dataclass(frozen=True, eq=False)
class FrameOutcome:
    """The outcome of a frame with one setting.

    :ivar fields: the arrays of its pair, and ``info`` what the estimator says of it; None if it gave no flow.
    :ivar frame: the frame itself; None if it was played into a node, whose outputs are recorded already.
    """

    record: FrameRecord
    fields: PairFields | None = None
    info: FlowInfo | None = None
    frame: InputFrame | None = None


class FrameTable:
    """Writes ``frames.csv``, one row per frame and setting. Each row is on disk as soon as the frame is done.

    :raises MediaError: if it cannot be written, as from its methods.
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

        :raises ValueError: for a stage or measure without a column.
        """
        values = {**vars(record), **record.measures, **{f"stage_{name}_ms": ms for name, ms in record.stage_ms.items()}}
        unknown = ("stage_ms", "measures", *(() if record.outcome == PROCESSED else NUMBERS))
        self._write({"setting": setting, **{name: _cell(values[name]) for name in values if name not in unknown}})

    def _write(self, row: Mapping[str, str]) -> None:
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise MediaError(f"cannot write {self._path}: {error}; the rows so far are kept") from error


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.7g}"
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


def read_frames(path: Path) -> pd.DataFrame:
    """Read ``frames.csv`` into a data frame with the columns ``COLUMNS``.

    Values that are not known or infinite are NaN in columns of numbers, -1 in ``previous_stamp_ns``, and "" elsewhere.
    """
    frames = pd.read_csv(
        path,
        dtype={name: "float64" if name in VALUES else "str" for name in COLUMNS} | {"index": "int64"},
        na_values={name: [""] for name in VALUES},
        keep_default_na=False,
    )
    # Not converted through float64, which cannot hold nanoseconds since 1970 exactly.
    for name, missing in (("stamp_ns", "0"), ("previous_stamp_ns", "-1")):
        frames[name] = frames[name].replace("", missing).astype("int64")
    frames[list(VALUES)] = frames[list(VALUES)].replace([np.inf, -np.inf], np.nan)
    return frames


def doubtful(frames: pd.DataFrame) -> Iterator[str]:
    """Say how many flow fields of a setting mean nothing, because of their images, or are none.

    :param frames: from ``read_frames``.
    """
    done = frames[frames.outcome == PROCESSED]
    unmatched, repeated = done[done.matched == 0], done[done.repeated == 1]
    for name in SOURCE:
        other = frames[(frames.outcome == FIRST) & frames.reason.str.startswith(f"{name} changed")]
        if len(other):
            what = f"frames that have another {name} than the one before (two cameras on one topic?): {len(other)}"
            yield f"{what}; the first is frame {other.iloc[0]['index']}: {other.iloc[0].reason}"
    if len(unmatched):
        what = f"pairs whose flow means nothing, because their images have nothing in common: {len(unmatched)}"
        yield f"{what} of {len(done)}; the first is frame {unmatched.iloc[0]['index']}"
    if len(repeated) > max(2, REPEATED_SHARE * len(done)):
        what = f"frames that are exactly those before them, so that their flow is zero: {len(repeated)} of {len(done)}"
        why = "is the camera frozen, or does its driver send each image more than once?"
        yield f"{what}; the first is frame {repeated.iloc[0]['index']}; {why}"
