# SPDX-License-Identifier: Apache-2.0
"""What is known of a frame: its measures, its outcome, and ``frames.csv``, the table of which all figures are made.

docs/evaluate_bag.md describes the measures and the columns.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import yaml

from deq_flow_ros.imaging import MediaError
from deq_flow_ros.imaging.metrics import (
    endpoint_error,
    forward_backward,
    outlier_share,
    photometric_map,
    squared_length,
    visible_weight,
)
from deq_flow_ros.streaming import FlowInfo
from deq_flow_ros.streaming.interface import REPEATED_SHARE

WINDOW, STILL_PX = 5, 0.25
"""A pixel stands still if the window around it, of this side in px, changes less than by a motion of this length."""
TEXTURE = 3.0
"""Least texture of a window, so that any motion would show: grey levels per px in the direction with the least texture,
as RMS over the window, in an image smoothed by a Gaussian of 1 px."""
FEWEST_STATIC = 0.005
"""Least share of static pixels. With fewer, the flicker is not measured."""


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
    for name in (*SOURCE, "size"):
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
