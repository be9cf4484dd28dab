# SPDX-License-Identifier: Apache-2.0
"""What is known of a frame: its measures, its outcome, and ``frames.csv``, the table of which all figures are made.

docs/evaluate_bag.md describes the measures and the columns.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import yaml

from deq_flow_ros.imaging import Frame, MediaError
from deq_flow_ros.imaging.encodings import EncodingError, Levels, to_rgb
from deq_flow_ros.imaging.metrics import (
    endpoint_error,
    forward_backward,
    outlier_share,
    photometric_map,
    squared_length,
    visible_weight,
)
from deq_flow_ros.streaming import FlowInfo

WINDOW, STILL_PX = 5, 0.25
"""A pixel stands still if the window around it, of this side in px, changes less than by a motion of this length."""
TEXTURE = 3.0
"""Least texture of a window, so that any motion would show: grey levels per px in the direction with the least texture,
as RMS over the window, in an image smoothed by a Gaussian of 1 px."""
FEWEST_STATIC = 0.005
"""Least share of static pixels. With fewer, the flicker is not measured."""


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


@dataclass(frozen=True, eq=False)
class PairFields:
    """The arrays of one pair of frames, which are measured, shown and recorded. What is not known is None.

    :ivar image1: the earlier image, (H, W, 3) uint8 RGB; ``image2`` is the later one.
    :ivar flow: (H, W, 2) px, NaN where it is not known. With the direction "forward", it is the flow from ``image1`` to
        ``image2`` on the pixels of ``image1``; with "backward", the other way round.
    :ivar residual: (H, W) px, the length of the solver's last update.
    :ivar truth: the true flow, in the form of ``flow``.
    :ivar visible: (H, W) bool, whether the pixel is visible in both images.
    :ivar backward: the flow in the other direction, on the pixels of the other image.
    :ivar uncertainty: (H, W) px, the expected endpoint error.
    """

    image1: np.ndarray
    image2: np.ndarray
    flow: np.ndarray
    residual: np.ndarray | None = None
    truth: np.ndarray | None = None
    visible: np.ndarray | None = None
    backward: np.ndarray | None = None
    direction: str = "forward"
    uncertainty: np.ndarray | None = None

    @property
    def here(self) -> np.ndarray:
        """The image on whose pixels the flow is defined."""
        return self.image1 if self.direction == "forward" else self.image2

    @property
    def there(self) -> np.ndarray:
        """The other image, to which the flow points."""
        return self.image2 if self.direction == "forward" else self.image1


class Measure(NamedTuple):
    """A measure: its title, its unit, its definition in one sentence, and its source."""

    title: str
    unit: str
    definition: str
    reference: str


_MEASURES = yaml.safe_load(Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8"))
MEASURES = {name: Measure(**values) for name, values in _MEASURES.items()}
"""All measures, by their names in ``frames.csv`` and ``metrics.json``. For measures of the flow, less is better."""


def measure(fields: PairFields, previous: PairFields | None = None) -> dict[str, float]:
    """Compute the measures of a pair, by the names of ``MEASURES``. Those that are not known are left out.

    :param previous: the previous pair of the same stream; without it, the flicker is not measured.
    """
    weight = visible_weight(fields.flow)
    difference, still = photometric_map(fields.here, fields.there, fields.flow)
    measures = {"photometric": _mean(difference, weight), "photometric_still": _mean(still, weight)}
    if fields.backward is not None:
        measures |= consistency(fields.flow, fields.backward)
    if previous is not None and previous.flow.shape == fields.flow.shape:
        measures |= _flicker(fields, previous)
    if fields.truth is not None:
        nothing = np.where(np.isfinite(fields.flow), np.float32(0), fields.flow)
        measures["epe_px"] = endpoint_error(fields.flow, fields.truth)
        measures["epe_still_px"] = endpoint_error(nothing, fields.truth, fields.visible)
        if fields.visible is not None:
            measures["epe_visible_px"] = endpoint_error(fields.flow, fields.truth, fields.visible)
        measures["fl_percent"] = 100 * outlier_share(fields.flow, fields.truth)
    return {name: value for name, value in measures.items() if np.isfinite(value)}


def consistency(flow: np.ndarray, backward: np.ndarray) -> dict[str, float]:
    """The measures of consistency between a flow (H, W, 2) px and the flow in the other direction."""
    found = forward_backward(flow, backward)
    return {} if found is None else {"consistency_px": found[0], "inconsistent_percent": 100 * found[1]}


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    total = float(weight.sum())
    return float(np.nansum(values * weight)) / total if total > 0 else float("nan")


def _flicker(fields: PairFields, previous: PairFields) -> dict[str, float]:
    # Three images, of which the middle one is in both pairs; smoothed, so that noise is not taken for motion.
    grey = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (previous.image1, fields.image1, fields.image2))
    first, middle, last = (cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32) for image in grey)
    # OpenCV scales the derivatives by 8 / (4 WINDOW) and sums their squares: 4 times the mean in all.
    slope = np.sqrt(np.maximum(cv2.cornerMinEigenVal(middle, WINDOW, ksize=3), 0)) / 2
    change = np.maximum(_rms(first - middle), _rms(middle - last))
    step = squared_length(fields.flow - previous.flow)
    static = (slope >= TEXTURE) & (change <= STILL_PX * slope) & np.isfinite(step)
    share = float(static.mean())
    measures = {"static_percent": 100 * share}
    if share >= FEWEST_STATIC:
        # For a vector: the root of the variances of both components, each half of its mean squared difference.
        measures["flicker_px"] = float(np.sqrt(step[static].mean() / 2))
    return measures


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(cv2.blur(np.square(values), (WINDOW, WINDOW)))


PROCESSED, FIRST, DROPPED = OUTCOMES = ("processed", "first", "dropped")
STAGES = (
    "wait", "convert", "resize", "reencode", "encode", "prepare", "match", "correlate", "coarse", "solve", "upsample",
    "output", "refine", "publish",
)  # fmt: skip
"""The stages of one update in the order in which they run."""

NUMBERS = ("iterations", "warm", "residual_px", "scale", "latency_ms", "over_budget", "matched", "repeated")
VALUES = (*NUMBERS, *(f"stage_{stage}_ms" for stage in STAGES), *MEASURES)
SOURCE = ("frame_id", "encoding")
"""What changes if another camera takes over a topic."""
WORDS = ("outcome", "reason", "stop_reason", "reset_reason")
COLUMNS = ("setting", "index", "stamp_ns", "previous_stamp_ns", *WORDS, *VALUES)
"""The columns of ``frames.csv``. An empty cell means that the value is not known."""


@dataclass(frozen=True, eq=False)
class FrameRecord:
    """What became of one frame with one setting: a row of the table, and what of it is shown and recorded.

    :ivar outcome: "processed", "first" (there is no pair yet) or "dropped".
    :ivar reason: why it is first or was dropped.
    :ivar info: of a processed frame, how its flow was computed.
    :ivar measures: by the names of ``MEASURES``; those that are not known are missing.
    :ivar fields: the arrays of its pair; None if it gave no flow.
    :ivar frame: the frame itself; None if it was played into a node, whose outputs are recorded already.
    """

    index: int
    stamp_ns: int
    outcome: str
    reason: str = ""
    info: FlowInfo | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    fields: PairFields | None = None
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
        values = {name: getattr(record, name) for name in ("index", "stamp_ns", "outcome", "reason")}
        if (info := record.info) is not None:
            values |= {name: getattr(info, name) for name in ("previous_stamp_ns", *WORDS[2:], *NUMBERS)}
            values |= {f"stage_{name}_ms": ms for name, ms in info.stage_ms.items()}
        values |= record.measures
        self._write({"setting": setting, **{name: _cell(value) for name, value in values.items()}})

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
